"""EarlierParts: rows of earlier outputs' parts, in the columns that a job adds. A part that unit after unit asks for is kept on this disk.

A table in its old order asks a part once or twice. In a shuffled one every unit's answers lie in every part, and all of a part's pages
would be fetched and decoded once for each unit.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from pipeline import storage
from pipeline.answered import Source
from pipeline.commit import concat
from pipeline.commit import read_report
from pipeline.model import cache_folder
from pipeline.read import open_parquet
from schemas.errors import ForeignOutput
from schemas.unit import part_name

_READS = 2
"""Of a part from its store, before it is kept: as many as a table in its old order takes, cut at other rows."""
_FREE_SHARE = 0.25
"""Of the disk, that is left free."""

Group = tuple[range, Callable[[], pa.Table]]
"""Rows of a part that lie together, and what reads them."""


class EarlierParts:
    """For one job. Safe from several threads. What is kept has no name on the disk, and goes with the process, however that ends."""

    def __init__(self, folder: Path | None = None) -> None:
        """Kept in the folder, by default the one for what may be lost."""
        self._folder = folder
        self._lock = threading.Lock()
        self._asked: Counter[tuple[Source, int]] = Counter()
        self._locks: dict[tuple[Source, int], threading.Lock] = {}
        self._kept: dict[tuple[Source, int], tuple[Group, ...]] = {}
        self._may_keep = True

    def __len__(self) -> int:
        """Parts that are kept."""
        return len(self._kept)

    def read(self, source: Source, unit: int, rows: Sequence[int], prefix: str, schema: pa.Schema) -> pa.RecordBatch | None:
        """See read_rows; rows are in order."""
        part = (source, unit)
        with self._lock:
            self._asked[part] += 1
            often, lock = self._asked[part] > _READS, self._locks.setdefault(part, threading.Lock())
        if often:
            with lock:  # others that want this part wait for it
                if part not in self._kept and self._may_keep:
                    self._keep(part, prefix, schema)
        kept = self._kept.get(part)
        return read_rows(source, unit, rows, prefix, schema) if kept is None else _pick(kept, rows, schema)

    def _keep(self, part: tuple[Source, int], prefix: str, schema: pa.Schema) -> None:
        folder = self._folder or cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            usage = shutil.disk_usage(folder)
            if usage.free > _FREE_SHARE * usage.total:
                self._kept[part] = _copied(*part, prefix, schema, folder)
        except (FileNotFoundError, ForeignOutput, pa.ArrowException, KeyError):
            return  # no such part, as reading it will say
        except OSError:  # whether this disk or the store failed: everything is still read from the store
            self._may_keep = False


def read_rows(source: Source, unit: int, rows: Sequence[int], prefix: str, schema: pa.Schema) -> pa.RecordBatch | None:
    """The added columns of a part's rows, named with `prefix` and in this schema; None where that part is not there or not it.

    Rows are in order. Raises OSError where the store fails.
    """
    try:
        with _open_part(source, unit, prefix, schema) as groups:
            return _pick(groups, rows, schema)
    except (FileNotFoundError, ForeignOutput, pa.ArrowException, KeyError):
        return None


def _pick(groups: Sequence[Group], rows: Sequence[int], schema: pa.Schema) -> pa.RecordBatch | None:
    """None where there are not so many rows."""
    if rows and (not groups or rows[-1] >= groups[-1][0].stop):
        return None
    batches = [pa.RecordBatch.from_pylist([], schema=schema)]
    for span, load in groups:
        inside = [row - span.start for row in rows[bisect_left(rows, span.start) : bisect_left(rows, span.stop)]]
        if inside:
            batches += load().take(inside).combine_chunks().to_batches()
    return concat(*batches)


@contextmanager
def _open_part(source: Source, unit: int, prefix: str, schema: pa.Schema) -> Iterator[tuple[Group, ...]]:
    """Its row groups. Raises FileNotFoundError, ForeignOutput, KeyError or pa.ArrowException where that part is not there or not it."""
    uri = storage.join(source.uri, part_name(unit, source.fingerprint))
    names = [source.prefix + name.removeprefix(prefix) for name in schema.names]
    report = read_report(uri)
    if (report.unit, report.fingerprint) != (unit, source.fingerprint):
        raise ForeignOutput(f"{uri} says that it is unit {report.unit} of {report.fingerprint[:8]}")
    with open_parquet(uri) as parquet:

        def load(group: int) -> pa.Table:
            table = parquet.read_row_group(group, columns=names, use_threads=False).select(names)
            return table.replace_schema_metadata(None).rename_columns(schema.names).cast(schema)

        sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        yield _groups(sizes, load)


def _copied(source: Source, unit: int, prefix: str, schema: pa.Schema, folder: Path) -> tuple[Group, ...]:
    """The part's row groups, uncompressed in a file of which only the pages that are asked for are in memory. Raises OSError too."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="earlier-") as file:
        with _open_part(source, unit, prefix, schema) as groups, pa.ipc.new_file(file.name, schema) as writer:
            for _, load in groups:
                writer.write_batch(concat(*load().combine_chunks().to_batches()))
        with pa.memory_map(file.name) as mapped:  # which batches hold on to, when the file is closed and has no name any more
            reader = pa.ipc.open_file(mapped)
            tables = [pa.Table.from_batches([reader.get_batch(number)]) for number in range(reader.num_record_batches)]
    return _groups([table.num_rows for table in tables], tables.__getitem__)


def _groups(sizes: Sequence[int], load: Callable[[int], pa.Table]) -> tuple[Group, ...]:
    groups: list[Group] = []
    first = 0
    for number, size in enumerate(sizes):
        groups.append((range(first, first + size), lambda number=number: load(number)))  # type: ignore[misc]
        first += size
    return tuple(groups)
