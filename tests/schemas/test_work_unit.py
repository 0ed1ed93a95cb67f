"""WorkUnit and RowRange: sizes, names, plain data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from schemas.unit import RowRange
from schemas.unit import WorkUnit


def rows(start: int, stop: int, position: int = 0) -> RowRange:
    return RowRange(uri="/in/a.parquet", identity="1-2", row_start=start, row_stop=stop, position=position)


@pytest.mark.parametrize(("start", "stop"), [(3, 2), (-1, 2)])
def test_rows_that_are_no_range_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"rows \[{start}, {stop}\) of /in/a.parquet are no range"):
        rows(start, stop)


def test_a_unit_counts_its_rows_and_begins_where_its_first_range_does() -> None:
    unit = WorkUnit(index=2, ranges=(rows(4, 6, 14), rows(0, 3, 16)))
    assert (unit.num_rows, unit.position) == (5, 14)
    assert (WorkUnit(index=0, ranges=()).num_rows, WorkUnit(index=0, ranges=()).position) == (0, 0)


def test_part_names_sort_as_the_units_do() -> None:
    names = [WorkUnit(index=index, ranges=()).part_name("abcdef0123456789") for index in (0, 9, 10, 99_999_999)]
    assert names[1] == "part-00000009-abcdef01.parquet"
    assert names == sorted(names)


def test_a_unit_survives_json_with_what_a_run_asks_of_it() -> None:
    unit = WorkUnit(index=2, ranges=(rows(4, 6, 14), rows(0, 3, 16)))
    asked = replace(unit, reuse="_tokenmill/reuse", wants_json=True)
    for each in (unit, asked):
        assert WorkUnit.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert unit.to_dict().keys() == {"index", "ranges"}, "a plan's digest is made of it"
