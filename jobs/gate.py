"""The gate before a checkpoint is stored: a model's rows in, what an engine makes of them, before and after, and the verdict out.

What the unquantised model said may lie in a file, a Baseline, from a node that holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from jobs.references import Row
from jobs.references import rows_digest
from pipeline import storage
from pipeline.measure import Measured
from pipeline.measure import measure
from pipeline.model import Model
from pipeline.profile import Machine
from pipeline.profile import ReplicaPlan
from pipeline.profile import load_profile
from pipeline.profile import plan_replicas
from pipeline.profile import this_machine
from pipeline.quality import RowScore
from pipeline.quality import judge
from pipeline.quality import rouge_of
from pipeline.render import load_tokenizer
from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.prepared import Bar
from schemas.prepared import Baseline
from schemas.prepared import Verdict

Say = Callable[[str], None]

_SOURCE_CACHE = "auto"
"""vLLM's kv_cache_dtype for the unquantised model: as its weights."""


def ask_source(source: Model, rows: list[Row], *, max_tokens: int, say: Say) -> Measured:
    """What the unquantised model makes of the rows. Raises JobError, with the ways on where this machine does not hold it."""
    return _ask(source, rows, plan_source(source, rows, max_tokens=max_tokens, machine=this_machine()), max_tokens, say, "unquantised")


def ask_prepared(made: Model, rows: list[Row], *, max_tokens: int, dtype: str | None, say: Say, what: str) -> Measured:
    """The same of the checkpoint that was made of it. Raises JobError."""
    options = {"dtype": dtype} if dtype else {}
    return _ask(made, rows, _plan(made, rows, max_tokens, this_machine(), options), max_tokens, say, what)


def plan_source(source: Model, rows: list[Row], *, max_tokens: int, machine: Machine) -> ReplicaPlan:
    """One engine for the unquantised model."""
    try:
        # Not in fewer bits than it has: what a profile's cache of FP8 loses is part of what is judged.
        return _plan(source, rows, max_tokens, machine, {"kv_cache_dtype": _SOURCE_CACHE})
    except JobError as error:
        what = str(error).partition(";")[0]  # what follows advises to prepare the model, or to change a job
        raise JobError(
            f"{what}, and the gate compares with the unquantised model. Prepare it on a node that holds it, which may be of another kind "
            "(--precision, --output az://...); or have it say there what it makes of these rows (`tokenmill model baseline ... --to FILE`) "
            "and give that here (--baseline FILE); or leave the gate out (--no-gate), which the checkpoint will say"
        ) from error


def verdict(source: Model, rows: list[Row], before: Measured, after: Measured, bar: Bar) -> Verdict:
    """How much worse it became."""
    tokenizer = load_tokenizer(source.path)
    scores = []
    for found in (before, after):
        texts: list[str] = tokenizer.batch_decode(found.completions, skip_special_tokens=True)
        rouge = rouge_of([row.reference for row in rows], texts)
        scores.append(
            [
                RowScore(logprob=logprob, num_tokens=len(row.reference_ids), rouge=kinds)
                for row, logprob, kinds in zip(rows, found.logprobs, rouge, strict=True)
            ]
        )
    return judge(scores[0], scores[1], bar).model_copy(update={"engine": after.engine, "dtype": after.dtype})


def store_baseline(uri: str, source: Model, rows: list[Row], said: Measured, *, max_tokens: int) -> Baseline:
    """Raises JobError where something else is there."""
    made = Baseline(
        source=source.digests,
        rows=rows_digest(rows),
        max_tokens=max_tokens,
        logprobs=tuple(said.logprobs),
        completions=tuple(map(tuple, said.completions)),
        dtype=said.dtype,
        kv_cache_dtype=_SOURCE_CACHE,
        engine=said.engine,
    )
    data = made.model_dump_json().encode()
    try:
        storage.create_once(uri, data)
    except FileExistsError:
        if storage.read_bytes(uri) != data:
            raise JobError(f"--to: {uri} is there already; remove it, or choose another name") from None
    return made


def read_baseline(uri: str, source: Model, rows: list[Row], *, max_tokens: int) -> Measured:
    """Raises JobError where it is none, or one of another model or other rows."""
    try:
        found = Baseline.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError:
        raise JobError(f"--baseline: there is nothing at {uri}; `tokenmill model baseline` makes it") from None
    except ValidationError as error:
        raise JobError(f"--baseline: {uri} is none that `tokenmill model baseline` made: {describe_validation(error)}") from None
    shown = found.rows == rows_digest(rows) and len(found.logprobs) == len(found.completions) == len(rows)
    same = {"another model": found.source == source.digests, "other rows": shown, "other --max-tokens": found.max_tokens == max_tokens}
    same["an engine whose KV cache may have lost precision"] = found.kv_cache_dtype == _SOURCE_CACHE
    if wrong := [what for what, fits in same.items() if not fits]:
        raise JobError(
            f"--baseline: {uri} is of {', of '.join(wrong)}; give model, --table, --prompt, --reference, --rows and --max-tokens as "
            "`tokenmill model baseline` had them, or run it again"
        )
    return Measured(
        logprobs=list(found.logprobs), completions=[list(ids) for ids in found.completions], dtype=found.dtype, engine=found.engine
    )


def _plan(model: Model, rows: list[Row], max_tokens: int, machine: Machine, options: dict[str, Any]) -> ReplicaPlan:
    longest = max(len(row.prompt_ids) + max(len(row.reference_ids), max_tokens) for row in rows)
    length = min(model.max_position_embeddings, longest + 1)
    return plan_replicas(load_profile("auto", machine), machine, model, replicas=1, options={"max_model_len": length, **options})


def _ask(model: Model, rows: list[Row], plan: ReplicaPlan, max_tokens: int, say: Say, what: str) -> Measured:
    pairs = [(row.prompt_ids, row.reference_ids) for row in rows]
    return measure(model, plan, pairs, max_tokens=max_tokens, say=lambda line: say(f"{what}: {line}"))
