"""Run one WorkUnit: read, render, generate, commit. A short loop over other modules' functions; knows no cluster."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections import defaultdict
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.commit import Outcome
from pipeline.commit import PartWriter
from pipeline.commit import commit
from pipeline.commit import read_report
from pipeline.engine.engine import Engine
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.prompts import read_prompts
from pipeline.read import check_unchanged
from pipeline.read import read_unit
from pipeline.render import Renderer
from schemas.completions import Choice
from schemas.completions import Completion
from schemas.completions import completion_arrays
from schemas.completions import output_schema
from schemas.errors import UnitError
from schemas.job import JobSpec
from schemas.manifest import MAX_EXAMPLES
from schemas.manifest import UnitReport
from schemas.record import JobRecord
from schemas.unit import WorkUnit

_EXAMPLE_CHARACTERS = 160
_BATCH_ROWS = 128
"""Rows rendered at a time: enough for batch tokenising, little beside what the engine holds."""


@dataclass(slots=True)
class _Chunk:
    """One input batch and what has become of its rows."""

    position: int
    batch: pa.RecordBatch
    prompt_tokens: list[int]
    requests: dict[int, Request] = field(default_factory=dict)
    done: dict[int, Generation] = field(default_factory=dict)  # by row in the batch

    @property
    def complete(self) -> bool:
        return len(self.done) == self.batch.num_rows


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
    """Generate and commit one unit. Raises UnitError, ForeignOutput or EngineDead; nothing is visible unless it returns."""
    target = storage.join(out_uri, unit.part_name(tools.record.fingerprint))
    if storage.exists(target):
        return read_report(target), "already"
    started_at, clock = time.time(), _Clock()
    schema = output_schema(tools.record.input_schema, tools.job)
    writer = PartWriter(schema, tools.job.output.compression)
    tally = _Tally()
    chunks: deque[_Chunk] = deque()
    requests = _requests(unit, tools, chunks, clock)
    with clock.spend("generate"):
        for generation in tools.engine.generate(requests):
            _deliver(chunks, generation)
            while chunks and chunks[0].complete:
                with clock.spend("write"):
                    _write(chunks.popleft(), writer, schema, tools, tally)
        while chunks:  # trailing chunks whose rows are all errors never passed through the engine
            with clock.spend("write"):
                _write(chunks.popleft(), writer, schema, tools, tally)
    if writer.num_rows != unit.num_rows:
        raise UnitError(f"unit {unit.index}: {writer.num_rows} rows came out of {unit.num_rows}; nothing was committed")
    check_unchanged(unit)
    report = UnitReport(
        unit=unit.index,
        fingerprint=tools.record.fingerprint,
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
    )
    return report, commit(target, writer.finish(report, tools.provenance), report)


def _requests(unit: WorkUnit, tools: Tools, chunks: deque[_Chunk], clock: _Clock) -> Iterator[Request]:
    """Read and render as the engine asks for rows; rows that cannot be asked are done at once."""
    batches = read_unit(unit, tools.record.input_schema, _BATCH_ROWS)
    while True:
        with clock.spend("read"):
            position, batch = next(batches, (0, None))
        if batch is None:
            return
        with clock.spend("render"):
            rendered = tools.renderer.render(read_prompts(batch, position, tools.job))
        chunk = _Chunk(position=position, batch=batch, prompt_tokens=[])
        for row, item in enumerate(rendered):
            if isinstance(item, Request):
                chunk.prompt_tokens.append(len(item.token_ids))
                chunk.requests[row] = item
            else:
                error, num_tokens = item
                chunk.prompt_tokens.append(num_tokens)
                chunk.done[row] = Generation(position=position + row, error=error)
        chunks.append(chunk)
        yield from list(chunk.requests.values())


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
    """Counts over a unit's rows."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, position: int, completion: Completion) -> None:
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens
        self.finish_reasons[completion.finish_reason] += 1
        if completion.error is not None:
            if not self.errors[completion.error.kind] and len(self.examples) < MAX_EXAMPLES:
                self.examples.append(
                    {"row": position, "kind": completion.error.kind, "message": completion.error.message[:_EXAMPLE_CHARACTERS]}
                )
            self.errors[completion.error.kind] += 1


def _write(chunk: _Chunk, writer: PartWriter, schema: pa.Schema, tools: Tools, tally: _Tally) -> None:
    if not chunk.complete:
        raise UnitError(f"rows of the batch at {chunk.position} never came back: {len(chunk.done)} of {chunk.batch.num_rows}")
    texts = _texts(chunk, tools)
    completions = []
    for row in range(chunk.batch.num_rows):
        generation = chunk.done[row]
        choices = tuple(
            Choice(text=texts[row, index], finish_reason=made.finish_reason, token_ids=made.token_ids, logprobs=made.logprobs)
            for index, made in enumerate(generation.choices)
        )
        completion = Completion(prompt_tokens=chunk.prompt_tokens[row], choices=choices, error=generation.error)
        tally.add(chunk.position + row, completion)
        completions.append(completion)
    columns = [*chunk.batch.columns, *completion_arrays(completions, tools.job)]
    writer.write(pa.RecordBatch.from_arrays(columns, schema=schema))


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
