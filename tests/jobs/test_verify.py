"""verify finds every way in which an output can be wrong, and nothing wrong with any type of column."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.accept import load_plan
from jobs.api import run
from jobs.cli import main
from jobs.plan import Plan
from jobs.verify import Verdict
from jobs.verify import verify
from schemas import layout
from schemas.completions import RowsDigest
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from tests.conftest import job_data

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]

_UNITS = 4
_ROWS = 16 * _UNITS


def make_whole(folder: Path, model: Path) -> Path:
    """A complete output of four units with 16 rows each, beside its input; row 21 is an error row."""
    rows = [{"id": index, "prompt": None if index == 21 else f"question {index}", "x": index / 2} for index in range(_ROWS)]
    (folder / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "in" / "prompts.parquet")
    assert run(parse_job(job_data(model, folder)), stream=io.StringIO()).state == "complete"
    return folder / "out"


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole(tmp_path_factory.mktemp("whole"), tiny_model)


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; its input is everybody's."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture
def table(whole: Path) -> Path:
    """What `out` was made of."""
    return whole.parent / "in" / "prompts.parquet"


def part(out: Path, unit: int) -> Path:
    return sorted(out.glob("part-*.parquet"))[unit]


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **told: str) -> None:
    """The part with other rows, but its own footer's report, but for what is `told`: the most that an accident could forge."""
    changed = change(pq.read_table(path))
    metadata = {key: value for key, value in pq.read_metadata(path).metadata.items() if key.startswith(b"tokenmill")}
    report = {**json.loads(metadata[b"tokenmill.report"]), "rows": changed.num_rows, **told}
    with pq.ParquetWriter(path, changed.schema) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({**metadata, b"tokenmill.report": json.dumps(report)})


def problems(out: Path) -> list[str]:
    """What verify finds, the command's exit code and words checked on the way."""
    verdict = verify(str(out))
    assert not verdict.complete
    done = CliRunner().invoke(main, ["verify", str(out)])
    assert done.exit_code == 1
    assert "NOT complete: " in done.stdout
    assert all(problem in done.stdout for problem in verdict.problems)
    return verdict.problems


def change_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        number = table.column_names.index(name)
        values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        return table.set_column(number, table.schema.field(name), values)

    return changed


def test_a_complete_output_passes(out: Path) -> None:
    assert verify(str(out)) == Verdict(rows_expected=_ROWS, rows_proven=_ROWS, error_rows=1, units=_UNITS, problems=[])
    done = CliRunner().invoke(main, ["verify", str(out)])
    assert (done.exit_code, done.stdout) == (0, "complete: 64 of 64 rows proven by content in 4 units, 1 of them error rows\n")


def test_a_rewritten_part_with_the_same_rows_passes(out: Path) -> None:
    """The control of `rewrite`: it adds nothing that verify would find by itself."""
    rewrite(part(out, 1), lambda table: table)
    assert verify(str(out)).complete


def test_a_lost_part_is_found(out: Path, table: Path) -> None:
    part(out, 2).unlink()
    assert problems(out) == [f"lost: rows 32 to 48 (rows 32 to 48 of {table}; no part for units 2 to 2); run the job again"]


def test_neighbouring_lost_parts_are_one_finding(out: Path, table: Path) -> None:
    for path in (part(out, 0), part(out, 1), part(out, 3)):
        path.unlink()
    assert problems(out) == [
        f"lost: rows 0 to 32 (rows 0 to 32 of {table}; no part for units 0 to 1); run the job again",
        f"lost: rows 48 to 64 (rows 48 to 64 of {table}; no part for units 3 to 3); run the job again",
    ]


