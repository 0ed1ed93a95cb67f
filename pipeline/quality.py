"""Scores of the same rows before and after in, a verdict out. Pure arithmetic: no engine, no files."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from rouge_score.rouge_scorer import RougeScorer

from schemas.errors import JobError
from schemas.prepared import Bar
from schemas.prepared import Rouge
from schemas.prepared import Verdict

KINDS = ("rouge1", "rouge2", "rougeL")
_RESAMPLES = 1000
_Z_95 = 1.96


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScore:
    """How well one model does on one row."""

    logprob: float
    """Sum over the reference's tokens."""
    num_tokens: int
    """Of the reference."""
    rouge: tuple[float, ...]
    """F-measures of its own completion against the reference, one for each of KINDS, 0 to 1."""


def rouge_of(references: Sequence[str], completions: Sequence[str]) -> list[tuple[float, ...]]:
    """For each row, F-measures in the order of KINDS; words are stemmed, as in MLPerf."""
    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    found = [scorer.score(reference, completion) for reference, completion in zip(references, completions, strict=True)]
    return [tuple(float(row[kind].fmeasure) for kind in KINDS) for row in found]


def judge(before: Sequence[RowScore], after: Sequence[RowScore], bar: Bar) -> Verdict:
    """Compare row by row. Raises JobError where there is nothing to compare with."""
    tokens = sum(row.num_tokens for row in before)
    lost = [sum(row.logprob for row in rows) for rows in (before, after)]
    if not tokens or not all(math.isfinite(value) for value in lost):
        raise JobError(
            f"the gate has nothing to compare: log-probabilities of {tokens} reference tokens are {lost[0]:.4g} unquantised and "
            f"{lost[1]:.4g} quantised; expected finite numbers of at least one token"
        )
    rouge = {kind: _rouge([row.rouge[i] for row in before], [row.rouge[i] for row in after]) for i, kind in enumerate(KINDS)}
    return _verdict(len(before), math.exp(-lost[0] / tokens), math.exp(-lost[1] / tokens), rouge, bar)


def judge_again(verdict: Verdict, bar: Bar) -> Verdict:
    """What was measured then, against the bar of now."""
    again = _verdict(verdict.rows, verdict.perplexity_before, verdict.perplexity_after, verdict.rouge, bar)
    return again.model_copy(update={"engine": verdict.engine, "dtype": verdict.dtype})


def _verdict(rows: int, before: float, after: float, rouge: dict[str, Rouge], bar: Bar) -> Verdict:
    refusals, usual = [], Bar()
    if after / before > bar.max_perplexity_ratio:
        refusals.append(
            f"perplexity of the references rose from {before:.3f} to {after:.3f}, {after / before:.4f} times; "
            f"allowed are {bar.max_perplexity_ratio:g}"
        )
    refusals += [
        f"{kind} fell from {change.before:.2f} to {change.after:.2f}, {change.ratio:.4f} times with an error of {change.error:.4f}; "
        f"at least {bar.min_rouge_ratio:g} is asked for"
        for kind, change in rouge.items()
        if change.ratio + change.error < bar.min_rouge_ratio
    ]
    return Verdict(
        rows=rows,
        bar=bar,
        lowered=bar.max_perplexity_ratio > usual.max_perplexity_ratio or bar.min_rouge_ratio < usual.min_rouge_ratio,
        perplexity_before=before,
        perplexity_after=after,
        perplexity_ratio=after / before,
        rouge=rouge,
        refusals=tuple(refusals),
    )


def _rouge(before: Sequence[float], after: Sequence[float]) -> Rouge:
    """Rows are drawn in pairs: what makes a row hard for one model makes it hard for the other."""
    draw, ratios, pairs = random.Random(0), [], list(zip(before, after, strict=True))
    for _ in range(_RESAMPLES):
        chosen = draw.choices(pairs, k=len(pairs))
        ratios.append(_ratio(sum(old for old, _ in chosen), sum(new for _, new in chosen)))
    mean = sum(ratios) / len(ratios)
    error = _Z_95 * math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / len(ratios))
    count = len(pairs)
    old, new = 100 * sum(before) / count, 100 * sum(after) / count
    return Rouge(before=old, after=new, ratio=_ratio(old, new), error=error)


def _ratio(before: float, after: float) -> float:
    """Nothing in common before leaves nothing to lose."""
    return after / before if before else 1.0
