"""From the command to the first token: a table of one row, one token, so that its commit comes just after; a moment late, if anything.

python -m tests.bench.first_token --rounds 3 --model FOLDER
python -m tests.bench.first_token --rounds 3 --model FOLDER --against '{"kv_cache_memory_bytes": 3221225472}'

With --against, runs with these engine options over the others take turns with those without.
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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.manifest import META_REPORT
from schemas.manifest import UnitReport
from tests.commands import said_as_json


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=json.loads, help="engine options of the other side, as JSON")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sides: dict[str, dict[str, Any]] = {"ours": {}, **({"against": options.against} if options.against else {})}
    counted: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, given in sides.items():
            first_s, start_s = _round(options.model, given)
            if number:
                counted[name].append((first_s, start_s))
            if not options.json:
                what = f"round {number}{' (warms up)' if number == 0 else ''}, {name}"
                print(f"{what}: {first_s:.1f} s to the first token, engine start {start_s:.1f} s", flush=True)
    found = {
        name: {
            "first_token_s": statistics.median(first_s for first_s, _ in rounds),
            "engine_start_s": statistics.median(start_s for _, start_s in rounds),
            "rounds": len(rounds),
        }
        for name, rounds in counted.items()
    }
    print(json.dumps(found) if options.json else f"medians: {found}")
    return 0


def _round(model: str, engine_options: dict[str, Any]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory(prefix="tokenmill-first-") as folder:
        table, out = Path(folder, "one.parquet"), Path(folder, "out")
        pq.write_table(pa.table({"question": ["What is 6 times 7?"]}), table)
        began = time.time()
        words = ["run", "--model", model, "--input", str(table), "--prompt", "question", "--max-tokens", "1", "--output", str(out)]
        settings = [word for name, value in engine_options.items() for word in ("--set", f"engine.options.{name}={json.dumps(value)}")]
        replicas = said_as_json(*words, *settings)["account"]["replicas"]
        (part,) = out.glob("part-*.parquet")
        report = UnitReport.from_json(pq.read_metadata(part).metadata[META_REPORT])
    return report.finished_at - began, min(replica["seconds"]["start"] for replica in replicas)


if __name__ == "__main__":
    raise SystemExit(main())