def test_lost_rows_of_several_objects_are_found_by_the_first_and_the_last(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {index}"} for index in range(20)]
    first, last = write_table(rows, "in/a.parquet"), write_table(rows, "in/b.parquet")
    assert run(make_job(), stream=io.StringIO()).state == "complete"
    for path in sorted((tmp_path / "out").glob("part-*.parquet"))[1:]:
        path.unlink()
    assert problems(tmp_path / "out") == [
        f"lost: rows 16 to 40 (row 16 of {first} to row 20 of {last}; no part for units 1 to 2); run the job again"
    ]


def test_a_doubled_row_is_found(out: Path) -> None:
    rewrite(part(out, 1), lambda table: pa.concat_tables([table, table.slice(15)]))
    assert problems(out) == [f"{part(out, 1).name} (rows 16 to 32): doubled rows: it has 17, the plan 16"]


def test_a_lost_row_is_found(out: Path) -> None:
    rewrite(part(out, 1), lambda table: table.slice(1))
    assert problems(out) == [f"{part(out, 1).name} (rows 16 to 32): lost rows: it has 15, the plan 16"]


def test_a_row_over_another_is_found(out: Path) -> None:
    rewrite(part(out, 1), lambda table: pa.concat_tables([table.slice(0, 4), table.slice(3, 1), table.slice(5)]))
    assert problems(out) == [f"{part(out, 1).name} (rows 16 to 32): changed: column 'id' of row 20 is not the input's"]


@pytest.mark.parametrize(("name", "value"), [("id", 99), ("prompt", "another"), ("prompt", None), ("x", float("nan")), ("x", None)])
def test_a_changed_input_column_is_found(out: Path, name: str, value: Any) -> None:
    rewrite(part(out, 3), change_column(name, lambda values: [*values[:7], value, *values[8:]]))
    assert problems(out) == [f"{part(out, 3).name} (rows 48 to 64): changed: column '{name}' of row 55 is not the input's"]


def test_swapped_rows_are_found(out: Path) -> None:
    rewrite(part(out, 0), lambda table: table.take([0, 1, 2, 4, 3, *range(5, 16)]))
    assert problems(out) == [f"{part(out, 0).name} (rows 0 to 16): changed: column 'id' of row 3 is not the input's"]


@pytest.mark.parametrize("kept", [0, 3, 200, -30, -5])
def test_a_truncated_part_is_found(out: Path, kept: int) -> None:
    data = part(out, 2).read_bytes()
    part(out, 2).write_bytes(data[:kept])
    (problem,) = problems(out)
    assert problem.startswith(f"{part(out, 2).name} (rows 32 to 48): ")


def test_a_part_with_a_damaged_page_is_found(out: Path) -> None:
    data = bytearray(part(out, 2).read_bytes())
    data[4:104] = bytes(100)
    part(out, 2).write_bytes(data)
    (problem,) = problems(out)
    assert problem.startswith(f"{part(out, 2).name} (rows 32 to 48): ")


def test_another_units_part_copied_over_is_found(out: Path) -> None:
    shutil.copy(part(out, 0), part(out, 1))
    (problem,) = problems(out)
    assert part(out, 1).name in problem
    assert "says it is unit 0" in problem
    assert "rows 16 to 32" in problem


def test_a_part_beyond_the_plan_is_found(out: Path) -> None:
    name = part(out, 0).name.replace("part-00000000", "part-00000007")
    shutil.copy(part(out, 0), out / name)
    (problem,) = problems(out)
    assert "unit 7, which the plan does not have" in problem
    assert verify(str(out)).rows_proven == _ROWS


def test_a_foreign_part_is_found_and_no_row_is_called_lost(out: Path) -> None:
    shutil.copy(part(out, 0), out / "part-00000000-ffffffff.parquet")
    verdict = verify(str(out))
    assert not verdict.complete
    assert any("part-00000000-ffffffff.parquet" in problem for problem in verdict.problems)
    assert not any("lost" in problem for problem in verdict.problems)
    assert verdict.rows_proven == _ROWS


def test_a_changed_input_is_found(tiny_model: Path, write_table: WriteTable, tmp_path: Path) -> None:
    out = make_whole(tmp_path, tiny_model)
    path = tmp_path / "in" / "prompts.parquet"
    write_table([{"id": index, "prompt": f"question {index}", "x": 0.0} for index in range(_ROWS)])
    found = problems(out)
    assert len(found) == _UNITS
    assert found[1].startswith(f"{part(out, 1).name} (rows 16 to 32): ")
    assert all(f"{path} changed since the plan was made" in problem for problem in found)


def test_an_input_that_is_gone_is_found(tiny_model: Path, tmp_path: Path) -> None:
    out = make_whole(tmp_path, tiny_model)
    path = tmp_path / "in" / "prompts.parquet"
    path.unlink()
    assert all(f"{path} is gone since the plan was made" in problem for problem in problems(out))


def test_a_missing_success_is_found(out: Path) -> None:
    (out / layout.SUCCESS).unlink()
    assert problems(out) == [f"every row is there, but {layout.SUCCESS} is missing; run the job again to close it"]


def test_a_replaced_plan_is_found(out: Path) -> None:
    plan = load_plan(str(out))
    assert plan is not None
    (out / layout.PLAN).write_bytes(Plan(units=plan.units[:2]).to_parquet())
    found = problems(out)
    assert found[0] == f"{layout.PLAN} is not the plan that {layout.JOB} names; it was replaced or damaged"


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["x"]),
        lambda table: table.drop_columns(["error"]),
        lambda table: table.append_column("more", pa.array(range(16))),
        lambda table: table.set_column(0, "id", table["id"].cast(pa.int32())),
        lambda table: table.select(["prompt", "id", *table.column_names[2:]]),
    ],
)
def test_other_columns_than_the_plans_are_found(out: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    rewrite(part(out, 1), change)
    (problem,) = problems(out)
    assert problem.startswith(f"{part(out, 1).name} (rows 16 to 32): its columns are ")


def test_a_row_with_neither_completion_nor_error_is_found(out: Path) -> None:
    """The promise is: its completion or its error."""
    rewrite(part(out, 2), change_column("completion", lambda values: [*values[:3], None, *values[4:]]))
    (problem,) = problems(out)
    assert problem.startswith(f"{part(out, 2).name} (rows 32 to 48): ")
    assert "row 35" in problem


def test_a_completion_that_is_another_text_is_found(out: Path) -> None:
    rewrite(part(out, 2), change_column("completion", lambda values: [*values[:3], "another text", *values[4:]]))
    assert problems(out) == [f"{part(out, 2).name} (rows 32 to 48): changed: its completions are not those that were committed"]


def test_a_part_without_a_digest_is_not_taken_for_proven(out: Path) -> None:
    rewrite(part(out, 2), lambda table: table, digest="")
    (problem,) = problems(out)
    assert problem.startswith(f"{part(out, 2).name} (rows 32 to 48): its footer has no digest of its completions")


@pytest.fixture
def swapped(out: Path) -> Path:
    """The output with another attempt's part of unit 1, as whole as the one that was committed."""
    changed = change_column("completion", lambda values: ["another text", *values[1:]])(pq.read_table(part(out, 1)))
    digest = RowsDigest()
    digest.update(changed.columns[3:])
    rewrite(part(out, 1), lambda _: changed, attempt="another", digest=digest.hexdigest())
    return out


def test_a_part_of_another_attempt_is_found(swapped: Path) -> None:
    """Put there after the job was closed: all that it says of itself is true, but the manifest names another."""
    (problem,) = problems(swapped)
    assert problem.startswith(f"{part(swapped, 1).name} (rows 16 to 32): changed: it has attempt another, and {layout.MANIFEST} names ")
    assert verify(str(swapped)).rows_proven == _ROWS - 16
    (swapped / layout.SUCCESS).unlink()
    assert [problem.split(",")[0] for problem in problems(swapped)] == ["every row is there"]


def test_a_part_is_found_that_has_its_attempts_name_and_other_completions(swapped: Path) -> None:
    manifest = pq.read_table(swapped / layout.MANIFEST)
    rewrite(part(swapped, 1), lambda table: table, attempt=manifest["attempt"][1].as_py())
    (problem,) = problems(swapped)
    assert problem.startswith(f"{part(swapped, 1).name} (rows 16 to 32): changed: it has digest ")


def test_the_same_command_again_takes_a_part_of_another_attempt(tiny_model: Path, tmp_path: Path) -> None:
    out = make_whole(tmp_path, tiny_model)
    rewrite(part(out, 1), lambda table: table, attempt="another")
    assert not verify(str(out)).complete
    assert run(parse_job(job_data(tiny_model, tmp_path)), stream=io.StringIO()).this_run.units == 0
    assert verify(str(out)).complete


@pytest.mark.parametrize("data", [None, b"", b"PAR1 and nothing else"])
def test_a_manifest_that_cannot_be_read_is_found_once(out: Path, data: bytes | None) -> None:
    (out / layout.MANIFEST).unlink()
    if data is not None:
        (out / layout.MANIFEST).write_bytes(data)
    (problem,) = problems(out)
    assert problem.startswith(f"{layout.MANIFEST} cannot be read (")
    assert problem.endswith("run the job again, which writes it anew")


def test_a_part_that_the_manifest_does_not_name_is_found(out: Path) -> None:
    pq.write_table(pq.read_table(out / layout.MANIFEST).take([0, 1, 3]), out / layout.MANIFEST)
    assert problems(out) == [
        f"{part(out, 2).name} (rows 32 to 48): {layout.MANIFEST} does not name it; run the job again, which writes that anew"
    ]


def test_all_findings_are_told_at_once(out: Path) -> None:
    part(out, 0).unlink()
    rewrite(part(out, 0), lambda table: table.slice(1))  # the first that is left
    assert [problem.split()[0] for problem in problems(out)] == ["lost:", part(out, 0).name]


def test_findings_as_json(out: Path, table: Path) -> None:
    part(out, 2).unlink()
    done = CliRunner().invoke(main, ["verify", "--json", str(out)])
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {
        "complete": False,
        "rows_expected": 64,
        "rows_proven": 48,
        "error_rows": 1,
        "problems": [f"lost: rows 32 to 48 (rows 32 to 48 of {table}; no part for units 2 to 2); run the job again"],
    }


@pytest.mark.parametrize("name", ["nowhere", "in"])
def test_a_folder_without_a_job_is_refused(write_table: WriteTable, tmp_path: Path, name: str) -> None:
    write_table([{"prompt": "question"}])
    with pytest.raises(JobError, match="holds no job"):
        verify(str(tmp_path / name))
    done = CliRunner().invoke(main, ["verify", str(tmp_path / name)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tokenmill: {tmp_path / name} holds no job")


_NAN = float("nan")
_DAY = datetime.datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=datetime.UTC)


def _repeated(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array((values * 40)[:40], kind)


COLUMNS: dict[str, pa.Array] = {
    "all_null": pa.nulls(40),
    "float": _repeated([1.5, _NAN, None, float("inf"), -0.0], pa.float64()),
    "half": _repeated([1.5, None, 2.25], pa.float32()),
    "bool": _repeated([True, None, False], pa.bool_()),
    "unsigned": _repeated([2**64 - 1, None, 0], pa.uint64()),
    "text": _repeated(["ä", None, "", "🙂", "\x00"], pa.string()),
    "large_text": _repeated(["ä", None, ""], pa.large_string()),
    "bytes": _repeated([b"\xff\x00", None, b""], pa.binary()),
    "large_bytes": _repeated([b"\xff\x00", None, b""], pa.large_binary()),
    "fixed_bytes": _repeated([b"abcd", None], pa.binary(4)),
    "decimal": _repeated([decimal.Decimal("12345678901234567890.12"), None, decimal.Decimal("-0.01")], pa.decimal128(38, 2)),
    "wide_decimal": _repeated([decimal.Decimal("1e40"), None], pa.decimal256(60, 2)),
    "date": _repeated([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)], pa.date32()),
    "time": _repeated([datetime.time(23, 59, 59, 999999), None], pa.time64("us")),
    "zoned": _repeated([_DAY, None], pa.timestamp("us", tz="Europe/Berlin")),
    "utc_ms": _repeated([_DAY.replace(microsecond=0), None], pa.timestamp("ms", tz="UTC")),
    "nanoseconds": _repeated([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
    "far_future": _repeated([2**52, None], pa.timestamp("us")),
    "duration": _repeated([datetime.timedelta(days=3), None], pa.duration("us")),
    "category": _repeated(["b", "a", None], pa.dictionary(pa.int32(), pa.string())),
    "small_category": _repeated(["b", "a", None], pa.dictionary(pa.int8(), pa.string())),
    "large_category": _repeated(["b", "a", None], pa.dictionary(pa.int32(), pa.large_string())),
    "list": _repeated([[1, None], None, []], pa.list_(pa.int64())),
    "large_list": _repeated([[1, None], None, []], pa.large_list(pa.int64())),
    "fixed_list": _repeated([[1.0, _NAN], None], pa.list_(pa.float32(), 2)),
    "struct": _repeated([{"a": 1, "b": "x"}, None, {"a": None, "b": None}], pa.struct([("a", pa.int8()), ("b", pa.string())])),
    "map": _repeated([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "nested": _repeated(
        [[{"who": "x", "when": _DAY, "score": [_NAN, None]}], None, []],
        pa.list_(pa.struct([("who", pa.string()), ("when", pa.timestamp("us", tz="UTC")), ("score", pa.list_(pa.float64()))])),
    ),
    "nested_category": _repeated([["b", None, "a"], None, ["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
}


def _typed(name: str) -> pa.Table:
    field = pa.field(name, COLUMNS[name].type, metadata={b"note": b"kept"})
    schema = pa.schema([field, pa.field("prompt", pa.string())], metadata={b"origin": b"test"})
    return pa.table([COLUMNS[name], pa.array([f"question {row}" for row in range(40)])], schema=schema)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_type_comes_out_as_it_went_in(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, name: str) -> None:
    path = write_table(_typed(name), row_group_size=9)
    result = run(make_job(limits={"attempts": 1}), stream=io.StringIO())
    assert (result.state, result.failed) == ("complete", {})
    verdict = verify(str(tmp_path / "out"))
    assert verdict.problems == []
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    before = pq.read_table(path)
    after = pa.concat_tables([pq.read_table(part) for part in parts]).select([name, "prompt"])
    assert after.schema.equals(before.schema)
    assert after.schema.field(name).metadata[b"note"] == b"kept"
    assert values_of(after[name]) == values_of(before[name])


def values_of(column: pa.ChunkedArray) -> str:
    """As text, in which NaN equals itself; timestamps as numbers, since Python has none with nanoseconds."""
    return repr((column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist())


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "all_null"])
def test_a_changed_value_of_any_type_is_found(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, name: str) -> None:
    """Rows 20 and 21 differ in every column; row 21 then stands in both places."""
    write_table(_typed(name))
    run(make_job(limits={"attempts": 1}), stream=io.StringIO())
    changed = sorted((tmp_path / "out").glob("part-*.parquet"))[1]
    rewrite(changed, lambda table: table.take([0, 1, 2, 3, 5, *range(5, 16)]))
    assert verify(str(tmp_path / "out")).problems == [
        f"{changed.name} (rows 16 to 32): changed: column '{name}' of row 20 is not the input's"
    ]


_LONG: dict[str, tuple[Any, Any, pa.DataType]] = {
    "text": ("x" * 3000 + "y", "x" * 3000 + "z", pa.string()),
    "bytes": (b"x" * 3000 + b"y", b"x" * 3000 + b"z", pa.binary()),
    "numbers": ([1.0] * 500 + [2.0] + [1.0] * 500, [1.0] * 500 + [3.0] + [1.0] * 500, pa.list_(pa.float64())),
    "lists": ([[1]] * 50 + [[2]] + [[1]] * 50, [[1]] * 50 + [[3]] + [[1]] * 50, pa.list_(pa.list_(pa.int64()))),
    "words": ([{"w": ["a"] * 99}] * 9, [{"w": ["a"] * 50 + ["b"] + ["a"] * 48}] * 9, pa.list_(pa.struct([("w", pa.list_(pa.string()))]))),
    "nested_nanoseconds": ([1_700_000_000_000_000_001], [1_700_000_000_000_000_002], pa.list_(pa.timestamp("ns"))),
    "close_numbers": (0.1 + 0.2, 0.3, pa.float64()),
}


@pytest.mark.parametrize("name", _LONG)
def test_a_change_deep_inside_a_value_is_found(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, name: str) -> None:
    good, bad, kind = _LONG[name]
    write_table(pa.table({"value": pa.array([good] * 40, kind), "prompt": ["the same"] * 40}))
    run(make_job(limits={"attempts": 1}), stream=io.StringIO())
    assert verify(str(tmp_path / "out")).complete
    changed = sorted((tmp_path / "out").glob("part-*.parquet"))[1]
    values = pa.array([good] * 7 + [bad] + [good] * 8, kind)
    rewrite(changed, lambda table: table.set_column(0, table.schema.field(0), values))
    assert verify(str(tmp_path / "out")).problems == [
        f"{changed.name} (rows 16 to 32): changed: column 'value' of row 23 is not the input's"
    ]


def test_parts_are_compared_whole_where_their_row_groups_lie_otherwise_than_the_inputs(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.verify._BATCH_ROWS", 3)
    write_table(pa.table({"id": list(range(100)), "prompt": [f"question {row}" for row in range(100)]}), row_group_size=7)
    run(make_job(), stream=io.StringIO())
    assert verify(str(tmp_path / "out")).complete
    last = sorted((tmp_path / "out").glob("part-*.parquet"))[-1]
    rewrite(last, change_column("id", lambda values: [*values[:-1], 7]))
    assert verify(str(tmp_path / "out")).problems == [f"{last.name} (rows 96 to 100): changed: column 'id' of row 99 is not the input's"]
