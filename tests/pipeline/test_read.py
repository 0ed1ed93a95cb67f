"""Reading units: the right rows, in the plan's schema, or an error that names the object."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.read import check_unchanged
from pipeline.read import conform
from pipeline.read import identity_of
from pipeline.read import open_parquet
from pipeline.read import read_unit
from schemas.errors import InputChanged
from schemas.errors import UnitError
from schemas.unit import RowRange
from schemas.unit import WorkUnit

WriteTable = Callable[..., Path]
SCHEMA = pa.schema([("x", pa.int64())])


def numbers(start: int, stop: int) -> pa.Table:
    return pa.table({"x": pa.array(range(start, stop), pa.int64())})


def unit_of(*ranges: tuple[Path | str, int, int], position: int = 0) -> WorkUnit:
    """A unit over (file, row_start, row_stop), planned as the files are now."""
    made = []
    for uri, start, stop in ranges:
        made.append(RowRange(uri=str(uri), identity=identity_of(str(uri)), row_start=start, row_stop=stop, position=position))
        position += stop - start
    return WorkUnit(index=4, ranges=tuple(made))


def values(unit: WorkUnit, batch_rows: int = 7) -> list[Any]:
    """Column x as read, after checking that every batch says where it belongs."""
    out: list[Any] = []
    for position, batch in read_unit(unit, SCHEMA, batch_rows):
        assert position == unit.position + len(out)
        assert 0 < batch.num_rows <= batch_rows
        out += batch.column("x").to_pylist()
    return out


@pytest.mark.parametrize("row_group_size", [1000, 100, 33, 1])
@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 1), (99, 100), (31, 78), (33, 66), (50, 50)])
def test_a_range_gives_its_rows_however_the_groups_lie(write_table: WriteTable, row_group_size: int, start: int, stop: int) -> None:
    path = write_table(numbers(0, 100), row_group_size=row_group_size)
    assert values(unit_of((path, start, stop), position=500)) == list(range(start, stop))


def test_ranges_split_inside_a_giant_row_group_cover_it_once(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 1000), row_group_size=10_000)
    cuts = [0, 1, 127, 128, 129, 500, 999, 1000]
    parts = [values(unit_of((path, start, stop), position=start), 128) for start, stop in itertools.pairwise(cuts)]
    assert [value for part in parts for value in part] == list(range(1000))


def test_a_unit_over_several_files_reads_them_in_its_own_order(write_table: WriteTable) -> None:
    one, two = write_table(numbers(0, 10), "in/a.parquet"), write_table(numbers(10, 20), "in/b.parquet")
    assert values(unit_of((two, 5, 10), (one, 0, 3), (two, 0, 1), position=70), 2) == [15, 16, 17, 18, 19, 0, 1, 2, 10]


def test_row_groups_without_rows_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for table in (numbers(0, 0), numbers(0, 5), numbers(0, 0), numbers(0, 0), numbers(5, 9), numbers(0, 0)):
            writer.write_table(table)
    assert pq.read_metadata(path).num_row_groups > 2
    for start, stop in ((0, 9), (4, 6), (5, 9), (8, 9)):
        assert values(unit_of((path, start, stop), position=start), 2) == list(range(start, stop))


def test_a_table_without_rows_gives_no_batch(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 0))
    assert values(unit_of((path, 0, 0))) == []
    assert list(read_unit(WorkUnit(index=0, ranges=()), SCHEMA, 10)) == []


def test_reading_from_memory_is_the_same(write_table: WriteTable) -> None:
    uri = f"memory://{uuid.uuid4().hex}/a.parquet"
    storage.create_once(uri, write_table(numbers(0, 50), row_group_size=20).read_bytes())
    assert values(unit_of((uri, 15, 45), position=15)) == list(range(15, 45))


def test_a_changed_object_is_named(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 10))
    unit = unit_of((path, 0, 10))
    write_table(numbers(0, 11))
    with pytest.raises(InputChanged, match=f"unit 4: {path} changed since the plan was made .*found .*, planned "):
        next(read_unit(unit, SCHEMA, 10))


def test_an_object_with_other_rows_but_the_same_size_and_time_is_changed(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 10), compression="none", use_dictionary=False)
    unit, stat = unit_of((path, 0, 10)), path.stat()
    write_table(numbers(1, 11), compression="none", use_dictionary=False)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(InputChanged, match=str(path)):
        check_unchanged(unit)


def test_a_changed_object_in_memory_is_named(write_table: WriteTable) -> None:
    uri = f"memory://{uuid.uuid4().hex}/a.parquet"
    storage.create_once(uri, write_table(numbers(0, 10)).read_bytes())
    unit = unit_of((uri, 0, 10))
    check_unchanged(unit)
    storage.replace(uri, write_table(numbers(0, 11)).read_bytes())
    with pytest.raises(InputChanged, match=uri):
        check_unchanged(unit)


def test_an_object_that_is_gone_is_named(write_table: WriteTable) -> None:
    one, two = write_table(numbers(0, 10), "in/a.parquet"), write_table(numbers(0, 10), "in/b.parquet")
    unit = unit_of((one, 0, 10), (two, 0, 10))
    two.unlink()
    with pytest.raises(InputChanged, match=f"unit 4: {two} is gone since the plan was made"):
        next(read_unit(unit, SCHEMA, 10))


@pytest.mark.parametrize("keep", [-1, -9, 4, 0], ids=["last byte lost", "footer lost", "only magic", "empty"])
def test_a_truncated_object_is_named(write_table: WriteTable, keep: int) -> None:
    path = write_table(numbers(0, 10))
    unit = unit_of((path, 0, 10))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputChanged, match=f"unit 4: {path} cannot be read any more: "):
        check_unchanged(unit)


def test_damaged_pages_under_a_whole_footer_are_an_error_of_the_unit(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 5000), compression="zstd", use_dictionary=False)
    unit, stat = unit_of((path, 0, 5000)), path.stat()
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # the first page's header
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UnitError, match=rf"unit 4: cannot read rows 0 to 5000 of {path}: "):
        values(unit)


def test_a_plan_that_asks_for_more_rows_than_there_are_is_an_error(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 10))
    with pytest.raises(UnitError, match=rf"unit 4: {path} gave 5 rows of \[5, 12\), expected 7"):
        values(unit_of((path, 5, 12), position=5))


def test_the_identity_stays_while_the_object_does(write_table: WriteTable) -> None:
    path = write_table(numbers(0, 10))
    assert identity_of(str(path)) == identity_of(str(path))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\xff\xff\xff\x7fPAR1"])
def test_what_is_not_parquet_has_no_identity(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(pa.ArrowInvalid):
        identity_of(str(tmp_path / "a.parquet"))


def test_a_batch_in_the_plans_schema_is_not_touched() -> None:
    batch = pa.record_batch({"x": pa.array([1], pa.int64())})
    assert conform(batch, SCHEMA) is batch


def test_a_batch_is_cast_reordered_and_filled_to_the_union() -> None:
    schema = pa.schema([("a", pa.string()), ("b", pa.int64()), ("c", pa.float64()), ("d", pa.list_(pa.int64()))], metadata={b"k": b"v"})
    batch = pa.record_batch(
        {"d": pa.array([[1]], pa.list_(pa.int32())), "b": pa.array([5], pa.int32()), "c": pa.array([1.5], pa.float32())}
    )
    made = conform(batch, schema)
    assert made.schema.equals(schema, check_metadata=True)
    assert made.to_pylist() == [{"a": None, "b": 5, "c": 1.5, "d": [1]}]


def test_a_batch_that_cannot_be_cast_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid):
        conform(pa.record_batch({"x": ["many"]}), SCHEMA)


def test_a_file_that_cannot_be_cast_is_an_error_of_the_unit(write_table: WriteTable) -> None:
    path = write_table(pa.table({"x": ["many"]}))
    with pytest.raises(UnitError, match=f"unit 4: cannot read rows 0 to 1 of {path}"):
        values(unit_of((path, 0, 1)))


def test_other_metadata_does_not_cost_columns_of_the_same_name_their_values() -> None:
    """Two columns may share a name; files of one table may differ in metadata alone (pandas writes some)."""
    fields = [pa.field("x", pa.int64()), pa.field("y", pa.int64()), pa.field("y", pa.int64())]
    batch = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], schema=pa.schema(fields, metadata={b"writer": b"b"}))
    made = conform(batch, pa.schema(fields, metadata={b"writer": b"a"}))
    assert [column.to_pylist() for column in made.columns] == [[1], [2], [3]]


def test_columns_of_every_kind_come_as_they_are(write_table: WriteTable) -> None:
    table = pa.table(
        {
            "dictionary": pa.array(["a", "b", "a", None]).dictionary_encode(),
            "decimal": pa.array([1, 2, None, 4], pa.decimal128(12, 3)),
            "when": pa.array([1, 2, 3, None], pa.timestamp("us", tz="Asia/Tokyo")),
            "large": pa.array(["x", None, "z", ""], pa.large_string()),
            "nested": pa.array([[{"a": [1, 2]}], [], None, [{"a": None}]], pa.list_(pa.struct([("a", pa.list_(pa.int16()))]))),
            "map": pa.array([[("k", 1)], [], None, [("k", None)]], pa.map_(pa.string(), pa.int64())),
            "nothing": pa.nulls(4),
        }
    )
    path = write_table(table, row_group_size=3)
    batches = [batch for _, batch in read_unit(unit_of((path, 1, 4)), table.schema, 2)]
    assert pa.Table.from_batches(batches).equals(table.slice(1))


def test_an_opened_file_is_closed_again(write_table: WriteTable) -> None:
    with open_parquet(str(write_table(numbers(0, 3)))) as parquet:
        assert parquet.metadata.num_rows == 3
    assert parquet.closed
