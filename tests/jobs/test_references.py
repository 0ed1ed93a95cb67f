"""Rows that judge and rows that calibrate, out of tables good and bad."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.references import Row
from jobs.references import read_rows
from jobs.references import rows_digest
from jobs.references import split_rows
from pipeline.model import resolve_model
from schemas.errors import JobError


def rows(count: int) -> list[Row]:
    return [Row(prompt_ids=[0, row], reference_ids=[row], reference=str(row)) for row in range(count)]


def read(model: Path, table: Path, **changes: Any) -> list[Row]:
    asked = {"table": str(table), "prompt": "prompt", "reference": "answer", "at_most": None, "max_tokens": 8, **changes}
    return read_rows(resolve_model(str(model)), str(model), **asked)


def test_no_row_both_judges_and_calibrates() -> None:
    judges, calibration = split_rows(rows(400), None)
    assert (len(judges), len(calibration)) == (128, 32)
    assert judges + calibration == rows(160)


def test_a_small_table_keeps_a_quarter_to_calibrate() -> None:
    judges, calibration = split_rows(rows(20), None)
    assert (judges, calibration) == (rows(20)[:15], rows(20)[15:])


def test_as_many_rows_judge_as_are_asked_for() -> None:
    judges, calibration = split_rows(rows(100), 40)
    assert (len(judges), len(calibration)) == (40, 32)


def test_more_judges_than_there_are_rows_are_refused() -> None:
    with pytest.raises(JobError, match="--rows 17: the table has 20 usable rows, and 4 more are needed to calibrate"):
        split_rows(rows(20), 17)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(JobError, match="--table: 15 rows have a prompt and a reference that fit the model, expected 16 at least"):
        split_rows(rows(15), None)


def test_rows_are_in_token_ids_with_the_chat_template(tiny_model: Path, write_table: Callable[..., Path]) -> None:
    (row,) = read(tiny_model, write_table([{"prompt": "ab", "answer": "cd"}]))
    assert (len(row.prompt_ids), len(row.reference_ids), row.reference) == (1 + 1 + 2 + 1, 2, "cd")
    assert row.prompt_ids[:2] == [0, 2]  # BOS, the user's turn


def test_rows_that_cannot_be_used_are_left_out(tiny_model: Path, write_table: Callable[..., Path]) -> None:
    good = {"prompt": "ask", "answer": "say"}
    bad = [{**good, "answer": None}, {**good, "answer": " "}, {**good, "prompt": None}, {**good, "answer": "x" * 600}]
    assert len(read(tiny_model, write_table([good, *bad, good]))) == 2


def test_reading_stops_with_enough_rows(tiny_model: Path, write_table: Callable[..., Path]) -> None:
    table = write_table([{"prompt": f"ask {row}", "answer": "say"} for row in range(300)])
    assert len(read(tiny_model, table, at_most=4)) == 36


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"prompt": "a", "answer": "b"}], {"reference": "gold"}, "--reference: the table has no column 'gold'; it has prompt, answer"),
        ([{"prompt": "a", "answer": "b"}], {"prompt": "question"}, "the table has no column 'question'"),
        ([{"prompt": "a", "answer": 7}], {}, "--reference: column 'answer' is int64, expected text"),
        ([{"prompt": "a", "answer": ""}, {"prompt": "a", "answer": None}], {}, "of 2 rows in .*, their references are empty"),
        ([{"prompt": "", "answer": "b"}], {}, "none has a prompt and a reference that fit the model"),
    ],
)
def test_a_table_that_cannot_judge_is_refused(
    rows: list[dict[str, Any]], changes: dict[str, Any], message: str, tiny_model: Path, write_table: Callable[..., Path]
) -> None:
    with pytest.raises(JobError, match=message):
        read(tiny_model, write_table(rows), **changes)


def test_a_table_that_is_no_parquet_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    table.write_text("no table")
    with pytest.raises(JobError, match=r"--table: .*table\.parquet cannot be read as Parquet"):
        read(tiny_model, table)


def test_a_table_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no"):
        read(tiny_model, tmp_path / "nothing.parquet")


def test_rows_that_differ_in_a_token_have_another_digest() -> None:
    assert rows_digest(rows(3)) == rows_digest(rows(3))
    assert len({rows_digest(rows(3)), rows_digest(rows(4)), rows_digest(rows(4)[1:])}) == 3
