"""Run one WorkUnit: read, render, generate, commit. A short loop over other modules' functions; knows no cluster."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections import defaultdict
from collections import deque
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.commit import Outcome
from pipeline.commit import PartWriter
from pipeline.commit import commit
from pipeline.commit import concat
from pipeline.commit import read_report
from pipeline.engine.engine import Engine
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.engine import may_go_on
from pipeline.flight import Tag
from pipeline.isolate import Trial
from pipeline.isolate import guilty
from pipeline.isolate import next_trial
from pipeline.prompts import read_prompts
from pipeline.read import check_unchanged
from pipeline.read import read_unit
from pipeline.render import Renderer
from pipeline.segments import History
from pipeline.segments import added_schema
from pipeline.segments import load_history
from pipeline.segments import remove_segments
from pipeline.segments import save_segment
from schemas.completions import ADDED
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
from schemas.job import JobSpec
from schemas.manifest import MAX_EXAMPLES
from schemas.manifest import UnitReport
from schemas.prompts import RowError
from schemas.record import JobRecord
from schemas.unit import WorkUnit

# Columns by number: their names may carry a prefix.
_FINISH_REASON, _PROMPT_TOKENS = ADDED.index(FINISH_REASON), ADDED.index(PROMPT_TOKENS)
_COMPLETION_TOKENS, _ERROR = ADDED.index(COMPLETION_TOKENS), ADDED.index(ERROR)
_KILLS_ENGINE = "kills_engine"
_EXAMPLE_CHARACTERS = 160
_BATCH_ROWS = 128
"""Rows rendered at a time: enough for batch tokenising, little beside what the engine holds."""


@dataclass(slots=True)
class _Chunk:
    """One input batch and what has become of its rows, each by its number in the batch."""

    position: int
    batch: pa.RecordBatch
    prompt_tokens: list[int]
    requests: dict[int, Request] = field(default_factory=dict)
    done: dict[int, Generation] = field(default_factory=dict)
    known: dict[int, int] = field(default_factory=dict)
    """Finished by an earlier attempt: where in its history."""
    skipped: int = 0
    """Rows of no interest to this pass."""

    @property
    def complete(self) -> bool:
        return len(self.done) + len(self.known) + self.skipped == self.batch.num_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What a replica brings to every unit of one job."""

    record: JobRecord
    job: JobSpec
    engine: Engine
    renderer: Renderer
    worker: str
    provenance: dict[str, Any]


