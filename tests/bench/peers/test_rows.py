from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.bench.peers.rows import Row
from tests.bench.peers.rows import read_rows
from tests.bench.peers.rows import write_batch
from tests.bench.peers.rows import write_parquet


@pytest.mark.parametrize("num_rows", [1, 8, 12, 13, 30])
def test_every_row_is_in_one_of_at_most_twelve_files(tmp_path: Path, num_rows: int) -> None:
    rows = [Row(id=index, question=f"q{index}") for index in range(num_rows)]
    write_parquet(rows, tmp_path / "in")
    files = sorted((tmp_path / "in").iterdir())
    assert len(files) <= 12
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert found == [{"id": f"{row.id:05d}", "question": row.question} for row in rows]


def test_rows_are_numbered_by_their_lines(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": "2"}\n{"question": "c", "answer": "3"}\n')
    assert read_rows(data, 2) == [Row(id=0, question="a"), Row(id=1, question="b")]
    assert len(read_rows(data, None)) == 3


def test_batch_lines_ask_greedily_by_chat(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    write_batch([Row(id=7, question="Why?")], file, model="/m", max_tokens=128)
    assert json.loads(file.read_text()) == {
        "custom_id": "7",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "/m", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 128, "temperature": 0},
    }
