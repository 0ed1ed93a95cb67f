"""What reuse costs and saves: a rerun of a finished job with a share of its prompts edited, against the same run without reuse.

    python -m tests.bench.reuse --rows 20000 --model demo
    python -m tests.bench.reuse --rows 1000000 --index-only
    python -m tests.bench.reuse --rows 100000 --shuffle --read-only

The engine is simulated at the rates given, so what is measured is everything around it: rendering the earlier output's rows for the
index, looking requests up, reading earlier parts, committing. Both sides run in turn, in this session, on the same table, and both
outputs are proven and compared. An earlier output's rows are short prompts (`--words`); the index's seconds are measured at the rows
given, and an extrapolation to a million is marked as one. With `--shuffle` the rerun's rows come in another order, so that each unit's
answers lie in every earlier part; `--read-only` prints what looking those up and reading them costs one replica, unit after unit.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import api
from jobs.accept import accept
from jobs.accept import store
from jobs.lengths import SAMPLE_ROWS
from jobs.outputs import committed
from jobs.reuse import find_answered
from jobs.reuse import find_earlier
from jobs.reuse import index_earlier
from jobs.sample import read_sampled
from jobs.summary import RunResult
from jobs.verify import verify
from pipeline.answered import Source
from pipeline.earlier_parts import EarlierParts
from pipeline.earlier_parts import read_rows
from pipeline.segments import added_schema
from schemas.job import JobSpec
from schemas.job import parse_job

_MILLION = 1_000_000
_WORDS = ("what", "is", "the", "number", "of", "apples", "that", "remain", "after", "sharing", "them", "with", "friends", "in", "a", "town")


class Bench:
    """A table, its edited twin, and jobs over either."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        rng = np.random.default_rng(7)
        picks = rng.integers(0, len(_WORDS), (options.rows, options.words))
        asked = [f"{row}: " + " ".join(_WORDS[word] for word in words) for row, words in enumerate(picks.tolist())]
        edited = set(rng.permutation(options.rows)[: round(options.rows * options.edited)].tolist())
        self.num_edited = len(edited)
        self._write("old", asked)
        now = [text + ", please" if row in edited else text for row, text in enumerate(asked)]
        self._write("new", [now[row] for row in rng.permutation(options.rows)] if options.shuffle else now)

    def job(self, table: str, name: str, **sections: Any) -> JobSpec:
        data = {
            "model": self.options.model,
            "input": {"uri": str(self.folder / f"in-{table}"), "prompt": "prompt"},
            "output": {"uri": str(self.folder / name)},
            "sampling": {"max_tokens": self.options.max_tokens},
            "engine": {
                "kind": "simulated",
                "options": {"decode_tokens_per_s": self.options.decode, "prefill_tokens_per_s": self.options.prefill},
            },
            "cluster": {"kind": "local", "replicas": self.options.replicas},
            **sections,
        }
        return parse_job(data)

    def run(self, table: str, name: str, **sections: Any) -> tuple[RunResult, float]:
        """A run from its command to its end, and its seconds."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        began = time.monotonic()
        with open("/dev/null", "w") as nowhere:
            result = api.run(self.job(table, name, **sections), stream=nowhere)
        seconds = time.monotonic() - began
        assert result.exit_code == 0
        verdict = verify(str(self.folder / name))
        assert verdict.complete, verdict.problems
        return result, seconds

    def index(self) -> tuple[int, float]:
        """Rows of the earlier output, and the seconds that its index takes."""
        shutil.rmtree(self.folder / "indexed", ignore_errors=True)
        accepted = accept(self.job("new", "indexed", reuse=[str(self.folder / "old")]))
        earlier, accepted = find_earlier(accepted), store(accepted)
        began = time.monotonic()
        index_earlier(accepted, earlier, lambda _: None)
        return sum(one.rows for one in earlier), time.monotonic() - began

    def lookup(self) -> float:
        """Seconds in which a plan finds what of its sample is answered."""
        accepted = accept(self.job("new", "planned", reuse=[str(self.folder / "old")]))
        earlier, length = find_earlier(accepted), accepted.model.max_position_embeddings
        sampled = read_sampled(accepted.job, accepted.model, SAMPLE_ROWS, max_model_len=length, seed_base=accepted.record.fingerprint)
        began = time.monotonic()
        share = sum(find_answered(accepted, earlier, sampled, lambda _: None)) / len(sampled)
        assert abs(share - (1 - self.options.edited)) < 0.1, share
        return time.monotonic() - began

    def scattered(self) -> tuple[list[list[tuple[Source, int, list[int]]]], JobSpec]:
        """What each of as many units as the earlier output has asks its parts for, where rows come in another order; and the job."""
        (earlier,) = find_earlier(accept(self.job("new", "scattered", reuse=[str(self.folder / "old")])))
        places = [(unit.index, row) for unit in earlier.units for row in range(unit.num_rows)]
        order = np.array_split(np.random.default_rng(3).permutation(len(places)), len(earlier.units))
        asked = []
        for numbers in order:
            of_unit: defaultdict[int, list[int]] = defaultdict(list)
            for unit, row in sorted(places[number] for number in numbers.tolist()):
                of_unit[unit].append(row)
            asked.append([(earlier.source, unit, rows) for unit, rows in of_unit.items()])
        return asked, earlier.record.spec

    def _write(self, name: str, asked: Sequence[str]) -> None:
        (self.folder / f"in-{name}").mkdir()
        table = pa.table({"id": np.arange(len(asked)), "prompt": list(asked)})
        pq.write_table(table, self.folder / f"in-{name}" / "rows.parquet", row_group_size=16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--edited", type=float, default=0.05, help="share of the rows whose prompt is another now")
    parser.add_argument("--words", type=int, default=40, help="of a prompt")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--decode", type=float, default=20_000.0, help="tokens/s of a replica")
    parser.add_argument("--prefill", type=float, default=200_000.0, help="tokens/s of a replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shuffle", action="store_true", help="the rerun's rows come in another order")
    parser.add_argument("--read-only", action="store_true", help="only read answers, as the units of a shuffled table do")
    parser.add_argument("--index-only", action="store_true", help="make the earlier output with an engine that takes no time, and index it")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tokenmill-bench-"))
    try:
        bench = Bench(options, folder)
        quick = {"kind": "simulated", "options": {"decode_tokens_per_s": 1e9, "prefill_tokens_per_s": 1e9}}
        _, seconds = bench.run("old", "old", **({"engine": quick} if options.index_only or options.read_only else {}))
        print(f"earlier output: {options.rows:,} rows in {seconds:.1f} s", flush=True)
        for _ in range(options.rounds if options.read_only else 0):
            _read(bench)
        if options.read_only:
            return
        for _ in range(options.rounds):
            rows, seconds = bench.index()
            say = f"index: {rows:,} rows in {seconds:.1f} s = {rows / seconds:,.0f} rows/s"
            if rows < _MILLION:
                say += f"; 1,000,000 rows would take {_MILLION * seconds / rows:.0f} s (extrapolated)"
            print(say + f"; a plan looks its sample up in {bench.lookup():.1f} s", flush=True)
        for _ in range(0 if options.index_only else options.rounds):
            _compare(bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(bench: Bench) -> None:
    """One replica's reading of all answers, unit after unit: each time from the store, and with parts that are asked often kept."""
    asked, job = bench.scattered()
    schema, prefix, found = added_schema(job), job.output.prefix, []
    for name, read in (("each time from the store", read_rows), ("kept from the third time on", EarlierParts(bench.folder).read)):
        began, batches = time.monotonic(), []
        with ThreadPoolExecutor(8) as pool:
            for unit in asked:
                batches += list(pool.map(lambda wants, read=read: read(*wants, prefix, schema), unit))  # type: ignore[misc]
        seconds = time.monotonic() - began
        found.append(batches)
        reads = sum(map(len, asked))
        rows = sum(batch.num_rows for batch in batches)
        print(f"{name}: {rows:,} rows for {len(asked)} units, {reads:,} looks into parts, in {seconds:.2f} s", flush=True)
    assert found[0] == found[1]


