"""GSM8K's 1,319 questions through the pipeline, and the share of the raw engine that it reaches; see jobs/bench/pipeline.py.

python -m tests.bench.gsm8k --data ../shared/data/gsm8k_test.jsonl --rounds 3 --set engine.options.max_num_seqs=256
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jobs.bench.pipeline import bench_pipeline
from jobs.bench.result import print_result
from jobs.cli.group import put_settings
from schemas.job import parse_job

_NUM_FILES = 12
_MAX_TOKENS = 128


def write_input(data: Path, folder: Path, num_rows: int | None) -> None:
    """The questions and answers as Parquet in 12 files."""
    rows = [json.loads(line) for line in data.read_text().splitlines()][:num_rows]
    table = pa.Table.from_pylist(rows)
    folder.mkdir(parents=True)
    step = -(-table.num_rows // _NUM_FILES)
    for index in range(_NUM_FILES):
        pq.write_table(table.slice(index * step, step), folder / f"{index:02d}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_test.jsonl")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any other field of a job file")
    parser.add_argument("--no-raw", action="store_true", help="the pipeline alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenmill-gsm8k-") as work:
        write_input(options.data, Path(work, "in"), options.rows)
        data: dict[str, Any] = {
            "name": "gsm8k",
            "model": options.model,
            "input": {"uri": str(Path(work, "in", "*.parquet")), "prompt": "question"},
            "output": {"uri": str(Path(work, "out"))},
            "sampling": {"max_tokens": _MAX_TOKENS, "temperature": 0},
            "cluster": {"kind": "local", "replicas": options.replicas},
        }
        put_settings(data, options.set)
        result = bench_pipeline(
            parse_job(data),
            num_rows=None,
            rounds=options.rounds,
            with_raw=not options.no_raw,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    if options.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        print_result(result, Console())


if __name__ == "__main__":
    main()
