"""The bench's rows: JSON lines in, the natural inputs of all sides out. Knows no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_FILES = 12
"""Several, so that a peer that reads file by file may do so in parallel, and Ray has blocks enough to keep its engine's batch full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One question. `id` is its line, from 0."""

    id: int
    question: str


def read_rows(data: Path, num_rows: int | None) -> list[Row]:
    """The first rows of a JSON-lines file whose objects have a `question`."""
    lines = data.read_text().splitlines()[:num_rows]
    return [Row(id=index, question=json.loads(line)["question"]) for index, line in enumerate(lines)]


def write_parquet(rows: Sequence[Row], folder: Path) -> None:
    """Columns id and question, in at most NUM_FILES files of equal length. An id is text: datatrove's writer drops the id 0."""
    folder.mkdir(parents=True)
    table = pa.table({"id": [f"{row.id:05d}" for row in rows], "question": [row.question for row in rows]})
    step = -(-table.num_rows // NUM_FILES)
    for index, start in enumerate(range(0, table.num_rows, step)):
        pq.write_table(table.slice(start, step), folder / f"{index:02d}.parquet")


def write_batch(rows: Sequence[Row], file: Path, *, model: str, max_tokens: int) -> None:
    """OpenAI's batch format, which is what `vllm run-batch` reads."""
    with file.open("w") as written:
        for row in rows:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": row.question}],
                "max_tokens": max_tokens,
                "temperature": 0,
            }
            line = {"custom_id": str(row.id), "method": "POST", "url": "/v1/chat/completions", "body": body}
            written.write(json.dumps(line) + "\n")
