from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bench.peers.outputs import Answer
from tests.bench.peers.outputs import BadOutput
from tests.bench.peers.outputs import check
from tests.bench.peers.outputs import read_datatrove
from tests.bench.peers.outputs import read_ours
from tests.bench.peers.outputs import read_ray
from tests.bench.peers.outputs import read_run_batch
from tests.bench.peers.outputs import same_text
from tests.bench.peers.rows import Row

_ROWS = [Row(id=index, question=f"What is {index}?") for index in range(3)]


def _answers(*ids: int, text: str = "a number", num_tokens: int | None = 2) -> list[Answer]:
    return [Answer(id=id, text=text, num_tokens=num_tokens) for id in ids]


def test_whole_output_passes_in_any_order() -> None:
    check(_ROWS, _answers(2, 0, 1), max_tokens=2)
    check(_ROWS, _answers(0, 1, 2, num_tokens=None), max_tokens=2)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (_answers(0, 1), "1 rows missing (2)"),
        (_answers(0, 1, 2, 1), "1 rows doubled (1)"),
        (_answers(0, 1, 2, 7), "1 rows foreign (7)"),
        (_answers(0, 1) + _answers(2, text=" \n"), "1 rows empty (2)"),
        (_answers(0, 1) + _answers(2, num_tokens=3), "1 rows not of 1 to 2 tokens (2)"),
        (_answers(0, 1) + _answers(2, num_tokens=0), "1 rows not of 1 to 2 tokens (2)"),
    ],
)
def test_bad_output_names_its_rows(answers: list[Answer], message: str) -> None:
    with pytest.raises(BadOutput) as caught:
        check(_ROWS, answers, max_tokens=2)
    assert str(caught.value) == f"of 3 rows: {message}"


def test_same_text_goes_by_id_and_forgives_space_at_the_ends() -> None:
    left = [Answer(id=0, text="four", num_tokens=1), Answer(id=1, text="five", num_tokens=1)]
    right = [Answer(id=1, text=" five\n", num_tokens=1), Answer(id=0, text="4", num_tokens=1), Answer(id=9, text="four", num_tokens=1)]
    assert same_text(left, right) == 1


def test_an_error_row_of_ours_counts_as_empty(tmp_path: Path) -> None:
    table = pa.table({"id": [0, 1], "completion": ["four", None], "completion_tokens": [1, 0]})
    pq.write_table(table, tmp_path / "part-00000000-aa.parquet")
    answers = read_ours(tmp_path)
    assert answers == [Answer(id=0, text="four", num_tokens=1), Answer(id=1, text="", num_tokens=0)]
    with pytest.raises(BadOutput, match="1 rows empty"):
        check(_ROWS[:2], answers, max_tokens=2)


def test_all_files_of_a_folder_are_read(tmp_path: Path) -> None:
    for index in range(2):
        pq.write_table(pa.table({"id": [index], "completion": ["four"], "num_tokens": [1]}), tmp_path / f"{index}.parquet")
    assert read_ray(tmp_path) == _answers(0, 1, text="four", num_tokens=1)


def test_datatrove_keeps_answers_in_the_metadata(tmp_path: Path) -> None:
    rollout = {"text": "four", "finish_reason": "stop", "usage": {"completion_tokens": 2, "prompt_tokens": 9}}
    pq.write_table(pa.Table.from_pylist([{"text": "What is 0?", "id": "00000", "rollout_results": [rollout]}]), tmp_path / "00000.parquet")
    assert read_datatrove(tmp_path) == [Answer(id=0, text="four", num_tokens=2)]


def test_run_batch_lines_are_read_and_one_with_an_error_is_empty(tmp_path: Path) -> None:
    good = {"choices": [{"message": {"content": "four"}}], "usage": {"completion_tokens": 2}}
    lines = [
        {"custom_id": "0", "response": {"status_code": 200, "body": good}, "error": None},
        {"custom_id": "1", "response": {"status_code": 400, "body": None}, "error": {"message": "too long"}},
    ]
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run_batch(file) == [Answer(id=0, text="four", num_tokens=2), Answer(id=1, text="", num_tokens=None)]
