"""A set checker in Jepsen's manner: input objects and an output folder in; lost, doubled, foreign, misplaced and changed rows out.

It shares no code with what it judges: no schemas, no pipeline, no jobs; pyarrow and fsspec alone. It knows of the output only
what any reader knows: the Parquet files directly in the folder, in name order, hidden names left out, are one table whose rows
are the input's in the input's order, each with the input's columns and a completion or an error.

It asks one thing of the table: a column of integers that ascend (`key`). That makes the check a merge of two ascending streams:
memory is one batch of each, and one entry for each row that is not in its place. `History` watches the same folder over time: a
part that was seen once never changes and never goes.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

_BATCH_ROWS = 4096
_MAX_NAMED = 5
"""Rows named of each kind of damage; all are counted."""


@dataclass(slots=True)
class Kind:
    """One kind of damage: how many rows, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, count: int = 1) -> None:
        self.count += count
        if len(self.first) < _MAX_NAMED:
            self.first.append(where)


@dataclass(slots=True)
class Findings:
    """What became of a set of rows. Fine only without damage of any kind."""

    rows_in: int = 0
    rows_out: int = 0
    parts: int = 0
    completions: int = 0
    error_rows: int = 0
    lost: Kind = field(default_factory=Kind)
    """Input rows that no part holds."""
    doubled: Kind = field(default_factory=Kind)
    """Output rows beyond an input row's first."""
    foreign: Kind = field(default_factory=Kind)
    """Output rows that no input row is the origin of."""
    misplaced: Kind = field(default_factory=Kind)
    """Rows that come after one that the input has behind them."""
    changed: Kind = field(default_factory=Kind)
    """Rows whose input columns differ from the input's."""
    unanswered: Kind = field(default_factory=Kind)
    """Rows with neither completion nor error."""
    contradictory: Kind = field(default_factory=Kind)
    """Rows with both."""
    unreadable: Kind = field(default_factory=Kind)
    """Parts that Parquet cannot read, or whose columns are not the input's and the added ones."""

    @property
    def damage(self) -> dict[str, int]:
        """Counts by kind, of those that occurred."""
        return {name: kind.count for name, kind in self._kinds().items() if kind.count}

    @property
    def fine(self) -> bool:
        return not self.damage and self.rows_in == self.rows_out

    def describe(self) -> str:
        """For a failed test's message."""
        lines = [f"{self.rows_out} rows in {self.parts} parts out of {self.rows_in} input rows"]
        lines += [f"{name}: {kind.count} ({'; '.join(kind.first)})" for name, kind in self._kinds().items() if kind.count]
        return "\n".join(lines)

    def _kinds(self) -> dict[str, Kind]:
        return {name: value for name in self.__slots__ if isinstance(value := getattr(self, name), Kind)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One row of either side; `place` is the position in the input, or part and row in the output."""

    key: int | None
    place: str
    digest: bytes
    answered: bool = False
    failed: bool = False


def check(input_uri: str, out_uri: str, *, key: str = "id", prefix: str = "") -> Findings:
    """Compare all rows of the input (a folder, a glob or a file) with all rows of the output."""
    return _Merge(input_uri, out_uri, key, prefix).run()


def read_part_tokens(out_uri: str, *, prefix: str = "") -> int:
    """Completion tokens of all parts."""
    tokens = 0
    for uri in _parts(out_uri):
        with _parquet(uri) as part:
            column = f"{prefix}completion_tokens"
            tokens += sum(sum(batch.column(column).to_pylist()) for batch in part.iter_batches(_BATCH_ROWS, columns=[column]))
    return tokens


class _Merge:
    """Two ascending streams, walked side by side. Owns what is out of its place."""

    def __init__(self, input_uri: str, out_uri: str, key: str, prefix: str) -> None:
        self._objects, self._out_uri, self._key, self._prefix = _objects(input_uri), out_uri, key, prefix
        if not self._objects:
            raise ValueError(f"{input_uri} names no Parquet object; the checker needs the input")
        with _parquet(self._objects[0]) as first:
            self._columns: list[tuple[str, pa.DataType]] = [(item.name, item.type) for item in first.schema_arrow]
        self._skipped: dict[int, _Row] = {}  # input rows that the output has gone past: lost, or still to come
        self._extra: list[_Row] = []  # output rows behind the input's place that nobody waits for: doubled or foreign
        self.found = Findings()

    def run(self) -> Findings:
        inputs = self._input_rows()
        ahead = next(inputs, None)
        for row in self._output_rows():
            while ahead is not None and row.key is not None and ahead.key is not None and ahead.key < row.key:
                self._skipped[ahead.key] = ahead
                ahead = next(inputs, None)
            if ahead is not None and row.key == ahead.key:
                self._same(ahead, row)
                ahead = next(inputs, None)
            elif row.key is not None and row.key in self._skipped:
                self._same(self._skipped.pop(row.key), row)
                self.found.misplaced.add(f"key {row.key} at {row.place}")
            else:
                self._extra.append(row)
        while ahead is not None:
            self.found.lost.add(f"key {ahead.key}, {ahead.place}")
            ahead = next(inputs, None)
        for left in self._skipped.values():
            self.found.lost.add(f"key {left.key}, {left.place}")
        self._tell_doubled_from_foreign()
        return self.found

    def _same(self, ours: _Row, theirs: _Row) -> None:
        if ours.digest != theirs.digest:
            self.found.changed.add(f"key {ours.key}, {ours.place}, at {theirs.place}")

    def _tell_doubled_from_foreign(self) -> None:
        """A second walk over the input, only where there is something to tell."""
        if not self._extra:
            return
        wanted = {row.key for row in self._extra}
        known = {row.key for row in self._rows_of_input() if row.key in wanted}
        for row in self._extra:
            kind = self.found.doubled if row.key in known else self.found.foreign
            kind.add(f"key {row.key} at {row.place}")

    def _input_rows(self) -> Iterator[_Row]:
        last: int | None = None
        for row in self._rows_of_input():
            if row.key is None or (last is not None and row.key <= last):
                raise ValueError(f"column {self._key!r} does not ascend at {row.place} of the input, which this checker needs")
            last = row.key
            self.found.rows_in += 1
            yield row

    def _rows_of_input(self) -> Iterator[_Row]:
        position = 0
        for uri in self._objects:
            with _parquet(uri) as parquet:
                for batch in parquet.iter_batches(_BATCH_ROWS):
                    for key, digest in zip(batch.column(self._key).to_pylist(), _digests(batch, len(self._columns)), strict=True):
                        yield _Row(key=key, place=f"row {position}", digest=digest)
                        position += 1

    def _output_rows(self) -> Iterator[_Row]:
        for uri in _parts(self._out_uri):
            name = uri.rsplit("/", 1)[-1]
            self.found.parts += 1
            try:
                yield from self._rows_of_part(uri, name)
            except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
                self.found.unreadable.add(f"{name}: {type(error).__name__}: {str(error)[:200]}")

    def _rows_of_part(self, uri: str, name: str) -> Iterator[_Row]:
        with _parquet(uri) as parquet:
            columns = [(item.name, item.type) for item in parquet.schema_arrow]
            if columns[: len(self._columns)] != self._columns:
                raise pa.ArrowInvalid(f"its columns begin {columns[: len(self._columns)]}, the input's are {self._columns}")
            number = 0
            for batch in parquet.iter_batches(_BATCH_ROWS):
                answered = batch.column(f"{self._prefix}completion").is_valid().to_pylist()
                failed = batch.column(f"{self._prefix}error").is_valid().to_pylist()
                keys = batch.column(self._key).to_pylist()
                for key, digest, has_text, has_error in zip(keys, _digests(batch, len(self._columns)), answered, failed, strict=True):
                    row = _Row(key=key, place=f"{name} row {number}", digest=digest, answered=has_text, failed=has_error)
                    self._count(row)
                    yield row
                    number += 1

    def _count(self, row: _Row) -> None:
        found = self.found
        found.rows_out += 1
        found.completions += row.answered
        found.error_rows += row.failed
        if row.answered and row.failed:
            found.contradictory.add(f"key {row.key} at {row.place}")
        elif not (row.answered or row.failed):
            found.unanswered.add(f"key {row.key} at {row.place}")


def _digests(batch: pa.RecordBatch, num_columns: int) -> Iterator[bytes]:
    """Of each row's first columns, by what their values look like: NaN is NaN, a dictionary's entry is its value."""
    columns = [_values(batch.column(index)) for index in range(num_columns)]
    for values in zip(*columns, strict=True):
        yield hashlib.blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # nanoseconds, text that is none: their bytes will do
        values = [repr(scalar.as_buffer().to_pybytes()) if hasattr(scalar, "as_buffer") else str(scalar) for scalar in column]
    return values


class History:
    """What was ever seen of an output's parts. `look` as often as you like, from one thread; `watch` does it beside your own."""

    def __init__(self, out_uri: str) -> None:
        self._out_uri = out_uri
        self._marks: dict[str, str] = {}
        self._lock = threading.Lock()
        self.seen_at: dict[str, float] = {}
        """Monotonic seconds of each part's first sight."""
        self.changed: dict[str, list[str]] = {}
        """Every mark that a part had, of those with more than one."""
        self.vanished: set[str] = set()
        self.looks = 0

    @property
    def fine(self) -> bool:
        return not self.changed and not self.vanished

    def describe(self) -> str:
        return f"changed after commit: {sorted(self.changed)}; vanished: {sorted(self.vanished)}; {len(self._marks)} parts seen"

    def look(self) -> None:
        """Compare what is there with all that ever was."""
        now, there = time.monotonic(), _marks(self._out_uri)
        with self._lock:
            self.looks += 1
            for name, mark in there.items():
                before = self._marks.setdefault(name, mark)
                self.seen_at.setdefault(name, now)
                if before != mark and mark not in self.changed.setdefault(name, [before]):
                    self.changed[name].append(mark)
            self.vanished |= set(self._marks) - set(there)

    def forget(self, name: str) -> None:
        """A part that the test itself took away."""
        with self._lock:
            self._marks.pop(name, None)
            self.seen_at.pop(name, None)
            self.vanished.discard(name)

    @property
    def parts(self) -> int:
        """Ever seen."""
        return len(self._marks)

    @contextmanager
    def watch(self, every_s: float = 0.2) -> Iterator[History]:
        """Look all the time until the block ends, and once more then."""
        end = threading.Event()
        trouble: list[BaseException] = []

        def loop() -> None:
            try:
                while not end.wait(every_s):
                    self.look()
            except Exception as error:  # the thread's outermost; a watcher that stopped has seen nothing
                trouble.append(error)

        thread = threading.Thread(target=loop, name="history", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            end.set()
            thread.join()
        self.look()
        if trouble:
            raise trouble[0]


def _marks(out_uri: str) -> dict[str, str]:
    """Each part's etag where the store has one, else its content's digest."""
    fs, path = _filesystem(out_uri)
    marks = {}
    for details in _listed(fs, path):
        name = str(details["name"])
        mark = details.get("etag") or details.get("ETag")
        if not mark:
            try:
                mark = hashlib.sha256(fs.cat_file(name)).hexdigest()
            except FileNotFoundError:
                continue  # gone since the listing: the next look says so
        marks[name.rsplit("/", 1)[-1]] = str(mark)
    return marks


def _filesystem(uri: str) -> tuple[Any, str]:
    options: dict[str, Any] = {} if uri.startswith(("/", "file:", "memory:")) else {"use_listings_cache": False}
    if uri.startswith(("az:", "abfss:")) and (connection := os.environ.get("AZURE_STORAGE_CONNECTION_STRING")):
        options["connection_string"] = connection  # else fsspec hands out the instance made for an earlier account
    fs, path = url_to_fs(uri, **options)
    return fs, str(path)


def _listed(fs: Any, path: str) -> list[dict[str, Any]]:
    """The Parquet files directly in a folder, hidden names left out, by name."""
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return []
    names = {str(item["name"]): item for item in found if item["type"] == "file"}
    return [
        item for name, item in sorted(names.items()) if name.endswith(".parquet") and not name.rsplit("/", 1)[-1].startswith((".", "_"))
    ]


def _parts(out_uri: str) -> Iterable[str]:
    fs, path = _filesystem(out_uri)
    return [_like(out_uri, str(item["name"])) for item in _listed(fs, path)]


def _objects(uri: str) -> list[str]:
    """A folder's Parquet files, a glob's, or the one file, in name order."""
    fs, path = _filesystem(uri)
    found = fs.glob(path) if "*" in path else fs.find(path) if fs.isdir(path) else [path]
    return [_like(uri, name) for name in sorted(map(str, found)) if name.endswith(".parquet")]


def _like(uri: str, path: str) -> str:
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme in ("file", "local"):
        return path
    place = rest.split("/", 1)[0]
    if "@" in place:  # container@account
        return f"{scheme}://{place}/{path.split('/', 1)[1]}"
    return f"{scheme}://{path.lstrip('/')}"


@contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Whole in memory: parts are at most some tens of MB, and an object that changes under the reader is not the checker's riddle."""
    fs, path = _filesystem(uri)
    with pq.ParquetFile(pa.BufferReader(fs.cat_file(path))) as parquet:
        yield parquet
