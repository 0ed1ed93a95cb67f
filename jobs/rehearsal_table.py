"""The table that a rehearsal runs over: prompts of English, about as long as the record's, no two alike. Written in pieces."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo import demo_table
from pipeline import storage

_ROWS_PER_FILE = 50_000
_ROWS_PER_GROUP = 5_000
_FEWEST_CHARACTERS, _MOST_CHARACTERS = 120, 1_080
"""About 290 tokens of a prompt in the mean, with the demo model's tokenizer and template. Assumed: the record's prompts are under 1,024
tokens, and no more is said."""
_STEP = 7_919
"""A prime: from one row's place in the text to the next one's."""


def write_table(uri: str, num_rows: int) -> int:
    """Parquet files with columns id and prompt below a URI; returns their bytes.

    Not compressed: the text repeats, and would shrink more than anybody's prompts.
    """
    text = " ".join(str(prompt) for prompt in demo_table().column("prompt").to_pylist() if prompt)
    text = " ".join(text.split())
    size_bytes = 0
    for number, start in enumerate(range(0, num_rows, _ROWS_PER_FILE)):
        rows = range(start, min(num_rows, start + _ROWS_PER_FILE))
        buffer = io.BytesIO()
        table = pa.table({"id": pa.array(rows, pa.int64()), "prompt": list(_prompts(text, rows))})
        pq.write_table(table, buffer, compression="none", use_dictionary=False, row_group_size=_ROWS_PER_GROUP)
        storage.replace(storage.join(uri, f"prompts-{number:05d}.parquet"), buffer.getvalue())
        size_bytes += buffer.tell()
    return size_bytes


def _prompts(text: str, rows: range) -> Iterator[str]:
    for row in rows:
        length = _FEWEST_CHARACTERS + row * _STEP % (_MOST_CHARACTERS - _FEWEST_CHARACTERS + 1)
        start = row * _STEP * 13 % max(1, len(text) - length)
        yield f"{row}: {text[start : start + length]}"
