"""What earlier, unfinished attempts at a unit left in storage: finished rows, begun rows, and what was in engines that died.

Every object here has a name of its own, is created once, and is never read as output. One that cannot be understood counts as
not there: its rows are generated again.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.commit import concat
from pipeline.flight import Flight
from pipeline.isolate import Death
from schemas import layout
from schemas.completions import completion_fields
from schemas.job import JobSpec
from schemas.unit import WorkUnit

_POSITION = "__position"
_BEGUN = "__begun"
_META = b"tokenmill.segment"
_ROWS_SUFFIX = ".rows.parquet"
_DEATH_SUFFIX = ".death.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What is known of a unit before an attempt."""

    rows: pa.RecordBatch
    """The added columns of rows that are finished."""
    index: Mapping[int, int]
    """Where in `rows` a finished row is, by its position in the input table."""
    begun: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Token ids that unfinished rows had got, by position."""
    deaths: tuple[Death, ...] = ()
    engines: tuple[dict[str, Any], ...] = ()
    """What generated the finished rows."""
    names: tuple[str, ...] = ()
    """Of the segments with rows, which are of no use once the unit is committed."""

    def with_rows(self, positions: Sequence[int], rows: pa.RecordBatch) -> History:
        """Those that are finished since, too; what was there first stays."""
        new = [number for number, position in enumerate(positions) if position not in self.index]
        index = {**self.index, **{positions[number]: self.rows.num_rows + offset for offset, number in enumerate(new)}}
        return replace(self, rows=concat(self.rows, rows.take(pa.array(new, pa.int64()))), index=index)


def added_schema(job: JobSpec) -> pa.Schema:
    """The columns that a job adds, all of them nullable."""
    return pa.schema([item.with_nullable(True) for item in completion_fields(job)])


def folder_of(out_uri: str, fingerprint: str, unit: int) -> str:
    return storage.join(out_uri, layout.SEGMENTS, fingerprint[:8], f"{unit:08d}")


def load_history(unit: WorkUnit, out_uri: str, fingerprint: str, job: JobSpec) -> History:
    """The union of what is there; of a row that is there twice, the first by name counts."""
    schema = added_schema(job)
    history = History(rows=pa.RecordBatch.from_pylist([], schema=schema), index={})
    folder = folder_of(out_uri, fingerprint, unit.index)
    for name in sorted(storage.list_names(folder)):
        if not name.endswith((_ROWS_SUFFIX, _DEATH_SUFFIX)):
            continue
        data = storage.read_bytes(storage.join(folder, name))
        if name.endswith(_DEATH_SUFFIX):
            death = _read_death(data, unit, fingerprint)
            history = history if death is None else replace(history, deaths=(*history.deaths, death))
        else:
            history = _add_segment(history, name, data, unit, fingerprint, schema)
    return replace(history, begun={position: ids for position, ids in history.begun.items() if position not in history.index})


def save_segment(
    unit: WorkUnit,
    out_uri: str,
    fingerprint: str,
    *,
    positions: Sequence[int],
    rows: pa.RecordBatch,
    begun: Mapping[int, Sequence[int]],
    engine: dict[str, Any],
) -> None:
    """Store finished rows and how far others are, under a name that nobody else has. Raises OSError."""
    kept = {position: list(ids) for position, ids in begun.items() if ids}
    if not positions and not kept:
        return
    ids_type = pa.list_(pa.int32())
    schema = pa.schema([pa.field(_POSITION, pa.int64()), pa.field(_BEGUN, ids_type), *rows.schema])
    finished = [pa.array(positions, pa.int64()), pa.nulls(len(positions), ids_type), *rows.columns]
    unfinished = [pa.array(list(kept), pa.int64()), pa.array(list(kept.values()), ids_type)]
    unfinished += [pa.nulls(len(kept), item.type) for item in rows.schema]
    nullable = pa.schema([item.with_nullable(True) for item in schema])
    table = pa.Table.from_batches([pa.RecordBatch.from_arrays(columns, schema=nullable) for columns in (finished, unfinished)])
    meta = json.dumps({"fingerprint": fingerprint, "unit": unit.index, "engine": engine}).encode()
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_META: meta}), buffer, compression="zstd")
    name = f"{uuid.uuid4().hex}{_ROWS_SUFFIX}"
    storage.create_once(storage.join(folder_of(out_uri, fingerprint, unit.index), name), buffer.getvalue())


def record_death(flight: Flight, how: str, killed: bool = False) -> None:
    """Store, for each unit that had rows in an engine that died, which they were. Raises OSError."""
    for tag, rows in flight.rows.items():
        death = Death(rows=frozenset(), others=flight.num_rows - len(rows), how=how, killed=killed)
        said = {"fingerprint": tag.fingerprint, "unit": tag.unit, "death": asdict(death) | {"rows": sorted(rows)}}
        name = f"{uuid.uuid4().hex}{_DEATH_SUFFIX}"
        storage.create_once(storage.join(folder_of(tag.out_uri, tag.fingerprint, tag.unit), name), json.dumps(said).encode())


def remove_segments(unit: WorkUnit, out_uri: str, fingerprint: str, history: History) -> None:
    """Forget the saved rows of a unit that is committed. Raises OSError."""
    for name in history.names:
        storage.remove(storage.join(folder_of(out_uri, fingerprint, unit.index), name))


def _read_death(data: bytes, unit: WorkUnit, fingerprint: str) -> Death | None:
    try:
        said = json.loads(data)
        told = said["death"]
        death = Death(
            rows=frozenset(told["rows"]), others=int(told["others"]), how=str(told["how"]), killed=bool(told.get("killed", False))
        )
        ours = (said["fingerprint"], said["unit"]) == (fingerprint, unit.index) and all(unit.holds(row) for row in death.rows)
    except (ValueError, KeyError, TypeError):
        return None
    return death if ours else None


def _add_segment(history: History, name: str, data: bytes, unit: WorkUnit, fingerprint: str, schema: pa.Schema) -> History:
    """The history with one more segment, or as it was where that is not this unit's."""
    try:
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        meta = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
        positions: list[Any] = table.column(_POSITION).to_pylist()
        ids: list[Any] = table.column(_BEGUN).to_pylist()
        columns = table.select(schema.names).replace_schema_metadata(None).cast(schema)
        rows = concat(pa.RecordBatch.from_pylist([], schema=schema), *columns.to_batches())
    except (pa.ArrowException, KeyError, ValueError, TypeError):
        return history
    if (meta.get("fingerprint"), meta.get("unit")) != (fingerprint, unit.index) or not all(unit.holds(p) for p in positions):
        return history
    done = [number for number, value in enumerate(ids) if value is None]
    begun = {positions[number]: tuple(value) for number, value in enumerate(ids) if value is not None}
    longest = {p: max(history.begun.get(p, ()), begun.get(p, ()), key=len) for p in history.begun.keys() | begun.keys()}
    merged = history.with_rows([positions[number] for number in done], rows.take(pa.array(done, pa.int64())))
    return replace(merged, begun=longest, engines=(*history.engines, meta.get("engine") or {}), names=(*history.names, name))
