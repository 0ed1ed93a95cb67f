"""The checker is told every kind of damage, one at a time, and names it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos import checker
from tests.chaos.checker import Findings
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.test_structure import imported

_ERROR = pa.struct([("kind", pa.string()), ("message", pa.string())])
_ROWS = 50
_UNIT_ROWS = 10

Parts = list[pa.Table]


def inputs(first: int = 0, count: int = _ROWS) -> pa.Table:
    """Keys with gaps; values of the kinds that compare badly."""
    return pa.table(
        {
            "id": pa.array([3 * row for row in range(first, first + count)], pa.int64()),
            "prompt": [f"question {row}" for row in range(first, first + count)],
            "score": [float("nan") if row % 7 == 0 else row / 3 for row in range(first, first + count)],
            "tags": [[f"t{row}", None] for row in range(first, first + count)],
        }
    )


def answered(table: pa.Table, errors: tuple[int, ...] = ()) -> pa.Table:
    texts = [None if row in errors else f"answer {row}" for row in range(table.num_rows)]
    failed = [{"kind": "engine", "message": "no"} if row in errors else None for row in range(table.num_rows)]
    return table.append_column("completion", pa.array(texts, pa.string())).append_column("error", pa.array(failed, _ERROR))


class Place:
    """An input and an output folder."""

    def __init__(self, folder: Path) -> None:
        self.input, self.out = folder / "in", folder / "out"
        self.input.mkdir()
        self.out.mkdir()
        for number in range(2):  # two objects, whose border is no part's
            pq.write_table(inputs(25 * number, 25), self.input / f"{number}.parquet")

    def write(self, parts: Parts) -> None:
        for number, table in enumerate(parts):
            pq.write_table(table, self.out / f"part-{number:04d}-abcdef01.parquet")

    def check(self) -> Findings:
        return check(str(self.input), str(self.out))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def parts() -> Parts:
    """A perfect output."""
    whole = inputs()
    return [answered(whole.slice(start, _UNIT_ROWS)) for start in range(0, _ROWS, _UNIT_ROWS)]


def swapped(table: pa.Table, one: int, other: int) -> pa.Table:
    order = list(range(table.num_rows))
    order[one], order[other] = order[other], order[one]
    return table.take(order)


def with_cell(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    index = table.schema.get_field_index(column)
    values = table.column(index).to_pylist()
    values[row] = value
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def test_a_perfect_output_is_fine(place: Place, parts: Parts) -> None:
    place.write(parts)
    found = place.check()
    assert (found.fine, found.damage, found.rows_in, found.rows_out, found.parts) == (True, {}, _ROWS, _ROWS, 5)
    assert (found.completions, found.error_rows) == (_ROWS, 0)


def test_error_rows_are_answers_too(place: Place, parts: Parts) -> None:
    parts[1] = answered(parts[1].select(["id", "prompt", "score", "tags"]), errors=(2, 3))
    place.write(parts)
    found = place.check()
    assert (found.fine, found.completions, found.error_rows) == (True, _ROWS - 2, 2)


def drop(parts: Parts, part: int, row: int) -> None:
    parts[part] = pa.concat_tables([parts[part].slice(0, row), parts[part].slice(row + 1)])


def double(parts: Parts, part: int, row: int) -> None:
    parts[part] = pa.concat_tables([parts[part].slice(0, row + 1), parts[part].slice(row)])


DAMAGE: dict[str, tuple[Callable[[Parts], Any], dict[str, int]]] = {
    "the first row dropped": (lambda parts: drop(parts, 0, 0), {"lost": 1}),
    "a row dropped": (lambda parts: drop(parts, 2, 4), {"lost": 1}),
    "the last row dropped": (lambda parts: drop(parts, 4, 9), {"lost": 1}),
    "a part dropped": (lambda parts: parts.pop(1), {"lost": 10}),
    "everything dropped": (lambda parts: parts.clear(), {"lost": _ROWS}),
    "a row doubled": (lambda parts: double(parts, 2, 4), {"doubled": 1}),
    "the last row doubled": (lambda parts: double(parts, 4, 9), {"doubled": 1}),
    "a part doubled": (lambda parts: parts.append(parts[2]), {"doubled": 10}),
    "a row doubled and another dropped": (lambda parts: (double(parts, 0, 4), drop(parts, 3, 1)), {"lost": 1, "doubled": 1}),
    "neighbours swapped": (lambda parts: parts.__setitem__(2, swapped(parts[2], 3, 4)), {"misplaced": 1}),
    "parts swapped": (lambda parts: parts.insert(0, parts.pop(3)), {"misplaced": 30}),
    "the first row at the end": (lambda parts: parts.append(parts[0].slice(0, 1)) or drop(parts, 0, 0), {"misplaced": 1}),
    "a cell changed": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "prompt", 5, "question 26")), {"changed": 1}),
    "a float changed": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "score", 5, 8.34)), {"changed": 1}),
    "NaN changed": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "score", 1, 7.0)), {"changed": 1}),
    "a cell nulled": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "prompt", 5, None)), {"changed": 1}),
    "a list's entry changed": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "tags", 5, ["t25", "x"])), {"changed": 1}),
    "a key that the input has not": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "id", 5, 76)), {"lost": 1, "foreign": 1}),
    "a key nulled": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "id", 5, None)), {"lost": 1, "foreign": 1}),
    "rows of another table": (lambda parts: parts.append(answered(inputs(500, 7))), {"foreign": 7}),
    "no answer": (lambda parts: parts.__setitem__(2, with_cell(parts[2], "completion", 5, None)), {"unanswered": 1}),
    "two answers": (
        lambda parts: parts.__setitem__(2, with_cell(parts[2], "error", 5, {"kind": "engine", "message": "no"})),
        {"contradictory": 1},
    ),
    "a column in another type": (
        lambda parts: parts.__setitem__(2, parts[2].set_column(0, "id", parts[2]["id"].cast(pa.int32()))),
        {"lost": 10, "unreadable": 1},
    ),
    "a column missing": (lambda parts: parts.__setitem__(2, parts[2].drop_columns("score")), {"lost": 10, "unreadable": 1}),
    "no completion column": (lambda parts: parts.__setitem__(2, parts[2].drop_columns("completion")), {"lost": 10, "unreadable": 1}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_caught_and_named(place: Place, parts: Parts, kind: str) -> None:
    damage, expected = DAMAGE[kind]
    damage(parts)
    place.write(parts)
    found = place.check()
    assert (found.fine, found.damage) == (False, expected), found.describe()


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -9])
def test_a_part_that_is_cut_short_is_caught(place: Place, parts: Parts, cut: int) -> None:
    place.write(parts)
    path = place.out / "part-0002-abcdef01.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    found = place.check()
    assert not found.fine
    assert found.damage == {"lost": 10, "unreadable": 1}


def test_hidden_files_are_no_part_of_the_table(place: Place, parts: Parts) -> None:
    place.write(parts)
    (place.out / "_tokenmill").mkdir()
    pq.write_table(parts[0], place.out / "_tokenmill" / "plan.parquet")
    pq.write_table(parts[0], place.out / "_hidden.parquet")
    pq.write_table(parts[0], place.out / ".hidden.parquet")
    (place.out / "_SUCCESS").touch()
    assert place.check().fine


def test_an_input_whose_keys_do_not_ascend_is_refused(place: Place, parts: Parts) -> None:
    place.write(parts)
    pq.write_table(inputs(0, 25), place.input / "1.parquet")
    with pytest.raises(ValueError, match="does not ascend"):
        place.check()


def test_no_input_is_no_proof(place: Place, parts: Parts, tmp_path: Path) -> None:
    place.write(parts)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no Parquet object"):
        check(str(tmp_path / "nothing"), str(place.out))


def test_memory_is_checked_as_folders_are(parts: Parts) -> None:
    fs = fsspec.filesystem("memory")
    root = "/checker-test"
    for name, table in [("in/a.parquet", inputs()), *((f"out/part-{i}.parquet", part) for i, part in enumerate(parts))]:
        with fs.open(f"{root}/{name}", "wb") as file:
            pq.write_table(table, file)
    try:
        assert check(f"memory:/{root}/in", f"memory:/{root}/out").fine
        history = History(f"memory:/{root}/out")
        history.look()
        fs.rm_file(f"{root}/out/part-3.parquet")
        history.look()
        assert check(f"memory:/{root}/in", f"memory:/{root}/out").damage == {"lost": 10}
        assert history.vanished == {"part-3.parquet"}
    finally:
        fs.rm(root, recursive=True)


@pytest.fixture
def history(place: Place, parts: Parts) -> Iterator[History]:
    """Of a perfect output that was looked at once."""
    place.write(parts)
    watched = History(str(place.out))
    watched.look()
    assert (watched.fine, watched.parts) == (True, 5)
    return watched


def test_a_part_that_stays_as_it_is_is_fine(history: History) -> None:
    for _ in range(3):
        history.look()
    assert (history.fine, history.looks) == (True, 4)


def test_a_rewritten_part_is_caught_though_every_row_is_there(history: History, place: Place, parts: Parts) -> None:
    path = place.out / "part-0002-abcdef01.parquet"
    pq.write_table(with_cell(parts[2], "completion", 5, "another answer"), path)
    history.look()
    assert place.check().fine
    assert (history.fine, sorted(history.changed)) == (False, [path.name])


def test_a_rewritten_part_stays_caught_when_the_first_comes_back(history: History, place: Place) -> None:
    path = place.out / "part-0002-abcdef01.parquet"
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    history.look()
    path.write_bytes(before)
    history.look()
    assert len(history.changed[path.name]) == 2


def test_a_part_that_vanished_is_caught_though_it_comes_back(history: History, place: Place) -> None:
    path = place.out / "part-0002-abcdef01.parquet"
    before = path.read_bytes()
    path.unlink()
    history.look()
    path.write_bytes(before)
    history.look()
    assert (history.fine, history.vanished) == (False, {path.name})


def test_a_part_that_the_test_takes_away_may_be_forgotten(history: History, place: Place, parts: Parts) -> None:
    path = place.out / "part-0002-abcdef01.parquet"
    path.unlink()
    history.forget(path.name)
    pq.write_table(with_cell(parts[2], "completion", 5, "another answer"), path)
    history.look()
    assert history.fine


def test_watching_sees_what_happens_in_between(place: Place, parts: Parts) -> None:
    place.write(parts[:2])
    path = place.out / "part-0000-abcdef01.parquet"
    with History(str(place.out)).watch(every_s=0.001) as history:
        while history.looks < 2:
            pass
        before, looks = path.read_bytes(), history.looks
        path.write_bytes(before + b" ")
        while history.looks < looks + 2:
            pass
        path.write_bytes(before)
    assert sorted(history.changed) == [path.name]


def test_the_checker_shares_no_code_with_what_it_judges() -> None:
    assert imported(Path(checker.__file__).read_text()) - set(sys.stdlib_module_names) == {"fsspec", "pyarrow"}
