"""What each side wrote: its output in, answers out, and whether every row is there. Knows no engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.bench.peers.rows import Row


class BadOutput(Exception):
    """A side's output lacks a row, has one twice, or has one without a completion: its time counts for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One row's completion."""

    id: int
    text: str
    num_tokens: int | None
    """None where the peer does not tell."""


def check(rows: Sequence[Row], answers: Sequence[Answer], *, max_tokens: int) -> None:
    """Raises BadOutput naming the first rows that are missing, doubled, foreign, empty or of an impossible length."""
    counts = Counter(answer.id for answer in answers)
    expected = {row.id for row in rows}
    problems = {
        "missing": sorted(expected - counts.keys()),
        "foreign": sorted(counts.keys() - expected),
        "doubled": sorted(id for id, count in counts.items() if count > 1),
        "empty": sorted(answer.id for answer in answers if not answer.text.strip()),
        f"not of 1 to {max_tokens} tokens": sorted(
            answer.id for answer in answers if answer.num_tokens is not None and not 1 <= answer.num_tokens <= max_tokens
        ),
    }
    found = [f"{len(ids)} rows {what} ({', '.join(map(str, ids[:5]))})" for what, ids in problems.items() if ids]
    if found:
        raise BadOutput(f"of {len(rows)} rows: {'; '.join(found)}")


def same_text(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    """Rows whose text is the same on both sides. Greedy rows may differ by rounding, but most must agree where all settings do."""
    texts = {answer.id: answer.text.strip() for answer in left}
    return sum(texts.get(answer.id) == answer.text.strip() for answer in right)


def read_ours(folder: Path) -> list[Answer]:
    """Tokenmill's parts; a row with an error has no text and is found by `check`."""
    return _from_table(folder, "part-*.parquet", text="completion", num_tokens="completion_tokens")


def read_ray(folder: Path) -> list[Answer]:
    return _from_table(folder, "*.parquet", text="completion", num_tokens="num_tokens")


def read_daft(folder: Path) -> list[Answer]:
    """Daft's vLLM provider gives text alone."""
    return _from_table(folder, "*.parquet", text="completion", num_tokens=None)


def read_openvino(folder: Path) -> list[Answer]:
    return _from_table(folder, "*.parquet", text="completion", num_tokens="num_tokens")


def read_datatrove(folder: Path) -> list[Answer]:
    """datatrove keeps what the rollout returned in the document's metadata, one list entry a rollout."""
    answers = []
    for row in _rows(folder, "*.parquet"):
        (result,) = row["rollout_results"]
        answers.append(Answer(id=int(row["id"]), text=result["text"], num_tokens=result["usage"]["completion_tokens"]))
    return answers


def read_run_batch(file: Path) -> list[Answer]:
    """OpenAI batch results; a line with an error has no text and is found by `check`."""
    answers = []
    for line in file.read_text().splitlines():
        item = json.loads(line)
        body = (item.get("response") or {}).get("body") or {}
        choices = body.get("choices") or [{"message": {"content": ""}}]
        tokens = (body.get("usage") or {}).get("completion_tokens")
        answers.append(Answer(id=int(item["custom_id"]), text=choices[0]["message"]["content"] or "", num_tokens=tokens))
    return answers


def _rows(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.rglob(pattern)) for row in pq.read_table(file, partitioning=None).to_pylist()]


def _from_table(folder: Path, pattern: str, *, text: str, num_tokens: str | None) -> list[Answer]:
    return [
        Answer(id=int(row["id"]), text=row[text] or "", num_tokens=row[num_tokens] if num_tokens else None)
        for row in _rows(folder, pattern)
    ]
