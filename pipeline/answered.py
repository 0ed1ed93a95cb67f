"""Answered: where earlier outputs hold the answers to requests, by key. Lies in the output as one object, made by the driver.

An index that is not there or cannot be understood counts as empty: rows are generated as if there were no earlier output.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.answerer import KEY_BYTES

_META = b"tokenmill.answered"
_KEY_TYPE = f"S{KEY_BYTES}"
"""numpy's comparison takes zeros at the end for nothing, which changes no comparison between keys of one length."""
_FIELDS: list[pa.Field[Any]] = [
    pa.field("key", pa.binary(KEY_BYTES)),
    pa.field("source", pa.int32()),
    pa.field("unit", pa.int32()),
    pa.field("row", pa.int32()),
]
_SCHEMA = pa.schema(_FIELDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An earlier output."""

    uri: str
    fingerprint: str
    prefix: str
    """Of its added columns."""


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """A row of a part of an earlier output."""

    source: int
    """Its number among the sources."""
    unit: int
    row: int
    """In the part, from 0."""


class Answered:
    """A value: keys in order, and the place of each."""

    def __init__(self, sources: Sequence[Source], keys: Any, places: Any) -> None:
        """Keys are an array of 16 bytes each, in order; places an array of source, unit and row."""
        self.sources = tuple(sources)
        self._keys, self._places = keys, places  # (num_keys), (num_keys, 3)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """The place of each, or None."""
        if not len(self) or not keys:
            return [None] * len(keys)
        wanted = np.frombuffer(b"".join(keys), dtype=_KEY_TYPE)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self) - 1)
        known = self._keys[at] == wanted
        rows = self._places[at].tolist()
        return [Place(*row) if found else None for found, row in zip(known.tolist(), rows, strict=True)]

    def to_parquet(self) -> bytes:
        arrays: list[pa.Array[Any]] = [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(self), [None, pa.py_buffer(self._keys.tobytes())]),
            *(pa.array(np.ascontiguousarray(self._places[:, column]), pa.int32()) for column in range(3)),
        ]
        meta = json.dumps([asdict(source) for source in self.sources]).encode()
        table = pa.Table.from_arrays(arrays, schema=_SCHEMA).replace_schema_metadata({_META: meta})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> Answered:
        """Raises ValueError, KeyError, TypeError, OSError or pa.ArrowException where it is no index."""
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        if table.schema.names != _SCHEMA.names or table.schema.field("key").type != _SCHEMA.field("key").type:
            raise ValueError(f"its columns are {', '.join(table.schema.names)}")
        sources = [Source(**source) for source in json.loads((table.schema.metadata or {})[_META])]
        column = pa.concat_arrays(table.column("key").chunks) if table.num_rows else pa.array([], pa.binary(KEY_BYTES))
        keys = np.frombuffer(memoryview(column.buffers()[1] or b""), dtype=_KEY_TYPE)[column.offset : column.offset + len(column)]
        places = np.column_stack([table.column(name).to_numpy() for name in ("source", "unit", "row")]).astype(np.int32)
        if len(keys) != table.num_rows or (places.size and (places.min() < 0 or places[:, 0].max() >= len(sources))):
            raise ValueError("it names places that there are not")
        return cls(sources, keys, places)


def merge(sources: Sequence[Source], found: Iterable[tuple[int, int, bytes, Sequence[int]]]) -> Answered:
    """Of (source, unit, keys one after the other, their rows): the index, in which a key's first place counts."""
    keys, places = [], []
    for source, unit, joined, rows in found:
        keys.append(joined)
        block = np.empty((len(rows), 3), dtype=np.int32)
        block[:, 0], block[:, 1], block[:, 2] = source, unit, rows
        places.append(block)
    all_keys = np.frombuffer(b"".join(keys), dtype=_KEY_TYPE)
    all_places = np.concatenate(places) if places else np.empty((0, 3), dtype=np.int32)
    once, first = np.unique(all_keys, return_index=True)  # the first of equal ones, as the order of places has it
    return Answered(sources, once, all_places[first])


class Indexes:
    """The index that units asked for last, which is loaded once. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uri, self._index = "", Answered((), np.empty(0, dtype=_KEY_TYPE), np.empty((0, 3), dtype=np.int32))

    def get(self, uri: str) -> Answered:
        """Raises OSError where the store fails."""
        with self._lock:
            if self._uri != uri:
                self._index, self._uri = read_index(uri) or Answered((), np.empty(0, dtype=_KEY_TYPE), np.empty((0, 3))), uri
            return self._index


def read_index(uri: str) -> Answered | None:
    """None where there is none, or one that cannot be understood. Raises OSError where the store fails."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        return Answered.from_parquet(data)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
