"""Run one WorkUnit: read, render, generate, commit. A short loop over other modules' functions; knows no cluster."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.clock import Clock
from pipeline.commit import Outcome
from pipeline.commit import PartWriter
from pipeline.commit import commit
from pipeline.commit import concat
from pipeline.commit import read_report
from pipeline.flaws import Flaws
from pipeline.isolate import Trial
from pipeline.isolate import guilty
from pipeline.isolate import next_trial
from pipeline.read import check_unchanged
from pipeline.segments import History
from pipeline.segments import added_schema
from pipeline.segments import load_history
from pipeline.segments import remove_segments
from pipeline.take_over import take_over
from pipeline.tools import Tools
from pipeline.unit_pass import Chunk
from pipeline.unit_pass import Pass
from schemas.completions import ADDED
from schemas.completions import COMPLETION
from schemas.completions import COMPLETION_TOKENS
from schemas.completions import ERROR
from schemas.completions import FINISH_REASON
from schemas.completions import PROMPT_TOKENS
from schemas.completions import Choice
from schemas.completions import Completion
from schemas.completions import RowsDigest
from schemas.completions import completion_arrays
from schemas.completions import output_schema
from schemas.errors import EngineDead
from schemas.errors import EngineEvicted
from schemas.errors import ReplicaLost
from schemas.errors import UnitError
from schemas.manifest import MAX_EXAMPLES
from schemas.manifest import UnitReport
from schemas.unit import WorkUnit

# Columns by number: their names may carry a prefix.
_FINISH_REASON, _PROMPT_TOKENS = ADDED.index(FINISH_REASON), ADDED.index(PROMPT_TOKENS)
_COMPLETION = ADDED.index(COMPLETION)
_COMPLETION_TOKENS, _ERROR = ADDED.index(COMPLETION_TOKENS), ADDED.index(ERROR)
_EXAMPLE_CHARACTERS = 160


def run_unit(unit: WorkUnit, out_uri: str, tools: Tools) -> tuple[UnitReport, Outcome]:
    """Generate and commit one unit, or what earlier attempts left of it.

    Raises UnitError, ForeignOutput or EngineDead; nothing is visible unless it returns. Where the engine dies or is asked to
    leave, finished rows are saved for the next attempt; asked to leave, it raises ReplicaLost.
    """
    fingerprint = tools.record.fingerprint
    target = storage.join(out_uri, unit.part_name(fingerprint))
    if storage.exists(target):
        return read_report(target), "already"
    started_at, clock = time.time(), Clock(tools.feed)
    with clock.spend("read"):
        history = load_history(unit, out_uri, fingerprint, tools.job)
    earlier = len(history.index)
    earlier_tokens = int(pc.sum(history.rows.column(_COMPLETION_TOKENS)).as_py() or 0)
    reused = take_over(unit, out_uri, tools, history, clock)
    history = reused.history
    while (trial := next_trial(_left(unit, history), history.deaths)) is not None:
        history = _try(trial, unit, out_uri, tools, history, clock)
    schema = output_schema(tools.record.input_schema, tools.job)
    writer, tally = PartWriter(schema, tools.job.output.compression), _Tally(flaws=Flaws(wants_json=unit.wants_json))
    walk = Pass(unit, tools, history, out_uri, clock)
    try:
        for chunk in walk.run():
            with clock.spend("decode"):
                texts = _texts(chunk, tools)
            with clock.spend("write"):
                added = _added(chunk, texts, tools, history)
                tally.add(chunk.position, added)
                writer.write(pa.RecordBatch.from_arrays([*chunk.batch.columns, *added.columns], schema=schema))
    except EngineDead as error:
        written = writer.taken(added_schema(tools.job))
        # What was taken over is taken over again, and counted as that.
        own = [number for number in range(written.num_rows) if unit.position + number not in reused.positions]
        _save(error, walk, [unit.position + number for number in own], written.take(pa.array(own, pa.int64())))
    if writer.num_rows != unit.num_rows:
        raise UnitError(f"unit {unit.index}: {writer.num_rows} rows came out of {unit.num_rows}; nothing was committed")
    with clock.spend("write"):
        check_unchanged(unit)
    report = UnitReport(
        unit=unit.index,
        fingerprint=fingerprint,
        attempt=uuid.uuid4().hex,
        worker=tools.worker,
        rows=writer.num_rows,
        error_rows=sum(tally.errors.values()),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        started_at=started_at,
        finished_at=time.time(),
        finish_reasons=dict(tally.finish_reasons),
        errors=dict(tally.errors),
        examples=tally.examples,
        seconds={kind: round(seconds, 4) for kind, seconds in clock.seconds.items()},
        digest=tally.digest.hexdigest(),
        resumed_rows=earlier,
        resumed_tokens=earlier_tokens,
        copied_rows=walk.copied_rows,
        copied_tokens=walk.copied_tokens,
        cached_prompt_tokens=walk.cached_prompt_tokens,
        reused_rows=reused.rows,
        reused_tokens=reused.tokens,
        flaws=dict(tally.flaws.counts),
        flagged=tally.flaws.flagged,
    )
    others = [engine for engine in history.engines if engine != tools.provenance.get("engine")]
    provenance = {**tools.provenance, **({"resumed_from": others} if others else {})}
    provenance |= {"reused_from": list(reused.sources)} if reused.sources else {}
    with clock.spend("commit"):
        outcome = commit(target, writer.finish(report, provenance), report)
    if outcome in ("created", "acknowledgement_lost"):
        tools.feed.keep(walk.generated_tokens)
    with contextlib.suppress(OSError):  # of no use any more, and in nobody's way
        remove_segments(unit, out_uri, fingerprint, history)
    return report, outcome


def _left(unit: WorkUnit, history: History) -> list[int]:
    """Positions that are neither finished nor proven to kill engines."""
    if not history.deaths:
        return []  # nobody to suspect: no need to count them out
    deadly = guilty(history.deaths)
    return [row for row in range(unit.position, unit.position + unit.num_rows) if row not in history.index and row not in deadly]


def _try(trial: Trial, unit: WorkUnit, out_uri: str, tools: Tools, history: History, clock: Clock) -> History:
    """Generate some of a unit's rows and save them; the history with them. Whatever dies, they are not tried together again."""
    walk = Pass(unit, tools, history, out_uri, clock, trial)
    made = _Finished(added_schema(tools.job))
    try:
        for chunk in walk.run():
            made.add(chunk, tools)
    except EngineDead as error:
        _save(error, walk, *made.taken())
    positions, rows = made.taken()
    with clock.spend("write"):
        walk.save(positions, rows, {})
    return history.with_rows(positions, rows)