class _Clock:
    """Seconds by kind, as this unit's thread spends them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kind: str | None = None
        self._since = time.perf_counter()

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Time inside counts for `kind`, and not for what surrounds it."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, kind: str | None) -> str | None:
        now = time.perf_counter()
        if self._kind is not None:
            self.seconds[self._kind] += now - self._since
        previous, self._kind, self._since = self._kind, kind, now
        return previous


def run_unit(unit: WorkUnit, out_uri: str, tools: Tools) -> tuple[UnitReport, Outcome]:
    """Generate and commit one unit, or what earlier attempts left of it.

    Raises UnitError, ForeignOutput or EngineDead; nothing is visible unless it returns. Where the engine dies or is asked to
    leave, finished rows are saved for the next attempt; asked to leave, it raises ReplicaLost.
    """
    fingerprint = tools.record.fingerprint
    target = storage.join(out_uri, unit.part_name(fingerprint))
    if storage.exists(target):
        return read_report(target), "already"
    started_at, clock = time.time(), _Clock()
    history = load_history(unit, out_uri, fingerprint, tools.job)
    earlier = len(history.index)
    earlier_tokens = int(pc.sum(history.rows.column(_COMPLETION_TOKENS)).as_py() or 0)
    while (trial := next_trial(_left(unit, history), history.deaths)) is not None:
        history = _try(trial, unit, out_uri, tools, history, clock)
    schema = output_schema(tools.record.input_schema, tools.job)
    writer, tally = PartWriter(schema, tools.job.output.compression), _Tally()
    walk = _Pass(unit, tools, history, out_uri, clock)
    try:
        for chunk in walk.run():
            with clock.spend("write"):
                added = _added(chunk, tools, history)
                tally.add(chunk.position, added)
                writer.write(pa.RecordBatch.from_arrays([*chunk.batch.columns, *added.columns], schema=schema))
    except EngineDead as error:
        written = writer.taken(added_schema(tools.job))
        _save(error, walk, range(unit.position, unit.position + written.num_rows), written)
    if writer.num_rows != unit.num_rows:
        raise UnitError(f"unit {unit.index}: {writer.num_rows} rows came out of {unit.num_rows}; nothing was committed")
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
    )
    others = [engine for engine in history.engines if engine != tools.provenance.get("engine")]
    provenance = {**tools.provenance, **({"resumed_from": others} if others else {})}
    outcome = commit(target, writer.finish(report, provenance), report)
    with contextlib.suppress(OSError):  # of no use any more, and in nobody's way
        remove_segments(unit, out_uri, fingerprint, history)
    return report, outcome


def _left(unit: WorkUnit, history: History) -> list[int]:
    """Positions that are neither finished nor proven to kill engines."""
    if not history.deaths:
        return []  # nobody to suspect: no need to count them out
    deadly = guilty(history.deaths)
    return [row for row in range(unit.position, unit.position + unit.num_rows) if row not in history.index and row not in deadly]


def _try(trial: Trial, unit: WorkUnit, out_uri: str, tools: Tools, history: History, clock: _Clock) -> History:
    """Generate some of a unit's rows and save them; the history with them. Whatever dies, they are not tried together again."""
    walk = _Pass(unit, tools, history, out_uri, clock, trial)
    made = _Finished(added_schema(tools.job))
    try:
        for chunk in walk.run():
            made.add(chunk, tools)
    except EngineDead as error:
        _save(error, walk, *made.taken())
    positions, rows = made.taken()
    walk.save(positions, rows, {})
    return history.with_rows(positions, rows)


def _save(error: EngineDead, walk: _Pass, positions: Sequence[int], rows: pa.RecordBatch) -> NoReturn:
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

    def add(self, chunk: _Chunk, tools: Tools) -> None:
        self._positions += [chunk.position + row for row in sorted(chunk.done)]
        self._batches.append(_generated(chunk, tools))

    def taken(self) -> tuple[list[int], pa.RecordBatch]:
        return self._positions, concat(*self._batches)


class _Pass:
    """One way through a unit's rows: some are generated, the others are known already or of no interest."""

    def __init__(self, unit: WorkUnit, tools: Tools, history: History, out_uri: str, clock: _Clock, trial: Trial | None = None) -> None:
        self.unit, self.tools = unit, tools
        self.chunks: deque[_Chunk] = deque()
        """Read and not yet complete, in input order."""
        self._history, self._out_uri, self._clock, self._trial = history, out_uri, clock, trial
        self._guilty = guilty(history.deaths)

    def run(self) -> Iterator[_Chunk]:
        """Complete chunks in input order. Raises what the engine and the input raise."""
        chunks, clock = self.chunks, self._clock
        tag = Tag(out_uri=self._out_uri, fingerprint=self.tools.record.fingerprint, unit=self.unit.index)
        with clock.spend("generate"):
            alone = self._trial is not None and self._trial.alone
            for generation in self.tools.engine.generate(self._requests(), tag=tag, alone=alone):
                _deliver(chunks, generation)
                while chunks and chunks[0].complete:
                    yield chunks.popleft()
            while chunks:  # trailing chunks whose rows never passed through the engine
                chunk = chunks.popleft()
                if not chunk.complete:
                    raise UnitError(f"rows of the batch at {chunk.position} never came back: {len(chunk.done)} of {chunk.batch.num_rows}")
                yield chunk

    def save(self, positions: Sequence[int], rows: pa.RecordBatch, begun: Mapping[int, Sequence[int]]) -> None:
        """As a segment of the unit. Raises OSError."""
        save_segment(
            self.unit,
            self._out_uri,
            self.tools.record.fingerprint,
            positions=positions,
            rows=rows,
            begun=begun,
            engine=self.tools.provenance.get("engine", {}),
        )

    def _requests(self) -> Iterator[Request]:
        """Read and render as the engine asks for rows; rows that cannot be asked are done at once."""
        batches = read_unit(self.unit, self.tools.record.input_schema, _BATCH_ROWS)
        while True:
            with self._clock.spend("read"):
                position, batch = next(batches, (0, None))
            if batch is None:
                return
            with self._clock.spend("render"):
                rendered = self.tools.renderer.render(read_prompts(batch, position, self.tools.job))
            chunk = _Chunk(position=position, batch=batch, prompt_tokens=[])
            for row, item in enumerate(rendered):
                self._place(chunk, row, item)
            self.chunks.append(chunk)
            yield from list(chunk.requests.values())

    def _place(self, chunk: _Chunk, row: int, item: Request | tuple[RowError, int]) -> None:
        position = chunk.position + row
        chunk.prompt_tokens.append(len(item.token_ids) if isinstance(item, Request) else item[1])
        known = self._history.index.get(position)
        if self._trial is not None and position not in self._trial.rows:
            chunk.skipped += 1
        elif known is not None:
            chunk.known[row] = known
        elif not isinstance(item, Request):
            chunk.done[row] = Generation(position=position, error=item[0])
        elif position in self._guilty:
            ends = "; ".join(dict.fromkeys(self._guilty[position]))
            message = f"engines died {len(self._guilty[position])} times with this row alone in them: {ends}"
            chunk.done[row] = Generation(position=position, error=RowError(kind=_KILLS_ENGINE, message=message))
        else:
            begun = self._history.begun.get(position, ())
            chunk.requests[row] = replace(item, begun=begun) if begun and may_go_on(item.sampling) else item


