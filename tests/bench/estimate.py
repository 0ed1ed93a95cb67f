"""What `tokenmill plan --canary` says of a job, and what the job then takes: output tokens and wall seconds, predicted over measured.

python -m tests.bench.estimate --data ../shared/data/gsm8k_test.jsonl --canary 64 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.commands import said_as_json


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_test.jsonl")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--canary", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rounds = [_round(options) for _ in range(options.rounds)]
    for number, found in enumerate(rounds, start=1):
        if not options.json:
            print(
                f"round {number}: output tokens {found['predicted_tokens']:,.0f} predicted, {found['tokens']:,} measured, "
                f"{found['tokens_ratio']:.3f}; wall {found['predicted_s']:,.1f} s predicted, {found['wall_s']:,.1f} s measured, "
                f"{found['wall_ratio']:.3f} (the canary itself took {found['canary_s']:.0f} s)"
            )
    medians = {key: statistics.median(found[key] for found in rounds) for key in ("tokens_ratio", "wall_ratio")}
    print(json.dumps({"rounds": rounds, **medians}, indent=1) if options.json else f"medians: {medians}")
    return 0


def _round(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tokenmill-estimate-") as folder:
        table = Path(folder) / "gsm8k.parquet"
        rows = [json.loads(line) for line in options.data.read_text().splitlines()][: options.rows]
        pq.write_table(pa.Table.from_pylist(rows), table)
        job = ["--model", options.model, "--input", str(table), "--prompt", "question", "--max-tokens", str(options.max_tokens)]
        job += ["--output", str(Path(folder) / "out")]
        began = time.monotonic()
        planned = said_as_json("plan", *job, "--canary", str(options.canary), "--nodes", "1")["estimate"]
        canary_s = time.monotonic() - began
        (here,) = [offer for offer in planned["offers"] if offer["basis"] == "canary"]
        began = time.monotonic()
        result = said_as_json("run", *job)
        wall_s = time.monotonic() - began
    tokens = result["completion_tokens"]
    predicted_tokens, predicted_s = planned["tokens"]["output"]["value"], here["hours"]["value"] * 3600
    return {
        "predicted_tokens": predicted_tokens,
        "tokens": tokens,
        "tokens_ratio": predicted_tokens / tokens,
        "predicted_s": predicted_s,
        "wall_s": wall_s,
        "wall_ratio": predicted_s / wall_s,
        "canary_s": canary_s,
        "cost": planned["canary"]["cost"],
    }


if __name__ == "__main__":
    sys.exit(main())
