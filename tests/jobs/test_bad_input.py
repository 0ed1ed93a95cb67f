"""Bad rows become error rows in their place; no good row of the same table is lost, and nothing of a prompt is in a message."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.api import run
from jobs.summary import RunResult
from jobs.verify import verify
from schemas.job import JobSpec
from tests.conftest import TINY_MAX_LEN
from tests.conftest import read_output

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]

_GOOD = "tell me more"


def quiet(job: JobSpec) -> RunResult:
    return run(job, stream=io.StringIO())


def surrounded(bad: Any, good: Any) -> list[Any]:
    """A bad value amid good ones, and at both ends."""
    return [bad, good, good, bad, good, bad]


def bad_row_errors(table: pa.Table, job: JobSpec, out: Path) -> list[dict[str, str]]:
    """Run a table whose rows 0, 3 and 5 are bad; the error of row 0 and what all three say, all else checked."""
    result = quiet(job)
    assert (result.state, result.exit_code, result.totals.rows, result.totals.error_rows) == ("complete", 0, 6, 3)
    made = read_output(out)
    assert made.select(table.column_names).equals(table)
    rows = made.to_pylist()
    assert [row["finish_reason"] == "error" for row in rows] == [True, False, False, True, False, True]
    assert [row["completion"] is None for row in rows] == [True, False, False, True, False, True]
    assert [row["error"] is None for row in rows] == [False, True, True, False, True, False]
    assert [row["completion_tokens"] > 0 for row in rows] == [False, True, True, False, True, False]
    assert verify(str(out)).complete
    return [row["error"] for row in rows if row["error"]]


def texts(bad: str | None) -> pa.Table:
    return pa.table({"id": list(range(6)), "prompt": pa.array(surrounded(bad, _GOOD), pa.string()), "n": [1.5, None, 0.0, -1.0, 2.0, 3.0]})


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (None, "empty_prompt", "column 'prompt' is null"),
        ("", "empty_prompt", "column 'prompt' is empty"),
        (" \n\t ", "empty_prompt", "column 'prompt' is only white space"),
        ("z" * 600, "prompt_too_long", f"tokens, the limit is {TINY_MAX_LEN - 1}; set input.too_long"),
    ],
)
def test_a_text_that_cannot_be_asked_is_an_error_row(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, bad: str | None, kind: str, message: str
) -> None:
    table = texts(bad)
    write_table(table)
    for error in bad_row_errors(table, make_job(), tmp_path / "out"):
        assert error["kind"] == kind
        assert message in error["message"]


def test_an_error_row_of_a_long_prompt_says_how_long_it_was(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(texts("z" * 600))
    quiet(make_job(input={"chat": False}))
    made = read_output(tmp_path / "out").to_pylist()
    assert (made[0]["prompt_tokens"], made[0]["completion_tokens"]) == (601, 0)  # with BOS
    assert "601 tokens" in made[0]["error"]["message"]


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
def test_a_long_prompt_is_cut_where_that_was_asked_for(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, policy: str) -> None:
    write_table(texts("z" * 600))
    result = quiet(make_job(input={"too_long": policy}))
    assert (result.state, result.totals.error_rows) == ("complete", 0)
    assert max(read_output(tmp_path / "out")["prompt_tokens"].to_pylist()) <= TINY_MAX_LEN - 8


def test_a_null_in_a_template_is_an_error_row(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    table = texts(None)
    write_table(table)
    errors = bad_row_errors(table, make_job(input={"prompt": "Answer: {prompt}"}), tmp_path / "out")
    assert errors == [{"kind": "empty_prompt", "message": "column 'prompt' is null, and the template needs it"}] * 3


_GOOD_CHAT = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": _GOOD}])


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (None, "empty_prompt", "column 'chat' is null"),
        ("[]", "empty_prompt", "column 'chat' has no messages"),
        ('[{"role": "user", "content": " "}]', "empty_prompt", "column 'chat' has only empty messages"),
        ('[{"role": "user"', "bad_messages", "column 'chat' is not JSON: "),
        ("", "bad_messages", "column 'chat' is not JSON: "),
        ('{"role": "user", "content": "x"}', "bad_messages", "column 'chat' is dict, expected a list of messages"),
        ('["x"]', "bad_messages", "message 0 of column 'chat' is str, expected an object with role and content"),
        (
            '[{"role": "wizard", "content": "x"}]',
            "bad_messages",
            "message 0 of column 'chat' has the role 'wizard'; allowed are system, user, assistant, tool",
        ),
        ('[{"content": "x"}]', "bad_messages", "message 0 of column 'chat' has the role 'None'; allowed are"),
        ('[{"role": ["user"], "content": "x"}]', "bad_messages", "message 0 of column 'chat' has the role "),
        ('[{"role": "user", "content": 7}]', "bad_messages", "message 0 of column 'chat' has int content, expected text"),
        ('[{"role": "user", "content": null}]', "bad_messages", "message 0 of column 'chat' has NoneType content, expected text"),
        ('[{"role": "user", "content": "half \\ud83d"}]', "bad_text", "holds half of a surrogate pair at character 5"),
        ("[" * 100_000, "bad_messages", "column 'chat' is JSON nested too deeply"),
        (
            '[{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]',
            "bad_messages",
            "the model's chat template refuses the messages: no tools here",
        ),
    ],
)
def test_messages_that_cannot_be_asked_are_an_error_row(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, bad: str | None, kind: str, message: str
) -> None:
    table = pa.table({"id": list(range(6)), "chat": pa.array(surrounded(bad, _GOOD_CHAT), pa.string())})
    write_table(table)
    for error in bad_row_errors(table, make_job(input={"prompt": {"messages": "chat"}}), tmp_path / "out"):
        assert error["kind"] == kind
        assert message in error["message"]


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (None, "empty_prompt"),
        ([], "empty_prompt"),
        ([None], "bad_messages"),
        ([{"role": "wizard", "content": "x"}], "bad_messages"),
        ([{"role": "user", "content": None}], "bad_messages"),
        ([{"role": "tool", "content": "x"}], "bad_messages"),
    ],
)
def test_nested_messages_that_cannot_be_asked_are_an_error_row(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, bad: Any, kind: str
) -> None:
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    table = pa.table({"turns": pa.array(surrounded(bad, [{"role": "user", "content": _GOOD}]), turns)})
    write_table(table)
    errors = bad_row_errors(table, make_job(input={"prompt": "turns"}), tmp_path / "out")
    assert [error["kind"] for error in errors] == [kind] * 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"max_tokens": ', "the row's sampling is not JSON"),
        ("[1]", "the row's sampling is list, expected an object"),
        ('{"temperature": -1}', "temperature: Input should be greater than or equal to 0 (found -1)"),
        ('{"top_p": 1.5}', "top_p: "),
        ('{"max_tokens": 0}', "max_tokens: "),
        ('{"max_tokens": "many"}', "max_tokens: "),
        ('{"temperature": NaN}', "temperature: "),
        ('{"temperature": 1e999}', "temperature: "),
        ('{"temprature": 1}', "temprature: unknown key"),
        ('{"min_tokens": 100}', "min_tokens is 100, above max_tokens 8"),
        ('{"n": 2, "temperature": 1}', "n: found 2, but the job's n is 1"),
        ('{"logprobs": 1}', "logprobs: the job asks for none"),
        ('{"structured_outputs": {"regex": "a", "choice": ["b"]}}', "structured_outputs: found regex, choice; give exactly one of"),
        ('{"structured_outputs": {"json": "not a schema"}}', "structured_outputs.json: "),
        ('{"structured_outputs": {"choice": []}}', "structured_outputs.choice: "),
        ("[" * 100_000, "the row's sampling is not JSON"),
    ],
)
def test_a_sampling_that_cannot_be_is_an_error_row(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, bad: str, message: str
) -> None:
    overrides = surrounded(bad, '{"max_tokens": 3}')
    table = pa.table({"prompt": [f"{_GOOD} {row}" for row in range(6)], "how": overrides})
    write_table(table)
    for error in bad_row_errors(table, make_job(input={"sampling": "how"}), tmp_path / "out"):
        assert error["kind"] == "bad_sampling"
        assert message in error["message"]


def test_a_sampling_struct_out_of_range_is_an_error_row(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    overrides = surrounded({"temperature": 3.5, "top_p": 2.0}, {"temperature": None, "top_p": 0.5})
    table = pa.table({"prompt": [_GOOD] * 6, "how": overrides})
    write_table(table)
    for error in bad_row_errors(table, make_job(input={"sampling": "how"}), tmp_path / "out"):
        assert (error["kind"], "top_p: " in error["message"]) == ("bad_sampling", True)


def test_a_null_or_empty_sampling_leaves_the_jobs(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    table = pa.table({"prompt": [_GOOD] * 4, "how": [None, "", "{}", '{"max_tokens": 3, "ignore_eos": true}']})
    write_table(table)
    result = quiet(make_job(input={"sampling": "how"}, sampling={"ignore_eos": True}))
    assert (result.state, result.totals.error_rows) == ("complete", 0)
    assert read_output(tmp_path / "out")["completion_tokens"].to_pylist() == [8, 8, 8, 3]


def test_text_that_is_not_utf8_is_an_error_row(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """Parquet does not check it, and one such row must not take its unit with it."""
    values = surrounded(b"ab\xff\xfe", _GOOD.encode())
    write_table(pa.table({"id": list(range(6)), "prompt": not_checked(values)}))
    result = quiet(make_job(limits={"attempts": 1}))
    assert (result.state, result.failed) == ("complete", {})
    made = read_output(tmp_path / "out")
    assert [reason == "error" for reason in made["finish_reason"].to_pylist()] == [True, False, False, True, False, True]
    assert {error["kind"] for error in made["error"].to_pylist() if error} == {"bad_text"}


def not_checked(values: list[bytes]) -> pa.Array:
    """A string array of any bytes."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def test_a_template_takes_columns_that_python_has_no_type_for(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """Nanoseconds, and years beyond 9999: pyarrow refuses to make them datetimes."""
    when = pa.array([1_700_000_000_000_000_001, None, 0], pa.timestamp("ns"))
    far = pa.array([2**52, 1, 2], pa.timestamp("s"))
    write_table(pa.table({"prompt": [_GOOD] * 3, "when": when, "far": far}))
    result = quiet(make_job(input={"prompt": "{prompt}: {when}, {far}"}, limits={"attempts": 1}))
    assert (result.state, result.failed) == ("complete", {})
    assert [reason == "error" for reason in read_output(tmp_path / "out")["finish_reason"].to_pylist()] == [False, True, False]


def test_a_row_group_without_rows_is_fine(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"id": list(range(5)), "prompt": [f"{_GOOD} {row}" for row in range(5)]})
    with pq.ParquetWriter(tmp_path / "in" / "a.parquet", table.schema) as writer:
        for piece in (table.slice(0, 0), table.slice(0, 2), table.slice(0, 0), table.slice(2), table.slice(0, 0)):
            writer.write_table(piece)
    assert [pq.read_metadata(tmp_path / "in" / "a.parquet").row_group(group).num_rows for group in range(5)] == [0, 2, 0, 3, 0]
    assert quiet(make_job()).state == "complete"
    assert read_output(tmp_path / "out").select(["id", "prompt"]).equals(table)
    assert verify(str(tmp_path / "out")).complete


def test_a_table_without_rows_comes_out_as_a_table_without_rows(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(texts("x").slice(0, 0))
    result = quiet(make_job())
    assert (result.state, result.rows, result.units) == ("complete", 0, 1)
    made = read_output(tmp_path / "out")
    assert (made.num_rows, made.column_names[:4]) == (0, ["id", "prompt", "n", "completion"])
    assert verify(str(tmp_path / "out")).complete


def test_a_table_of_bad_rows_alone_has_the_same_types_as_any_other(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(pa.table({"prompt": pa.array([None] * 40, pa.string())}), "in/bad.parquet")
    write_table(pa.table({"prompt": [_GOOD] * 40}), "other/good.parquet")
    bad = quiet(make_job())
    good = quiet(make_job(input={"uri": str(tmp_path / "other")}, output={"uri": str(tmp_path / "fine")}))
    assert (bad.exit_code, bad.totals.error_rows, good.totals.error_rows) == (0, 40, 0)
    assert read_output(tmp_path / "out").schema.equals(read_output(tmp_path / "fine").schema)


def test_a_damaged_page_fails_its_own_unit_alone(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """The footer is fine, so the job is accepted; what can be read is done."""
    for name in ("a", "b", "c"):
        rows = pa.table({"id": [f"{name}{row}" for row in range(16)], "prompt": [f"{name} {row} {_GOOD}" for row in range(16)]})
        path = write_table(rows, f"in/{name}.parquet", compression="none", use_dictionary=False)
        if name == "b":
            data = bytearray(path.read_bytes())
            data[4:60] = b"\xff" * 56
            path.write_bytes(data)
    result = quiet(make_job(limits={"attempts": 1}))
    assert (result.state, result.exit_code, list(result.failed)) == ("failed", 1, [1])
    assert str(tmp_path / "in" / "b.parquet") in result.failed[1]
    assert [value[0] for value in read_output(tmp_path / "out")["id"].to_pylist()] == ["a"] * 16 + ["c"] * 16


def test_columns_that_no_prompt_needs_may_be_there_twice(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(pa.table([[1, 2], [3, 4], [_GOOD, _GOOD]], names=["x", "x", "prompt"]))
    result = quiet(make_job(limits={"attempts": 1}))
    assert (result.state, result.failed) == ("complete", {})
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    batch = next(pq.ParquetFile(part).iter_batches())
    assert [column.to_pylist() for column in batch.columns[:3]] == [[1, 2], [3, 4], [_GOOD, _GOOD]]
    assert verify(str(tmp_path / "out")).complete


_SECRET = "the patient's name is Example"


def test_no_error_message_repeats_the_prompt(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    chats = [
        _SECRET,
        json.dumps(_SECRET),
        json.dumps([_SECRET]),
        json.dumps([{"role": "tool", "content": _SECRET}]),
        json.dumps([{"role": "user", "content": [_SECRET]}]),
        json.dumps([{"role": "user", "content": _SECRET * 30}]),
        json.dumps([{"role": "user", "content": _SECRET + "\ud800"}]),
    ]
    write_table([{"chat": chat} for chat in chats])
    stream = io.StringIO()
    run(make_job(input={"prompt": {"messages": "chat"}}), stream=stream)
    errors = read_output(tmp_path / "out")["error"].to_pylist()
    assert all(errors)
    assert "patient" not in json.dumps(errors)
    assert "patient" not in stream.getvalue()