def _deliver(chunks: deque[_Chunk], generation: Generation) -> None:
    for chunk in chunks:
        row = generation.position - chunk.position
        if 0 <= row < chunk.batch.num_rows and row in chunk.requests:
            if row in chunk.done:
                raise UnitError(f"the engine answered row {generation.position} twice")
            chunk.done[row] = generation
            return
    raise UnitError(f"the engine answered row {generation.position}, which nobody asked")


@dataclass(slots=True)
class _Tally:
    """Counts over a unit's output rows, and their digest."""

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
        self.finish_reasons.update(map(str, added.column(_FINISH_REASON).to_pylist()))
        for row, error in enumerate(added.column(_ERROR).to_pylist()):
            if error is None:
                continue
            if not self.errors[error["kind"]] and len(self.examples) < MAX_EXAMPLES:
                self.examples.append({"row": position + row, "kind": error["kind"], "message": error["message"][:_EXAMPLE_CHARACTERS]})
            self.errors[error["kind"]] += 1


def _added(chunk: _Chunk, tools: Tools, history: History) -> pa.RecordBatch:
    """The added columns of a whole chunk, in input order."""
    made = _generated(chunk, tools)
    if not chunk.known:
        return made
    known = sorted(chunk.known)
    both = concat(made, history.rows.take(pa.array([chunk.known[row] for row in known], pa.int64())))
    place = {row: number for number, row in enumerate([*sorted(chunk.done), *known])}
    return both.take(pa.array([place[row] for row in range(chunk.batch.num_rows)], pa.int64()))


def _generated(chunk: _Chunk, tools: Tools) -> pa.RecordBatch:
    """The added columns of the chunk's rows that are done, in input order."""
    texts = _texts(chunk, tools)
    completions = []
    for row in sorted(chunk.done):
        generation = chunk.done[row]
        choices = tuple(
            Choice(text=texts[row, index], finish_reason=made.finish_reason, token_ids=made.token_ids, logprobs=made.logprobs)
            for index, made in enumerate(generation.choices)
        )
        completions.append(Completion(prompt_tokens=chunk.prompt_tokens[row], choices=choices, error=generation.error))
    return pa.RecordBatch.from_arrays(completion_arrays(completions, tools.job), schema=added_schema(tools.job))


def _texts(chunk: _Chunk, tools: Tools) -> dict[tuple[int, int], str]:
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
