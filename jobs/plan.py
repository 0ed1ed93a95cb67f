"""Input objects in, WorkUnits out. Deterministic: the same objects and job give the same units. Reads footers, never rows."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.prompts import prompt_columns
from pipeline.read import identity_of
from pipeline.read import identity_of_listed
from pipeline.read import open_parquet
from schemas.errors import JobError
from schemas.job import InputSpec
from schemas.job import JobSpec
from schemas.unit import RowRange
from schemas.unit import WorkUnit

_BYTES_PER_TOKEN = 4  # of English text in Llama tokenizers; only sizes units
_MIN_UNITS = 32
"""A table is cut at least this fine, so that replicas finish together and a lost worker costs little."""
_MAX_UNIT_TOKENS = 4_000_000
"""Prompt plus max_tokens: five to fifteen minutes of one GPU replica."""
_END_SHARES = 144
"""Towards the end of a large table units become smaller, this share of what is left: two for each replica of a rack of 72, so that all
of them end together."""
_END_UNIT_TOKENS = 250_000
"""Down to here; 5 to 20 s of one GPU replica. Tables that are cut finer anyway are cut evenly."""
_MAX_UNIT_BYTES = 64 << 20
_MIN_UNIT_ROWS = 16
_FOOTER_THREADS = 16
_CANARY_STRATA = 8

_FIELDS: list[pa.Field[Any]] = [
    pa.field("unit", pa.int64()),
    pa.field("uri", pa.string()),
    pa.field("identity", pa.string()),
    pa.field("row_start", pa.int64()),
    pa.field("row_stop", pa.int64()),
    pa.field("position", pa.int64()),
]
_PLAN_SCHEMA = pa.schema(_FIELDS)
_META_SKIPPED = b"tokenmill.skipped"
_META_ROW_BYTES = b"tokenmill.row_bytes"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """Sizes of one row group, uncompressed."""

    num_rows: int
    size_bytes: int
    prompt_bytes: int
    row_bytes: float | None = None
    """Of one row's prompt, about; None where nothing says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputObject:
    """One input file and what its footer says."""

    uri: str
    identity: str
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All units of a job, in input order."""

    units: tuple[WorkUnit, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    """Objects that give no rows, each with the reason."""
    row_bytes: float | None = None
    """Of one row's prompt, about; None where nothing says, or an earlier version made the plan."""

    @property
    def num_rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    @property
    def objects(self) -> dict[str, str]:
        """Identity by URI."""
        return {rows.uri: rows.identity for unit in self.units for rows in unit.ranges}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([unit.to_dict() for unit in self.units]).encode()).hexdigest()

    def to_parquet(self) -> bytes:
        rows = []
        for unit in self.units:
            for part in unit.ranges or (RowRange(uri="", identity="", row_start=0, row_stop=0, position=0),):
                rows.append(
                    {
                        "unit": unit.index,
                        "uri": part.uri,
                        "identity": part.identity,
                        "row_start": part.row_start,
                        "row_stop": part.row_stop,
                        "position": part.position,
                    }
                )
        table = pa.Table.from_pylist(rows, schema=_PLAN_SCHEMA)
        said = {_META_SKIPPED: json.dumps(self.skipped).encode(), _META_ROW_BYTES: json.dumps(self.row_bytes).encode()}
        table = table.replace_schema_metadata(said)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> Plan:
        """Raises ValueError, TypeError, OSError or pa.ArrowException where it is no plan."""
        # Without Arrow's threads: a short command that ends while they start was seen to abort at exit.
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        if table.schema.names != _PLAN_SCHEMA.names or any(column.null_count for column in table.columns):
            raise ValueError(f"its columns are {', '.join(table.schema.names)}, or lack values")
        ranges: dict[int, list[RowRange]] = {}
        for row in table.to_pylist():
            unit = ranges.setdefault(row.pop("unit"), [])
            if row["uri"]:
                unit.append(RowRange(**row))
        said = table.schema.metadata or {}
        skipped = tuple((uri, reason) for uri, reason in json.loads(said.get(_META_SKIPPED, b"[]")))
        units = tuple(WorkUnit(index=index, ranges=tuple(parts)) for index, parts in sorted(ranges.items()))
        return cls(units=units, skipped=skipped, row_bytes=json.loads(said.get(_META_ROW_BYTES, b"null")))


