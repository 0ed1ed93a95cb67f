"""Engines alone: a prepared and tuned model against the plain one with vLLM's own defaults, the same rows in turn.

python -m tests.bench.engines --data gsm8k_test.jsonl --rows 384 --rounds 3 --tuned-model FOLDER

Output tokens a second of both sides, from the first row in to the last one out, without starts; the ratio's median. --settings is over
our profile's (see peers/raw.py), and with --against the other side is the same model with other settings over our profile's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.model import resolve_model
from tests.bench.peers.rows import read_rows
from tests.bench.peers.rows import write_parquet
from tests.bench.peers.sides import our_environment

_RAW = Path(__file__).parent / "peers" / "raw.py"
_MAX_TOKENS = 128


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tuned-model", required=True)
    parser.add_argument("--settings", default="{}", help="JSON")
    parser.add_argument("--against", help="JSON; by default the other side is the plain model with vLLM's own defaults")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = read_rows(options.data, options.rows)
    plain, tuned = resolve_model(options.model).path, resolve_model(options.tuned_model).path
    rounds, name = [], "vLLM's defaults" if options.against is None else "the other settings"
    with tempfile.TemporaryDirectory(prefix="tokenmill-engines-") as folder:
        table = Path(folder, "in")
        write_parquet(rows, table)
        for number in range(options.rounds):
            ours = _run(table, Path(folder, f"ours-{number}"), tuned, "--settings", options.settings)
            other = (plain, "--defaults") if options.against is None else (tuned, "--settings", options.against)
            theirs = _run(table, Path(folder, f"theirs-{number}"), *other)
            rounds.append((ours, theirs))
            if not options.json:
                print(f"round {number}: ours {_rate(ours):.0f}, {name} {_rate(theirs):.0f} output tokens/s", flush=True)
    found = {
        "rows": len(rows),
        "ours_output_tokens_per_s": statistics.median(_rate(ours) for ours, _ in rounds),
        "other_output_tokens_per_s": statistics.median(_rate(theirs) for _, theirs in rounds),
        "median_ratio": statistics.median(_rate(ours) / _rate(theirs) for ours, theirs in rounds),
        "our_replicas": rounds[0][0]["replicas"],
        "our_options": rounds[0][0]["options"],
    }
    print(json.dumps(found) if options.json else f"medians of {len(rounds)}: {found}")
    return 0


def _run(table: Path, output: Path, model: str, *flags: str) -> dict[str, Any]:
    command = [
        sys.executable,
        str(_RAW),
        "--input",
        str(table),
        "--output",
        str(output),
        "--model",
        model,
        "--max-tokens",
        str(_MAX_TOKENS),
    ]
    environment = {**our_environment(os.environ), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def _rate(said: dict[str, Any]) -> float:
    return float(said["output_tokens"]) / float(said["seconds"])


if __name__ == "__main__":
    raise SystemExit(main())
