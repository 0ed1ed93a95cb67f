"""What order and size of work cost or save, each against its opposite, in turns, on real vLLM.

    python -m tests.bench.ordering duplicates --data ../shared/data/gsm8k_test.jsonl
    python -m tests.bench.ordering prefix     --data ../shared/data/gsm8k_test.jsonl
    python -m tests.bench.ordering units      --data ../shared/data/gsm8k_test.jsonl
    python -m tests.bench.ordering tail       --data ../shared/data/gsm8k_test.jsonl --trace ../shared/data/azure_llm_trace_2023_conv.csv

duplicates: every question twice, far from its like; ordering auto against off.
prefix: every question after the same 600 tokens; ordering auto against off, which has no prefix cache either.
units: the same rows in units of a tenth, of the usual size, and of ten times that.
tail: prompts and completions as long as in the Azure conversation trace (together up to 2,048 tokens), 64 rows in a replica's batch;
which share of the engines' seconds was the tail, longest first and in input order.

A round starts engines of its own; what is timed is the generating, from the first unit's start to the last commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import api
from jobs import plan
from jobs.summary import RunResult
from jobs.verify import verify
from pipeline.model import resolve_model
from pipeline.render import load_tokenizer
from schemas.job import parse_job

_PREFIX_TOKENS = 600
_TRACE_TOKENS = 2048


class Bench:
    """One table, run in several ways."""

    def __init__(self, options: argparse.Namespace, rows: list[dict[str, Any]], **job: Any) -> None:
        self.options, self.job = options, job
        self.engine_options = {**job.get("engine_options", {}), **json.loads(options.engine_options)}
        self.folder = Path(tempfile.mkdtemp(prefix="tokenmill-bench-"))
        self.rows = len(rows)
        (self.folder / "in").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), self.folder / "in" / "rows.parquet", row_group_size=64)

    def run(self, name: str, **engine: Any) -> RunResult:
        out = self.folder / f"out-{name}-{random.randrange(1 << 30)}"
        data = {
            "model": self.options.model,
            "input": {"uri": str(self.folder / "in"), "prompt": "prompt", **self.job.get("input", {})},
            "output": {"uri": str(out)},
            "sampling": {"max_tokens": self.options.max_tokens, "temperature": 0},
            "engine": {"kind": self.options.engine, **engine, "options": self.engine_options},
            "cluster": {"kind": "local", **({"replicas": self.options.replicas} if self.options.replicas else {})},
        }
        with open("/dev/null", "w") as nowhere:
            result = api.run(parse_job(data), stream=nowhere)
        verdict = verify(str(out))
        assert verdict.complete, verdict.problems
        assert result.this_run.rows == self.rows
        run = result.this_run
        print(
            f"  {name}: {run.rows} rows, {run.prompt_tokens} prompt and {run.completion_tokens} output tokens ({run.copied_tokens} copied) "
            f"in {result.generate_s:.1f} s = {result.output_tokens_per_s:.1f} output tokens/s",
            flush=True,
        )
        shutil.rmtree(out)
        return result

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def questions(options: argparse.Namespace) -> list[str]:
    rows = [json.loads(line)["question"] for line in options.data.read_text().splitlines()]
    return rows[: options.rows]


def against_off(bench: Bench, rounds: int) -> None:
    gains = []
    for _ in range(rounds):
        off, auto = bench.run("off", ordering="off"), bench.run("auto", ordering="auto")
        gains.append(off.generate_s / auto.generate_s)
    print(f"ordering off / auto, seconds, median of {len(gains)}: {statistics.median(gains):.2f} {[round(gain, 2) for gain in gains]}")


def duplicates(options: argparse.Namespace) -> None:
    half = questions(options)
    twice = half + half
    random.Random(7).shuffle(twice)
    bench = Bench(options, [{"prompt": text} for text in twice])
    try:
        against_off(bench, options.rounds)
    finally:
        bench.close()


def prefix(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(resolve_model(options.model).path)
    text = " ".join(json.loads(line)["question"] for line in options.data.read_text().splitlines()[-40:])
    ids = tokenizer(text)["input_ids"][:_PREFIX_TOKENS]
    before = tokenizer.decode(ids)
    bench = Bench(options, [{"prompt": f"{before}\n\n{question}"} for question in questions(options)])
    try:
        against_off(bench, options.rounds)
    finally:
        bench.close()


@contextmanager
def unit_size(factor: float) -> Iterator[None]:
    usual = plan._MIN_UNITS, plan._MIN_UNIT_ROWS
    plan._MIN_UNITS, plan._MIN_UNIT_ROWS = max(1, round(usual[0] / factor)), max(1, round(usual[1] * min(1.0, factor)))
    try:
        yield
    finally:
        plan._MIN_UNITS, plan._MIN_UNIT_ROWS = usual


def units(options: argparse.Namespace) -> None:
    bench = Bench(options, [{"prompt": text} for text in questions(options)])
    speeds: dict[str, list[float]] = {}
    try:
        for _ in range(options.rounds):
            for name, factor in (("a tenth", 0.1), ("usual", 1.0), ("ten times", 10.0)):
                with unit_size(factor):
                    result = bench.run(name)
                print(f"    {result.units} units")
                speeds.setdefault(name, []).append(result.output_tokens_per_s)
    finally:
        bench.close()
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, speed in medians.items():
        print(f"units of {name} size: {speed:.1f} output tokens/s, {speed / medians['usual']:.3f} of the usual")


def trace_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts cut from real text to the trace's lengths; each row generates as many tokens as the trace says."""
    tokenizer = load_tokenizer(resolve_model(options.model).path)
    text = " ".join(json.loads(line)["question"] for line in options.data.read_text().splitlines())
    ids = tokenizer(text, verbose=False)["input_ids"]
    with options.trace.open() as file:
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    fitting = [pair for pair in lengths if pair[0] + pair[1] <= _TRACE_TOKENS - 64 and pair[1] > 0]
    chosen = random.Random(11).sample(fitting, options.rows or 400)
    rows = []
    for number, (context, generated) in enumerate(chosen):
        start = (number * 997) % (len(ids) - context)
        own = {"max_tokens": generated, "ignore_eos": True}
        rows.append({"prompt": tokenizer.decode(ids[start : start + context]), "own": json.dumps(own)})
    return rows


