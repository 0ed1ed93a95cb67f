"""What a unit takes over from earlier outputs: the answers that its rows' requests have there already. Generates nothing.

A part that is gone, or is not what the index says, gives nothing: its rows are generated.
"""

from __future__ import annotations

from collections import Counter
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.answered import Answered
from pipeline.answered import Place
from pipeline.answered import Source
from pipeline.answerer import Answerer
from pipeline.clock import Clock
from pipeline.commit import concat
from pipeline.engine.engine import Request
from pipeline.prompts import read_prompts
from pipeline.read import read_unit
from pipeline.segments import History
from pipeline.segments import added_schema
from pipeline.tools import Tools
from schemas.completions import ADDED
from schemas.completions import COMPLETION_TOKENS
from schemas.completions import ERROR
from schemas.completions import PROMPT_TOKENS
from schemas.unit import WorkUnit

_PROMPT_TOKENS, _COMPLETION_TOKENS, _ERROR = ADDED.index(PROMPT_TOKENS), ADDED.index(COMPLETION_TOKENS), ADDED.index(ERROR)
_BATCH_ROWS = 512
_THREADS = 8
"""Parts are read at the same time: on Blob each waits for its answer. A table in its old order needs one or two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver:
    """A unit's history with what earlier outputs know of it."""

    history: History
    positions: frozenset[int] = frozenset()
    """Of those rows in the table."""
    rows: int = 0
    tokens: int = 0
    """Completion tokens of those rows."""
    sources: tuple[dict[str, Any], ...] = ()
    """Output, fingerprint and rows of each, for the provenance."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    position: int
    """In the table."""
    prompt_tokens: int


def take_over(unit: WorkUnit, out_uri: str, tools: Tools, history: History, clock: Clock) -> TakenOver:
    """Rows that an earlier attempt has finished stay. Raises what reading the input raises, and OSError where a store fails."""
    if unit.reuse is None:
        return TakenOver(history=history)
    with clock.spend("read"):
        index = tools.indexes.get(storage.join(out_uri, unit.reuse))
    if not len(index):
        return TakenOver(history=history)
    places = _look_up(unit, tools, history, index, clock)
    with clock.spend("read"):
        return _taken(places, index, tools, history)


def _look_up(unit: WorkUnit, tools: Tools, history: History, index: Answered, clock: Clock) -> dict[Place, list[_Wanted]]:
    """Who wants which place: identical rows want the same."""
    answerer = Answerer(tools.record.decides, asdict(tools.engine.info))
    wanted: defaultdict[Place, list[_Wanted]] = defaultdict(list)
    batches = read_unit(unit, tools.record.input_schema, _BATCH_ROWS)
    while True:
        with clock.spend("read"):
            position, batch = next(batches, (0, None))
        if batch is None:
            return wanted
        with clock.spend("render"):
            rendered = tools.renderer.render(read_prompts(batch, position, tools.job))
            asked = [item for item in rendered if isinstance(item, Request) and item.position not in history.index]
            for request, place in zip(asked, index.find([answerer.key(request) for request in asked]), strict=True):
                if place is not None:
                    wanted[place].append(_Wanted(request.position, len(request.token_ids)))


def _taken(wanted: Mapping[Place, Sequence[_Wanted]], index: Answered, tools: Tools, history: History) -> TakenOver:
    by_part: defaultdict[tuple[int, int], list[Place]] = defaultdict(list)
    for place in sorted(wanted):
        by_part[place.source, place.unit].append(place)
    schema = added_schema(tools.job)
    sources = [index.sources[source] for source, _ in by_part]
    places = [[place.row for place in group] for group in by_part.values()]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="earlier") as pool:
        read = pool.map(
            tools.earlier_parts.read, sources, [unit for _, unit in by_part], places, repeat(tools.job.output.prefix), repeat(schema)
        )  # fmt: skip
        parts = list(read)
    positions: list[int] = []
    taken = [pa.RecordBatch.from_pylist([], schema=schema)]
    counts = Counter[Source]()
    for source, group, rows in zip(sources, by_part.values(), parts, strict=True):
        if rows is None:
            continue
        # What cannot be the row that was indexed: an error, or another prompt.
        lengths, failed = rows.column(_PROMPT_TOKENS).to_pylist(), rows.column(_ERROR).is_valid().to_pylist()
        good = [
            (number, row)
            for number, place in enumerate(group)
            for row in wanted[place]
            if not failed[number] and lengths[number] == row.prompt_tokens
        ]
        positions += [row.position for _, row in good]
        taken.append(rows.take(pa.array([number for number, _ in good], pa.int64())))
        counts[source] += len(good)
    rows = concat(*taken)
    return TakenOver(
        history=history.with_rows(positions, rows),
        positions=frozenset(positions),
        rows=rows.num_rows,
        tokens=int(pc.sum(rows.column(_COMPLETION_TOKENS)).as_py() or 0),
        sources=tuple({"output": source.uri, "fingerprint": source.fingerprint, "rows": count} for source, count in counts.items()),
    )
