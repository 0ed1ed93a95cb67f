"""Tables in a notebook's memory to Parquet objects named by their content, so that the same table again is the same input."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
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
    """Write it below the output's own folder, where it is not yet; the URI to read. Raises JobError where it has no rows or columns."""
    parts = list(_tables(table))
    if not parts or not parts[0].num_columns:
        raise JobError("input: the table has no columns")
    if not sum(part.num_rows for part in parts):
        raise JobError("input: the table has no rows")
    schema = parts[0].schema
    total = hashlib.sha256()
    made: list[tuple[str, bytes]] = []
    for index, part in enumerate(parts):
        digest = _digest(part.cast(schema))
        total.update(digest.encode())
        made.append((f"{index:05d}-{digest[:_DIGEST_CHARACTERS]}.parquet", _parquet(part.cast(schema))))
    folder = storage.join(storage.absolute(output), f"{layout.STAGED}/{total.hexdigest()[:_DIGEST_CHARACTERS]}")
    there = storage.list_names(folder)
    for name, data in made:
        if name not in there:
            storage.replace(storage.join(folder, name), data)
    return folder


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
        yield pa.Table.from_pandas(value, preserve_index=False)
    elif kind == "polars":
        yield value.to_arrow()
    elif kind == "polars-lazy":
        yield value.collect().to_arrow()
    else:  # a dask dataframe: one partition in memory at a time
        for partition in value.partitions:
            yield pa.Table.from_pandas(partition.compute(), preserve_index=False)


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