def tail(options: argparse.Namespace) -> None:
    rows = trace_rows(options)
    lengths = [json.loads(row["own"])["max_tokens"] for row in rows]
    print(f"{len(rows)} rows, completions of {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}")
    engine_options = {"max_num_seqs": 64, **({"max_model_len": _TRACE_TOKENS} if options.engine == "vllm" else {})}
    bench = Bench(options, rows, input={"sampling": "own", "chat": False}, engine_options=engine_options)
    try:
        for _ in range(options.rounds):
            for ordering in ("off", "auto"):
                result = bench.run(ordering, ordering=ordering)
                assert result.account is not None
                for replica in result.account.replicas:
                    seconds = replica.seconds
                    engine_s = sum(value for kind, value in seconds.items() if kind != "start")
                    shown = ", ".join(f"{kind} {value:.1f}" for kind, value in seconds.items())
                    print(f"    {replica.name}: {shown}; tail {seconds['tail'] / engine_s:.1%} of the engine's {engine_s:.1f} s")
    finally:
        bench.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["duplicates", "prefix", "units", "tail"])
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_test.jsonl")
    parser.add_argument("--trace", type=Path, help="azure_llm_trace_2023_conv.csv, for tail")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, help="only so many")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--engine", default="vllm", help="simulated: for a look at what order alone does")
    parser.add_argument("--engine-options", default="{}", help="JSON")
    options = parser.parse_args()
    {"duplicates": duplicates, "prefix": prefix, "units": units, "tail": tail}[options.what](options)


if __name__ == "__main__":
    main()
