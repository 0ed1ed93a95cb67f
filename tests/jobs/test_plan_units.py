"""cut and Plan as values: every row once, in order, in units of bearable size. No files, no engine."""

from __future__ import annotations

import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jobs.plan import InputObject
from jobs.plan import Plan
from jobs.plan import RowGroup
from jobs.plan import changed_since
from jobs.plan import cut
from jobs.plan import unit_tokens
from schemas.unit import RowRange
from schemas.unit import WorkUnit

_SCHEMA = pa.schema([("prompt", pa.string())])
_MIB = 1 << 20


def an_object(uri: str, *groups: tuple[int, int], prompt_bytes: int = 0) -> InputObject:
    """Groups are (rows, bytes in all)."""
    made = tuple(RowGroup(num_rows=rows, size_bytes=size, prompt_bytes=prompt_bytes) for rows, size in groups)
    return InputObject(uri=uri, identity=f"identity of {uri}", row_groups=made, schema=_SCHEMA)


def rows_of(units: tuple[WorkUnit, ...]) -> list[tuple[int, str, int]]:
    """Every row as (position, object, row in it), in the order of the units."""
    return [(part.position + row, part.uri, part.row_start + row) for unit in units for part in unit.ranges for row in range(part.num_rows)]


def rows_in(objects: list[InputObject]) -> list[tuple[int, str, int]]:
    """The same, of the table."""
    rows = [(item.uri, row) for item in objects for row in range(item.num_rows)]
    return [(position, uri, row) for position, (uri, row) in enumerate(rows)]


def test_the_same_objects_give_the_same_units() -> None:
    objects = [an_object(f"{index}.parquet", (700, 9_000), (3, 90)) for index in range(5)]
    assert cut(objects, max_tokens=64) == cut(iter(objects), max_tokens=64)


def test_many_small_files_are_joined_into_one_unit() -> None:
    units = cut([an_object(f"{index:02d}.parquet", (4, 400)) for index in range(8)], max_tokens=10)
    assert [[part.uri for part in unit.ranges] for unit in units] == [
        ["00.parquet", "01.parquet", "02.parquet", "03.parquet"],
        ["04.parquet", "05.parquet", "06.parquet", "07.parquet"],
    ]


def test_a_giant_row_group_is_split() -> None:
    units = cut([an_object("big.parquet", (64_000, 9 * _MIB))], max_tokens=100)
    assert [len(unit.ranges) for unit in units] == [1] * 32
    assert {unit.num_rows for unit in units} == {2000}


def test_a_giant_job_is_cut_into_units_of_bounded_tokens() -> None:
    units = cut([an_object("big.parquet", (10_000_000, 10_000 * _MIB))], max_tokens=1000)
    assert max(unit.num_rows * 1000 for unit in units) <= 4_000_000


def test_a_large_table_is_cut_finer_towards_its_end_so_that_all_replicas_end_together() -> None:
    """A million rows of a thousand tokens: for a rack of 72 a unit at its beginning is a minute's work, at its end four seconds'."""
    rows = [unit.num_rows for unit in cut([an_object("big.parquet", (1_000_000, 1000 * _MIB))], max_tokens=1000)]
    assert rows[0] == 4000
    assert rows[-2] == 250
    assert rows == sorted(rows, reverse=True)
    assert sum(rows) == 1_000_000
    assert len(rows) < 3 * 1_000_000 / 4000


def test_a_table_that_is_cut_finer_anyway_is_cut_evenly() -> None:
    for left in (1.0, 1e6, 8e6):
        assert unit_tokens(left, 8e6) == 250_000
        assert unit_tokens(left, 3.2e6) == 100_000


def test_neighbouring_row_groups_of_one_file_are_one_range() -> None:
    (unit,) = cut([an_object("a.parquet", (5, 50), (5, 50), (5, 50))], max_tokens=10)
    assert [(part.row_start, part.row_stop) for part in unit.ranges] == [(0, 15)]


def test_huge_rows_get_a_unit_each() -> None:
    units = cut([an_object("huge.parquet", (5, 500 * _MIB))], max_tokens=10)
    assert [unit.num_rows for unit in units] == [1] * 5


def test_large_rows_are_bounded_by_bytes() -> None:
    units = cut([an_object("large.parquet", (30, 300 * _MIB))], max_tokens=10)
    assert [unit.num_rows for unit in units] == [6] * 5


def test_long_prompts_count_as_work() -> None:
    short, long = an_object("short.parquet", (3200, 100)), an_object("long.parquet", (3200, 100), prompt_bytes=3200 * 4 * 900)
    units = cut([short, long], max_tokens=100)
    assert sum(len(unit.ranges) for unit in units if unit.ranges[0].uri == "long.parquet") > 20
    assert sum(len(unit.ranges) for unit in units if unit.ranges[0].uri == "short.parquet") < 6


