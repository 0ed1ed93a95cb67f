"""Peak memory of driver, worker and verify for a small and a large table, with the simulated engine: it should not grow.

python -m tests.bench.memory --rows 10000 1000000
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_NUM_FILES = 12
_WORDS = [
    "the",
    "a",
    "new",
    "red",
    "river",
    "carries",
    "old",
    "letters",
    "from",
    "one",
    "quiet",
    "town",
    "to",
    "another",
    "where",
    "people",
    "read",
    "them",
    "by",
    "the",
    "window",
]


def write_table(folder: Path, num_rows: int) -> None:
    """Prompts of a dozen words and an id, in 12 files."""
    folder.mkdir(parents=True)
    step = -(-num_rows // _NUM_FILES)
    for index in range(_NUM_FILES):
        rows = range(index * step, min(num_rows, (index + 1) * step))
        prompts = [f"{row}: " + " ".join(_WORDS[(row * 7 + word) % len(_WORDS)] for word in range(12)) for row in rows]
        pq.write_table(pa.table({"id": list(rows), "prompt": prompts}), folder / f"{index:02d}.parquet")


def peak_kb(pid: int) -> int:
    """Resident high-water mark as the kernel counts it; 0 once the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def peaks(command: list[str]) -> tuple[float, float]:
    """Peak MB of a command's process, and of the largest of its children. Fails where it does."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    own, largest = 0, 0
    while process.poll() is None:
        own = max(own, peak_kb(process.pid))
        largest = max([largest, *(peak_kb(child) for child in children(process.pid))])
        time.sleep(0.1)
    assert process.returncode == 0, f"{' '.join(command[2:5])} ended with {process.returncode}"
    return own / 1024, largest / 1024


def measure(num_rows: int, model: str, replicas: int) -> tuple[float, float, float, float]:
    """Peak MB of the driver, of the largest worker and of `verify`, and the seconds that the run took."""
    work = Path(tempfile.mkdtemp(prefix="tokenmill-memory-"))
    try:
        write_table(work / "in", num_rows)
        command = [
            sys.executable, "-m", "jobs.cli", "run", "--model", model, "--input", str(work / "in"), "--prompt", "prompt",
            "--output", str(work / "out"), "--engine", "simulated", "--max-tokens", "32", "--replicas", str(replicas),
            "--set", "engine.options.decode_tokens_per_s=10000000", "--set", "engine.options.prefill_tokens_per_s=100000000",
        ]  # fmt: skip
        began = time.monotonic()
        driver, worker = peaks(command)
        took_s = time.monotonic() - began
        parts = sorted((work / "out").glob("part-*.parquet"))
        assert sum(pq.read_metadata(part).num_rows for part in parts) == num_rows
        verify, _ = peaks([sys.executable, "-m", "jobs.cli", "verify", str(work / "out")])
        return driver, worker, verify, took_s
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    results = []
    for num_rows in options.rows:
        driver, worker, verify, seconds = measure(num_rows, options.model, options.replicas)
        results.append((driver, worker, verify))
        print(
            f"{num_rows:>9,} rows: driver peak {driver:.0f} MB, worker peak {worker:.0f} MB, verify peak {verify:.0f} MB, "
            f"{seconds:.0f} s ({num_rows / seconds:,.0f} rows/s)",
            flush=True,
        )
    first, last = results[0], results[-1]
    print(f"growth: driver {last[0] / first[0]:.2f}x, worker {last[1] / first[1]:.2f}x, verify {last[2] / first[2]:.2f}x")


if __name__ == "__main__":
    main()
