"""ROUGE of completions against references, as MLPerf's language models are scored: stemmed, F-measure, in percent."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

KINDS = ("rouge1", "rouge2", "rougeL")


def rouge(completions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean over all rows."""
    scorer = RougeScorer(KINDS, use_stemmer=True)
    scores = [scorer.score(reference, completion) for completion, reference in zip(completions, references, strict=True)]
    return {kind: round(100 * statistics.fmean(score[kind].fmeasure for score in scores), 4) for kind in KINDS}
