"""Pass: one way through a unit's rows. Batches in, complete chunks out in input order; knows neither output columns nor commits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace

import pyarrow as pa

from pipeline.clock import Clock
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.engine import generated_tokens
from pipeline.engine.engine import may_go_on
from pipeline.flight import Tag
from pipeline.isolate import Trial
from pipeline.isolate import guilty
from pipeline.prompts import read_prompts
from pipeline.read import read_unit
from pipeline.segments import History
from pipeline.segments import save_segment
from pipeline.tools import Tools
from schemas.errors import UnitError
from schemas.prompts import RowError
from schemas.unit import WorkUnit

_KILLS_ENGINE = "kills_engine"
_FINISHED = RowError(kind="finished", message="stands for a row that is known, and need not be rendered")
_BATCH_ROWS = 128
"""Rows rendered at a time: enough for batch tokenising, little beside what the engine holds."""


@dataclass(slots=True)
class Chunk:
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


class Pass:
    """One way through a unit's rows: some are generated, the others are known already or of no interest."""

    def __init__(self, unit: WorkUnit, tools: Tools, history: History, out_uri: str, clock: Clock, trial: Trial | None = None) -> None:
        self.unit, self.tools = unit, tools
        self.chunks: deque[Chunk] = deque()
        """Read and not yet complete, in input order."""
        self._history, self._out_uri, self._clock, self._trial = history, out_uri, clock, trial
        self._guilty = guilty(history.deaths)
        self.generated_tokens = 0
        """Output tokens that the engine made for rows that came back."""
        self.copied_rows = self.copied_tokens = 0
        """Answered with what was generated for an identical row."""
        self.cached_prompt_tokens = 0

    def run(self) -> Iterator[Chunk]:
        """Complete chunks in input order. Raises what the engine and the input raise."""
        chunks, clock = self.chunks, self._clock
        tag = Tag(out_uri=self._out_uri, fingerprint=self.tools.record.fingerprint, unit=self.unit.index)
        with clock.spend("generate"):
            alone = self._trial is not None and self._trial.alone
            wide = self.tools.job.lengths_vary
            for generation in self.tools.engine.generate(self._requests(), tag=tag, alone=alone, wide=wide):
                self.cached_prompt_tokens += generation.cached_prompt_tokens
                self.generated_tokens += generated_tokens(_deliver(chunks, generation), generation)
                if generation.copied:
                    self.copied_rows += 1
                    self.copied_tokens += generation.num_tokens
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
        going_on = sum(len(ids) - len(self._history.begun.get(position, ())) for position, ids in begun.items() if ids)
        self.tools.feed.keep(self.generated_tokens + going_on)

    def _requests(self) -> Iterator[Request]:
        """Read and render as the engine asks for rows; rows that cannot be asked are done at once."""
        batches = read_unit(self.unit, self.tools.record.input_schema, _BATCH_ROWS)
        while True:
            with self._clock.spend("read"):
                position, batch = next(batches, (0, None))
            if batch is None:
                return
            with self._clock.spend("render"):
                prompts = enumerate(read_prompts(batch, position, self.tools.job), start=position)
                rendered = self.tools.renderer.render(_FINISHED if row in self._history.index else prompt for row, prompt in prompts)
            chunk = Chunk(position=position, batch=batch, prompt_tokens=[])
            for row, item in enumerate(rendered):
                self._place(chunk, row, item)
            self.chunks.append(chunk)
            yield from list(chunk.requests.values())

    def _place(self, chunk: Chunk, row: int, item: Request | tuple[RowError, int]) -> None:
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
            if self._trial is not None:
                item = replace(item, ordered=False)  # what is tried is this row, not one like it
            begun = self._history.begun.get(position, ())
            chunk.requests[row] = resumed(item, begun, self.tools.engine.info.max_model_len)


def resumed(request: Request, begun: tuple[int, ...], max_model_len: int) -> Request:
    """The request from tokens that an earlier attempt saved, where that is exact.

    Engines refuse a row that has nothing left to make, and the earlier engine's context may have been longer than this one's: one
    token at least is left.
    """
    room = min(request.sampling.max_tokens, max_model_len - len(request.token_ids))
    return replace(request, begun=begun[: room - 1]) if begun and may_go_on(request.sampling) else request


def _deliver(chunks: deque[Chunk], generation: Generation) -> Request:
    for chunk in chunks:
        row = generation.position - chunk.position
        if 0 <= row < chunk.batch.num_rows and row in chunk.requests:
            if row in chunk.done:
                raise UnitError(f"the engine answered row {generation.position} twice")
            chunk.done[row] = generation
            return chunk.requests[row]
    raise UnitError(f"the engine answered row {generation.position}, which nobody asked")
