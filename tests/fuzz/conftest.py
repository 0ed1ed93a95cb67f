"""A finished job on memory:// that fuzz tests damage and put back."""

from __future__ import annotations

import functools
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

import jobs.driver
import pipeline.replica
from jobs.api import run
from schemas.job import JobSpec
from schemas.job import parse_job

ROWS = 40
TIMES = float(os.environ.get("TOKENMILL_FUZZ", "1"))
"""TOKENMILL_FUZZ=20 looks twenty times as long."""


def examples(count: int) -> int:
    """How many, with patience."""
    return int(count * TIMES)


def damage(data: bytes, seed: int, kind: str) -> bytes:
    """Bytes flipped, or all that follows cut off; where, the seed tells. `footer` flips near the end, where Parquet keeps its map."""
    moments = random.Random(seed)
    if kind == "cut":
        return data[: moments.randrange(len(data))]
    if kind == "grown":
        return data + moments.randbytes(moments.randint(1, 64))
    if kind == "random":
        return moments.randbytes(moments.randint(0, 200))
    first = max(0, len(data) - 2048) if kind == "footer" else 0
    changed = bytearray(data)
    for _ in range(moments.randint(1, 4)):
        changed[moments.randrange(first, len(data))] ^= 1 << moments.randrange(8)
    return bytes(changed)


KIND_NAMES = ("flip", "footer", "cut", "grown", "random")
KINDS = st.sampled_from(KIND_NAMES)
SEEDS = st.integers(0, 2**32)


class Finished:
    """A job that was run to its end, and its objects as they then were."""

    def __init__(self, model: Path) -> None:
        self.fs: Any = fsspec.filesystem("memory")
        self.root = f"/fuzz-{os.getpid()}"
        self.model = model
        table = pa.table(
            {
                "id": pa.array(range(ROWS), pa.int64()),
                "prompt": [f"question {row}" for row in range(ROWS)],
                "score": [row / 3 for row in range(ROWS)],
                "tags": [[f"t{row}", None] for row in range(ROWS)],
            }
        )
        with self.fs.open(f"{self.root}/in/a.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=16)
        assert run(self.job(), stream=io.StringIO()).state == "complete"
        self._whole = {path: (file, file.getvalue()) for path, file in self.fs.store.items() if path.startswith(self.root)}

    @property
    def input_uri(self) -> str:
        return f"memory:/{self.root}/in"

    @property
    def out_uri(self) -> str:
        return f"memory:/{self.root}/out"

    @property
    def part_names(self) -> list[str]:
        return sorted(path.removeprefix(f"{self.root}/") for path in self._whole if "/part-" in path)

    def job(self, **sections: Any) -> JobSpec:
        data: dict[str, Any] = {
            "model": str(self.model),
            "input": {"uri": self.input_uri, "prompt": "prompt"},
            "output": {"uri": self.out_uri},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1e7, "prefill_tokens_per_s": 1e8}},
            "cluster": {"kind": "inline"},
            "limits": {"attempts": 1},
        }
        for key, value in sections.items():
            data[key] = {**data[key], **value}
        return parse_job(data)

    def read(self, name: str) -> bytes:
        """An object as it was when the job had ended."""
        return self._whole[f"{self.root}/{name}"][1]

    def write(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{name}", data)

    def restore(self) -> None:
        """All objects as they were, with the marks by which a change is told."""
        for path in [path for path in self.fs.store if path.startswith(self.root)]:
            del self.fs.store[path]
        for path, (file, data) in self._whole.items():
            assert file.getvalue() == data
            self.fs.store[path] = file

    def rows(self) -> list[dict[str, Any]]:
        """The output as any reader sees it."""
        names = sorted(self.fs.glob(f"{self.root}/out/part-*.parquet"))
        return [row for name in names for row in pq.read_table(io.BytesIO(self.fs.cat_file(name))).to_pylist()]

    def close(self) -> None:
        self.fs.rm(self.root, recursive=True)


@pytest.fixture(scope="module")
def finished(tiny_model: Path) -> Iterator[Finished]:
    """See Finished. One tokenizer is loaded for all runs, and no back-off is waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.replica, "load_tokenizer", functools.cache(pipeline.replica.load_tokenizer))
        patch.setattr(jobs.driver, "_BACKOFF_S", 0.001)
        made = Finished(tiny_model)
        yield made
        made.close()