def _save(error: EngineDead, walk: Pass, positions: Sequence[int], rows: pa.RecordBatch) -> NoReturn:
    """Store what a pass had finished when its engine went, then say that it went."""
    rest = _Finished(rows.schema)
    for chunk in walk.chunks:
        rest.add(chunk, walk.tools)
    more_positions, more_rows = rest.taken()
    begun = error.begun if isinstance(error, EngineEvicted) else {}
    saved = [*positions, *more_positions]
    try:
        walk.save(saved, concat(rows, more_rows), begun)
        what = f"{len(saved)} finished rows were saved"
    except OSError as failure:
        what = f"its finished rows could not be saved: {failure}"
    if isinstance(error, EngineEvicted):
        raise ReplicaLost(f"unit {walk.unit.index}: its replica was asked to leave; {what}") from None
    raise error


class _Finished:
    """Rows that a pass generated, as they will stand in the output. Grows."""

    def __init__(self, schema: pa.Schema) -> None:
        self._positions: list[int] = []
        self._batches = [pa.RecordBatch.from_pylist([], schema=schema)]

    def add(self, chunk: Chunk, tools: Tools) -> None:
        self._positions += [chunk.position + row for row in sorted(chunk.done)]
        self._batches.append(_generated(chunk, _texts(chunk, tools), tools))

    def taken(self) -> tuple[list[int], pa.RecordBatch]:
        return self._positions, concat(*self._batches)


@dataclass(slots=True)
class _Tally:
    """Counts over a unit's output rows, and their digest."""

    flaws: Flaws
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    digest: RowsDigest = field(default_factory=RowsDigest)

    def add(self, position: int, added: pa.RecordBatch) -> None:
        self.digest.update(added.columns)
        self.prompt_tokens += int(pc.sum(added.column(_PROMPT_TOKENS)).as_py() or 0)
        self.completion_tokens += int(pc.sum(added.column(_COMPLETION_TOKENS)).as_py() or 0)
        reasons = [str(reason) for reason in added.column(_FINISH_REASON).to_pylist()]
        self.finish_reasons.update(reasons)
        self.flaws.add(position, added.column(_COMPLETION).to_pylist(), reasons)
        for row, error in enumerate(added.column(_ERROR).to_pylist()):
            if error is None:
                continue
            if not self.errors[error["kind"]] and len(self.examples) < MAX_EXAMPLES:
                self.examples.append({"row": position + row, "kind": error["kind"], "message": error["message"][:_EXAMPLE_CHARACTERS]})
            self.errors[error["kind"]] += 1


def _added(chunk: Chunk, texts: Mapping[tuple[int, int], str], tools: Tools, history: History) -> pa.RecordBatch:
    """The added columns of a whole chunk, in input order."""
    made = _generated(chunk, texts, tools)
    if not chunk.known:
        return made
    known = sorted(chunk.known)
    both = concat(made, history.rows.take(pa.array([chunk.known[row] for row in known], pa.int64())))
    place = {row: number for number, row in enumerate([*sorted(chunk.done), *known])}
    return both.take(pa.array([place[row] for row in range(chunk.batch.num_rows)], pa.int64()))


def _generated(chunk: Chunk, texts: Mapping[tuple[int, int], str], tools: Tools) -> pa.RecordBatch:
    """The added columns of the chunk's rows that are done, in input order."""
    completions = []
    for row in sorted(chunk.done):
        generation = chunk.done[row]
        choices = tuple(
            Choice(text=texts[row, index], finish_reason=made.finish_reason, token_ids=made.token_ids, logprobs=made.logprobs)
            for index, made in enumerate(generation.choices)
        )
        completions.append(Completion(prompt_tokens=chunk.prompt_tokens[row], choices=choices, error=generation.error))
    return pa.RecordBatch.from_arrays(completion_arrays(completions, tools.job), schema=added_schema(tools.job))


def _texts(chunk: Chunk, tools: Tools) -> dict[tuple[int, int], str]:
    """Text by (row, choice); decoded in one batch for each way of decoding."""
    texts: dict[tuple[int, int], str] = {}
    waiting: dict[bool, list[tuple[tuple[int, int], list[int]]]] = {True: [], False: []}
    for row, generation in chunk.done.items():
        for index, choice in enumerate(generation.choices):
            if choice.text is not None:
                texts[row, index] = choice.text
            else:
                skip: bool = chunk.requests[row].sampling.skip_special_tokens
                waiting[skip].append(((row, index), choice.token_ids))
    for skip, items in waiting.items():
        if items:
            decoded = tools.renderer.decode([ids for _, ids in items], skip_special_tokens=skip)
            texts.update(zip([key for key, _ in items], decoded, strict=True))
    return texts