def list_input(spec: InputSpec) -> list[storage.ObjectInfo]:
    """Every input object once, in the order of the URIs given. Raises JobError where a URI names nothing."""
    found: dict[str, storage.ObjectInfo] = {}
    for uri in spec.uris:
        try:
            listed = storage.list_objects(storage.absolute(uri))
        except OSError as error:
            raise JobError(f"input.uri: cannot list {uri}: {error}") from error
        for item in listed:
            found.setdefault(item.uri, item)
    return list(found.values())


Taken = Set[tuple[str, str]]
"""URI and identity of objects that other runs of a schedule have planned."""


def untaken(spec: InputSpec, taken: Taken) -> list[storage.ObjectInfo]:
    """The input's objects without those that are taken. An object that was rewritten since has another identity, and is new."""
    listed = list_input(spec)
    return [item for item in listed if not _is_taken(item, taken)] if taken else listed


def _is_taken(item: storage.ObjectInfo, taken: Taken) -> bool:
    try:
        return (item.uri, identity_of_listed(item)) in taken
    except pa.ArrowException:  # no plan has what cannot be read
        return False


def make_plan(job: JobSpec, taken: Taken = frozenset()) -> tuple[Plan, pa.Schema]:
    """Look at every input object that is not taken and cut the table. Raises JobError naming file and field."""
    wanted = set(prompt_columns(job.input))
    listed = untaken(job.input, taken)
    if not listed:
        raise JobError("input.uri: every object has been taken by an earlier run of this schedule; there is nothing new")
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        outcomes = list(pool.map(lambda item: _look_at(item, wanted), listed))
    objects = [item for item in outcomes if isinstance(item, InputObject)]
    skipped = [item for item in outcomes if isinstance(item, tuple)]
    if skipped and job.input.unreadable == "refuse":
        uri, reason = skipped[0]
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise JobError(f"input.uri: {uri}: {reason}{more}; repair or remove it, or set input.unreadable: skip to leave such files out")
    if not objects:
        raise JobError(f"input.uri: none of the {len(skipped)} files can be read; the first, {skipped[0][0]}: {skipped[0][1]}")
    schema = common_schema(objects, job.input)
    skipped += [(item.uri, "it has no rows") for item in objects if not item.num_rows]
    units = cut(objects, max_tokens=job.sampling.max_tokens, canary=job.canary)
    groups = [group for item in objects for group in item.row_groups]
    return Plan(units=units, skipped=tuple(skipped), row_bytes=mean_row_bytes(groups)), schema


def _look_at(item: storage.ObjectInfo, wanted: set[str]) -> InputObject | tuple[str, str]:
    """The object, or its URI and why it cannot be read."""
    uri = item.uri
    try:
        identity = identity_of_listed(item)  # as listed; of 100,000 objects not one more is asked for what is known
        with open_parquet(uri) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            return InputObject(uri=uri, identity=identity, row_groups=_row_groups(metadata, wanted), schema=schema)
    except (pa.ArrowException, OSError) as error:
        # Arrow's own errors have no errno; with one it is the store that failed, and the file may be good.
        if isinstance(error, OSError) and error.errno is not None:
            raise JobError(f"input.uri: cannot read {uri}: {error}") from error
        return uri, f"cannot be read as Parquet: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _row_groups(metadata: pq.FileMetaData, wanted: set[str]) -> tuple[RowGroup, ...]:
    groups = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = [group.column(number) for number in range(group.num_columns)]
        ours = [column for column in columns if column.path_in_schema.split(".", 1)[0] in wanted]
        each = [_row_bytes(column, group.num_rows) for column in ours]
        groups.append(
            RowGroup(
                num_rows=group.num_rows,
                size_bytes=group.total_byte_size,
                prompt_bytes=sum(column.total_uncompressed_size for column in ours),
                row_bytes=None if None in each else sum(size or 0.0 for size in each),
            )
        )
    return tuple(groups)