def test_row_groups_without_rows_are_passed_over() -> None:
    objects = [an_object("a.parquet", (0, 0), (3, 30), (0, 0)), an_object("b.parquet", (0, 0)), an_object("c.parquet", (2, 20), (0, 0))]
    (unit,) = cut(objects, max_tokens=10)
    assert [(part.uri, part.row_start, part.row_stop, part.position) for part in unit.ranges] == [
        ("a.parquet", 0, 3, 0),
        ("c.parquet", 0, 2, 3),
    ]


def test_a_table_without_rows_gives_one_empty_unit() -> None:
    assert cut([an_object("a.parquet", (0, 0)), an_object("b.parquet")], max_tokens=10) == (WorkUnit(index=0, ranges=()),)


def test_no_unit_names_an_object_of_which_it_has_no_row() -> None:
    """Such a unit would fail when that object changes."""
    objects = [an_object("a.parquet", (16, 160)), an_object("b.parquet", (7, 70), prompt_bytes=2084)]
    units = cut(objects, max_tokens=1)
    assert [[part.uri for part in unit.ranges] for unit in units] == [["a.parquet"], ["b.parquet"]]


_GROUP = st.tuples(
    st.one_of(st.integers(0, 40), st.integers(0, 800)),
    st.one_of(st.integers(0, 10_000), st.integers(0, 400 * _MIB)),
    st.integers(0, 100_000),
)


@settings(max_examples=60, deadline=None)
@given(files=st.lists(st.lists(_GROUP, max_size=4), min_size=1, max_size=6), max_tokens=st.integers(1, 4096))
def test_every_row_is_in_exactly_one_unit_and_positions_run_on(files: list[list[tuple[int, int, int]]], max_tokens: int) -> None:
    objects = [
        InputObject(
            uri=f"{number}.parquet",
            identity=f"{number}",
            row_groups=tuple(RowGroup(num_rows=rows, size_bytes=size, prompt_bytes=prompt) for rows, size, prompt in groups),
            schema=_SCHEMA,
        )
        for number, groups in enumerate(files)
    ]
    units = cut(objects, max_tokens=max_tokens)
    assert rows_of(units) == rows_in(objects)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert all(unit.num_rows for unit in units) or [unit.ranges for unit in units] == [()]
    assert all(part.num_rows for unit in units for part in unit.ranges)
    assert Plan.from_parquet(Plan(units=units).to_parquet()) == Plan(units=units)


def a_plan() -> Plan:
    first = WorkUnit(
        index=0,
        ranges=(
            RowRange(uri="in/ä.parquet", identity="1-2", row_start=0, row_stop=5, position=0),
            RowRange(uri="in/b.parquet", identity="3-4", row_start=2, row_stop=9, position=5),
        ),
    )
    second = WorkUnit(index=1, ranges=(RowRange(uri="in/b.parquet", identity="3-4", row_start=9, row_stop=11, position=12),))
    return Plan(units=(first, second), skipped=(("in/c.parquet", "it has no rows"),))


def test_a_plan_comes_back_from_parquet_as_it_was() -> None:
    for plan in (a_plan(), replace(a_plan(), row_bytes=77.5)):
        assert Plan.from_parquet(plan.to_parquet()) == plan


def test_a_plan_of_an_earlier_version_comes_back_without_the_size_of_its_prompts() -> None:
    table = pq.read_table(io.BytesIO(replace(a_plan(), row_bytes=77.5).to_parquet()))
    metadata = {key: value for key, value in table.schema.metadata.items() if b"row_bytes" not in key}
    earlier = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), earlier)
    assert Plan.from_parquet(earlier.getvalue()) == a_plan()


def test_a_plan_of_an_empty_table_comes_back_from_parquet_as_it_was() -> None:
    plan = Plan(units=(WorkUnit(index=0, ranges=()),))
    assert Plan.from_parquet(plan.to_parquet()) == plan


def test_a_plan_knows_its_rows_and_objects() -> None:
    assert (a_plan().num_rows, a_plan().objects) == (14, {"in/ä.parquet": "1-2", "in/b.parquet": "3-4"})


def test_the_digest_of_a_plan_is_the_same_in_every_version() -> None:
    """Outputs that were begun earlier are found by it: a change here loses them."""
    assert a_plan().digest == "e7b6de820005c16b19c3790a0c7eb2a44381e915854252d4c15927c1c9b8869c"


def test_the_digest_tells_another_object_and_another_cut() -> None:
    plan = a_plan()
    (first, second), part = plan.units, plan.units[1].ranges[0]
    changed = replace(plan, units=(first, replace(second, ranges=(replace(part, identity="5-6"),))))
    shorter = replace(plan, units=(first, replace(second, ranges=(replace(part, row_stop=10),))))
    assert len({plan.digest, changed.digest, shorter.digest, replace(plan, units=plan.units[:1]).digest}) == 4


def test_objects_that_changed_or_went_are_named() -> None:
    def now(uri: str) -> str:
        if uri == "in/ä.parquet":
            raise FileNotFoundError(uri)
        return "another"

    assert changed_since(a_plan(), now) == ["in/ä.parquet", "in/b.parquet"]
    assert changed_since(a_plan(), a_plan().objects.__getitem__) == []