def _compare(bench: Bench) -> None:
    """Both sides once, proven to come to the same."""
    whole, whole_s = bench.run("new", "whole")
    reused, reused_s = bench.run("new", "reused", reuse=[str(bench.folder / "old")])
    generated = reused.this_run.rows - reused.this_run.reused_rows
    assert generated == bench.num_edited, (generated, bench.num_edited)
    one, other = (committed(str(bench.folder / name)).read(["id", "completion"]) for name in ("whole", "reused"))
    assert pc.all(pc.equal(one.column(1), other.column(1))).as_py()
    assert one.column(0).equals(other.column(0))
    for name, result, seconds in (("whole", whole, whole_s), ("reused", reused, reused_s)):
        run = result.this_run
        kinds = ", ".join(f"{kind} {value:.1f}" for kind, value in run.seconds.items())
        print(
            f"{name}: {run.rows:,} rows, {run.rows - run.reused_rows:,} of them generated, in {seconds:.1f} s "
            f"= {run.rows / seconds:,.0f} rows/s; the units' threads spent {kinds} s",
            flush=True,
        )
    share = generated / whole.this_run.rows
    print(f"the rerun took {reused_s / whole_s:.1%} of the whole run's seconds; {share:.1%} of its rows were generated")


if __name__ == "__main__":
    main()
