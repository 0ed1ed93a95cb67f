"""Tables in a notebook's memory to Parquet objects named by their content, so that the same table again is the same input.

A dask dataframe's partitions are computed one by one, once each, and wait on this machine's disk until all their names are known.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from schemas import layout
from schemas.errors import JobError

_ROWS_PER_GROUP = 65_536
_DIGEST_CHARACTERS = 16


def is_table(value: object) -> bool:
    """Whether it is one that `stage` takes: pyarrow, pandas, polars, or a dask dataframe."""
    return isinstance(value, pa.Table | pa.RecordBatch) or _kind(value) is not None


def stage(table: Any, output: str) -> str:
    """Write it below the output's own folder, where it is not yet; the URI to read.

    Raises JobError where it has no rows or columns, or its partitions have no type in common.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmill-") as spool:
        parts, schema = _spooled(table, Path(spool))
        total = hashlib.sha256()
        for part in parts:
            total.update(part.digest.encode())
        folder = storage.join(storage.absolute(output), f"{layout.STAGED}/{total.hexdigest()[:_DIGEST_CHARACTERS]}")
        there = storage.list_names(folder)
        for index, part in enumerate(parts):
            name = f"{index:05d}-{part.digest[:_DIGEST_CHARACTERS]}.parquet"
            if name not in there:
                storage.replace(storage.join(folder, name), _parquet_as(part, schema, index))
    return folder


@dataclass(frozen=True, slots=True)
class _Part:
    """One partition that waits on the disk."""

    path: Path
    digest: str
    schema: pa.Schema


def _spooled(table: Any, folder: Path) -> tuple[list[_Part], pa.Schema]:
    """Each partition's file, and the types that all of them fit into."""
    parts: list[_Part] = []
    schema, num_rows = None, 0
    for index, part in enumerate(_tables(table)):
        part = part.replace_schema_metadata(None)
        if not part.num_columns:
            raise JobError("input: the table has no columns")
        schema = part.schema if schema is None else unified(schema, part.schema, index)
        path = folder / f"{index:05d}"
        pq.write_table(part, path, compression="zstd", row_group_size=_ROWS_PER_GROUP)
        parts.append(_Part(path, _digest(part), part.schema))
        num_rows += part.num_rows
    if schema is None or not num_rows:
        raise JobError("input: the table has no rows")
    return parts, schema


def unified(schema: pa.Schema, found: pa.Schema, index: int) -> pa.Schema:
    """What the partitions so far and this one fit into: a column of nulls into any, whole numbers into larger ones or fractions."""
    if found.names != schema.names:
        raise JobError(f"input: partition {index} has the columns {', '.join(found.names)}; those before it have {', '.join(schema.names)}")
    fields: list[pa.Field[Any]] = []
    for mine, other in zip(schema, found, strict=True):
        try:
            fields += pa.unify_schemas([pa.schema([mine]), pa.schema([other])], promote_options="permissive")
        except pa.ArrowException:
            raise JobError(_two_types(mine.name, other.type, index, mine.type)) from None
    return pa.schema(fields)


def _parquet_as(part: _Part, schema: pa.Schema, index: int) -> bytes:
    if part.schema.equals(schema):
        return part.path.read_bytes()
    with pq.ParquetFile(part.path) as file:
        table = file.read()
    columns = []
    for field, column in zip(schema, table.columns, strict=True):
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException:
            raise JobError(_two_types(field.name, column.type, index, field.type)) from None
    return _parquet(pa.table(columns, schema=schema))


def _two_types(name: str, found: pa.DataType, index: int, others: pa.DataType) -> str:
    return (
        f"input: column {name!r} is {found} in partition {index} and {others} in others; give it one type, "
        f'as in df.astype({{{name!r}: "string"}})'
    )


def _kind(value: object) -> str | None:
    """By the class's home, so that nothing is imported that a notebook did not import."""
    for kind in type(value).__mro__:
        top = kind.__module__.split(".")[0]
        if kind.__name__ in ("DataFrame", "LazyFrame") and top in ("pandas", "polars", "dask", "dask_expr"):
            return "polars-lazy" if kind.__name__ == "LazyFrame" else top
    return None


def _tables(value: Any) -> Iterator[pa.Table]:
    """One for each partition."""
    kind = _kind(value)
    if isinstance(value, pa.RecordBatch):
        yield pa.Table.from_batches([value])
    elif isinstance(value, pa.Table):
        yield value
    elif kind == "pandas":
        yield _from_pandas(value)
    elif kind == "polars":
        yield value.to_arrow()
    elif kind == "polars-lazy":
        yield value.collect().to_arrow()
    else:  # a dask dataframe
        for partition in value.partitions:
            yield _from_pandas(partition.compute())


def _from_pandas(frame: Any) -> pa.Table:
    """Raises JobError where a column holds what no one type has room for."""
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise JobError(f"input: {'; '.join(map(str, error.args))}") from None


def _digest(table: pa.Table) -> str:
    """Of schema and values, whatever chunks they lie in."""
    whole = table.combine_chunks().replace_schema_metadata(None)
    digest = hashlib.sha256()
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, whole.schema) as stream:
        for batch in whole.to_batches(max_chunksize=_ROWS_PER_GROUP):
            stream.write_batch(batch)
    digest.update(sink.getbuffer())
    return digest.hexdigest()


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return sink.getvalue()