def _row_bytes(column: pq.ColumnChunkMetaData, num_rows: int) -> float | None:
    """Of a row's value, about: the mean or, as Parquet stores equal texts once, the longer one of the least and the greatest text."""
    mean = column.total_uncompressed_size / max(1, num_rows)
    if column.physical_type != "BYTE_ARRAY" or not column.has_dictionary_page:
        return mean
    found = column.statistics
    if found is None:
        return None
    if found.has_min_max:
        return max(mean, len(found.min_raw or b""), len(found.max_raw or b""))  # as bytes: not every text is UTF-8
    return mean if found.null_count == column.num_values else None


def mean_row_bytes(groups: Sequence[RowGroup]) -> float | None:
    """Over the rows of all; None where one of them does not say, or there is no row."""
    filled = [group for group in groups if group.num_rows]
    known = [group.row_bytes * group.num_rows for group in filled if group.row_bytes is not None]
    return sum(known) / sum(group.num_rows for group in filled) if known and len(known) == len(filled) else None


def common_schema(objects: Sequence[InputObject], spec: InputSpec) -> pa.Schema:
    """The one schema of all objects, or their union where asked for. Raises JobError naming file and field."""
    first = objects[0]
    different = [item for item in objects if not item.schema.equals(first.schema)]
    if not different:
        return first.schema
    if spec.schemas == "same":
        other = different[0]
        raise JobError(
            f"input.uri: {other.uri} has another schema than {first.uri}: {_difference(first.schema, other.schema)}; "
            "set input.schemas: unify to read their union"
        )
    try:
        union = pa.unify_schemas([item.schema for item in objects], promote_options="permissive")
        everywhere = {name for name in union.names if all(name in item.schema.names for item in objects)}
        fields = [
            field
            if field.name in everywhere and all(not item.schema.field(field.name).nullable for item in objects)
            else field.with_nullable(True)
            for field in union
        ]
        metadata: Any = union.metadata
        return pa.schema(fields, metadata=metadata)
    except pa.ArrowException as error:
        raise JobError(f"input.uri: the schemas have no union: {error}") from None


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    for field in first:
        if field.name not in other.names:
            return f"it lacks column {field.name!r}"
        kind = other.field(field.name).type
        if kind != field.type:
            return f"its column {field.name!r} is {kind}, expected {field.type}"
        if other.field(field.name).nullable != field.nullable:
            mine, theirs = ("must not", "may") if field.nullable else ("may", "must not")
            return f"its column {field.name!r} {mine} be null, where the other's {theirs}"
    extra = [name for name in other.names if name not in first.names]
    return f"it also has column {extra[0]!r}" if extra else f"its columns are in another order: {', '.join(other.names)}"


