"""A WorkUnit in, its rows out as Arrow batches in input order. Knows Parquet and storage, not prompts.

Streams: one batch in memory, row groups that hold no wanted row are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from schemas.errors import InputChanged
from schemas.errors import UnitError
from schemas.unit import RowRange
from schemas.unit import WorkUnit

_FOOTER_TAIL_BYTES = 8  # footer length (4, little-endian) and the magic number
_MAGIC = b"PAR1"
_READ_BUFFER_BYTES = 1 << 20
"""Of each column; without it a whole row group's column is held, however large."""


def identity_of(uri: str) -> str:
    """What an object is now: its etag, or size, mtime and footer digest where the store has no etags."""
    return identity_of_listed(storage.info(uri))


def identity_of_listed(item: storage.ObjectInfo) -> str:
    """The same of an object that was just listed; where the store has etags nothing is asked again."""
    if storage.scheme_of(item.uri) not in ("file", "local", "memory"):
        return item.version
    with storage.open_read(item.uri) as file:
        return f"{item.version}-{_footer_digest(file, item.size_bytes)}"


def _footer_digest(file: BinaryIO, size_bytes: int) -> str:
    if size_bytes < _FOOTER_TAIL_BYTES + len(_MAGIC):
        raise pa.ArrowInvalid(f"{size_bytes} bytes are too few for a Parquet file")
    file.seek(size_bytes - _FOOTER_TAIL_BYTES)
    tail = file.read(_FOOTER_TAIL_BYTES)
    if tail[4:] != _MAGIC:
        raise pa.ArrowInvalid("it does not end as a Parquet file does: not Parquet, or cut short")
    length = int.from_bytes(tail[:4], "little")
    if length > size_bytes - _FOOTER_TAIL_BYTES:
        raise pa.ArrowInvalid(f"its footer claims {length} bytes of {size_bytes}: cut short or damaged")
    file.seek(size_bytes - _FOOTER_TAIL_BYTES - length)
    return hashlib.sha256(file.read(length)).hexdigest()[:16]


def check_unchanged(unit: WorkUnit) -> None:
    """Raises InputChanged where an input object is not the planned one any more."""
    for uri, planned in {rows.uri: rows.identity for rows in unit.ranges}.items():
        try:
            found = identity_of(uri)
        except FileNotFoundError:
            raise InputChanged(f"unit {unit.index}: {uri} is gone since the plan was made; put it back, or start a new output") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise InputChanged(f"unit {unit.index}: {uri} cannot be read any more: {error}") from error
        if found != planned:
            raise InputChanged(
                f"unit {unit.index}: {uri} changed since the plan was made (found {found}, planned {planned}); "
                "put the old object back, or start a new output"
            )


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Raises pa.ArrowInvalid where it is no Parquet, or OSError, which has a number, where the store fails."""
    try:
        with storage.open_read(uri) as file, pq.ParquetFile(file, buffer_size=_READ_BUFFER_BYTES) as parquet:
            yield parquet
    except UnicodeDecodeError as error:  # a damaged footer's column names
        raise pa.ArrowInvalid(f"it holds a name that is not UTF-8: {error}") from error
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # Arrow's, about what it read
            raise pa.ArrowInvalid(str(error)) from error
        raise


def read_unit(unit: WorkUnit, schema: pa.Schema, batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of at most `batch_rows` rows in the given schema, each with its first row's position in the input table.

    Raises InputChanged or UnitError, naming the object.
    """
    check_unchanged(unit)
    for rows in unit.ranges:
        position = rows.position
        try:
            with open_parquet(rows.uri) as parquet:
                for batch in _read_range(parquet, rows, batch_rows):
                    yield position, conform(batch, schema)
                    position += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UnitError(f"unit {unit.index}: cannot read rows {rows.row_start} to {rows.row_stop} of {rows.uri}: {error}") from error
        found = position - rows.position
        if found != rows.num_rows:
            raise UnitError(
                f"unit {unit.index}: {rows.uri} gave {found} rows of [{rows.row_start}, {rows.row_stop}), expected {rows.num_rows}"
            )


def _read_range(parquet: pq.ParquetFile, rows: RowRange, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """The range's rows; a row group is read from its start, and what lies before the range is dropped."""
    groups, first = [], 0
    skip = None
    for index in range(parquet.metadata.num_row_groups):
        stop = first + parquet.metadata.row_group(index).num_rows
        if first < rows.row_stop and stop > rows.row_start:
            skip = rows.row_start - first if skip is None else skip
            groups.append(index)
        first = stop
    left, skip = rows.num_rows, skip or 0
    if not left:
        return
    for batch in _batches(parquet, batch_rows, groups):
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        batch = batch.slice(skip, min(left, batch.num_rows - skip))
        skip, left = 0, left - batch.num_rows
        if batch.num_rows:
            yield batch
        if not left:
            return


def _batches(parquet: pq.ParquetFile, batch_rows: int, groups: list[int]) -> Iterator[pa.RecordBatch]:
    """Streamed where Arrow can; nested dictionary columns it only reads a row group at a time."""
    if not any(_nested_dictionary(field.type) for field in parquet.schema_arrow):
        yield from parquet.iter_batches(batch_size=batch_rows, row_groups=groups)
        return
    for group in groups:
        yield from parquet.read_row_group(group).to_batches(max_chunksize=batch_rows)


def _nested_dictionary(kind: pa.DataType, depth: int = 0) -> bool:
    if pa.types.is_dictionary(kind):
        return depth > 0
    return any(_nested_dictionary(kind.field(index).type, depth + 1) for index in range(kind.num_fields))


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in the plan's schema: missing columns null, differing types cast. Raises pa.ArrowInvalid where it cannot be."""
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    if batch.schema.names == schema.names:  # by place: names may be there twice
        columns = [
            column if column.type == field.type else column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)
    columns = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        elif batch.schema.field(index).type == field.type:
            columns.append(batch.column(index))
        else:
            columns.append(batch.column(index).cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
