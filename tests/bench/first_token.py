"""From the command to the first token: a table of one row, one token, so that its commit comes just after; a moment late, if anything.

python -m tests.bench.first_token --rounds 3 --model FOLDER

Seconds to the row's commit, by the part's own report, and of them the engine's start as its replica says it; the rest is the
command itself, the cluster, and one row's way through. The first round may find caches cold and is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.manifest import META_REPORT
from schemas.manifest import UnitReport
from tests.commands import said_as_json


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rounds = [_round(options.model) for _ in range(options.rounds + 1)]
    for number, (first_s, start_s) in enumerate(rounds):
        if not options.json:
            print(f"round {number}{' (warms up)' if number == 0 else ''}: {first_s:.1f} s to the first token, engine start {start_s:.1f} s")
    counted = rounds[1:]
    found = {
        "first_token_s": statistics.median(first_s for first_s, _ in counted),
        "engine_start_s": statistics.median(start_s for _, start_s in counted),
        "rounds": len(counted),
    }
    print(json.dumps(found) if options.json else f"medians of {len(counted)}: {found}")
    return 0


def _round(model: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="tokenmill-first-") as folder:
        table, out = Path(folder, "one.parquet"), Path(folder, "out")
        pq.write_table(pa.table({"question": ["What is 6 times 7?"]}), table)
        began = time.time()
        words = ["run", "--model", model, "--input", str(table), "--prompt", "question", "--max-tokens", "1", "--output", str(out)]
        replicas = said_as_json(*words)["account"]["replicas"]
        (part,) = out.glob("part-*.parquet")
        report = UnitReport.from_json(pq.read_metadata(part).metadata[META_REPORT])
    return report.finished_at - began, min(replica["seconds"]["start"] for replica in replicas)


if __name__ == "__main__":
    raise SystemExit(main())