def canary_rows(num_rows: int, canary: int | None) -> list[range]:
    """Positions of the rows that run first, some in each of eight parts of the table; none where they would be all of it."""
    if canary is None or canary >= num_rows:
        return []
    strata = min(_CANARY_STRATA, canary)
    starts = [index * num_rows // strata for index in range(strata)]
    sizes = [canary // strata + (index < canary % strata) for index in range(strata)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def canary_units(plan: Plan, canary: int | None) -> frozenset[int]:
    """Units that hold such rows and no others, as `cut` makes them; none where the plan was cut for another canary, or for none."""
    wanted = canary_rows(plan.num_rows, canary)
    found = [
        unit
        for unit in plan.units
        if unit.num_rows and any(rows.start <= unit.position and unit.position + unit.num_rows <= rows.stop for rows in wanted)
    ]
    whole = sum(unit.num_rows for unit in found) == sum(map(len, wanted))
    return frozenset(unit.index for unit in found) if whole else frozenset()


def cut(objects: Iterable[InputObject], *, max_tokens: int, canary: int | None = None) -> tuple[WorkUnit, ...]:
    """Row ranges of about equal work, less towards the end: small objects are joined, a giant row group is split; a canary's rows are
    units of their own.
    """
    objects = list(objects)
    groups = [group for item in objects for group in item.row_groups]
    total = sum(_tokens(group, max_tokens) for group in groups)
    edges = {edge for rows in canary_rows(sum(group.num_rows for group in groups), canary) for edge in (rows.start, rows.stop)}
    maker = _Maker(total_tokens=total, max_tokens=max_tokens, edges=sorted(edges))
    for item in objects:
        maker.add(item)
    return maker.finish()


def _tokens(group: RowGroup, max_tokens: int) -> float:
    return group.prompt_bytes / _BYTES_PER_TOKEN + group.num_rows * max_tokens


def unit_tokens(left: float, total: float) -> float:
    """How large the next unit is to be, with so many tokens left of the whole."""
    most = min(total / _MIN_UNITS, _MAX_UNIT_TOKENS)
    return min(most, max(left / _END_SHARES, _END_UNIT_TOKENS))


class _Maker:
    """Fills one unit after the other. Owns the unit being filled."""

    def __init__(self, *, total_tokens: float, max_tokens: int, edges: Sequence[int] = ()) -> None:
        """No unit goes over an edge, a position in the table."""
        self._total_tokens, self._max_tokens = total_tokens, max_tokens
        self._done_tokens, self._target_tokens = 0.0, unit_tokens(total_tokens, total_tokens)
        self._edges = deque(edge for edge in edges if edge)
        self._units: list[WorkUnit] = []
        self._ranges: list[RowRange] = []
        self._rows = self._position = 0
        self._tokens = self._bytes = 0.0

    def add(self, item: InputObject) -> None:
        start = 0
        for group in item.row_groups:
            if not group.num_rows:
                continue
            row_tokens = _tokens(group, self._max_tokens) / group.num_rows
            row_bytes = group.size_bytes / group.num_rows
            left = group.num_rows
            while left:
                edge = self._edges[0] if self._edges else math.inf
                taken = int(min(left, self._room(row_tokens, row_bytes), edge - self._position))
                if not taken:
                    self._close()
                    continue
                self._take(item, start, taken)
                self._tokens += taken * row_tokens
                self._bytes += taken * row_bytes
                start, left = start + taken, left - taken
                if self._position == edge:
                    self._edges.popleft()
                    self._close()
                elif self._room(row_tokens, row_bytes) < 1:
                    self._close()

    def finish(self) -> tuple[WorkUnit, ...]:
        if self._ranges or not self._units:  # a table without rows still gets one part, which carries the schema
            self._close()
        return tuple(self._units)

    def _room(self, row_tokens: float, row_bytes: float) -> int:
        by_tokens = max((self._target_tokens - self._tokens) / row_tokens, _MIN_UNIT_ROWS - self._rows)
        by_bytes = (_MAX_UNIT_BYTES - self._bytes) / max(row_bytes, 1.0)
        room = int(min(by_tokens, by_bytes))
        return max(room, 0 if self._rows else 1)  # one row is taken however large

    def _take(self, item: InputObject, start: int, num_rows: int) -> None:
        last = self._ranges[-1] if self._ranges else None
        if last is not None and last.uri == item.uri and last.row_stop == start:
            self._ranges[-1] = replace(last, row_stop=start + num_rows)
        else:
            rows = RowRange(uri=item.uri, identity=item.identity, row_start=start, row_stop=start + num_rows, position=self._position)
            self._ranges.append(rows)
        self._rows += num_rows
        self._position += num_rows

    def _close(self) -> None:
        self._units.append(WorkUnit(index=len(self._units), ranges=tuple(self._ranges)))
        self._done_tokens += self._tokens
        self._target_tokens = unit_tokens(self._total_tokens - self._done_tokens, self._total_tokens)
        self._ranges, self._rows = [], 0
        self._tokens = self._bytes = 0.0


def changed_since(plan: Plan, now: Callable[[str], str] = identity_of) -> list[str]:
    """Planned objects that are gone or not the same any more."""

    def is_changed(item: tuple[str, str]) -> bool:
        uri, planned = item
        try:
            return now(uri) != planned
        except (pa.ArrowException, OSError):
            return True

    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        flags = list(pool.map(is_changed, plan.objects.items()))
    return [uri for uri, flag in zip(plan.objects, flags, strict=True) if flag]
