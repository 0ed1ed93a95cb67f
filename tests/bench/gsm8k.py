"""GSM8K's 1,319 questions through the pipeline, and the share of the raw engine that it reaches.

Pipeline and raw engine take turns on the same warm replicas. Raw: vLLM's add_request and step alone, in the engine's own
thread, all of its rows queued at once; the same token ids, in the same order, and each row made exactly as long as the
pipeline made it (ignore_eos, max_tokens = that length), so both sides generate the same number of tokens.

    python -m tests.bench.gsm8k --data ../shared/data/gsm8k_test.jsonl --rounds 3
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from distributed import get_worker

from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from jobs.api import make_cluster
from jobs.cluster.local import LocalCluster
from jobs.driver import Driver
from jobs.finish import finish
from jobs.verify import verify
from pipeline.engine.engine import Core
from pipeline.engine.engine import Request
from pipeline.prompts import read_prompts
from pipeline.read import read_unit
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from schemas.job import parse_job
from schemas.sampling import Sampling

_NUM_FILES = 12
_MAX_TOKENS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One side of one round."""

    output_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def write_input(data: Path, folder: Path, num_rows: int | None) -> int:
    """The questions and answers as Parquet in 12 files."""
    rows = [json.loads(line) for line in data.read_text().splitlines()][:num_rows]
    table = pa.Table.from_pylist(rows)
    folder.mkdir(parents=True)
    step = -(-table.num_rows // _NUM_FILES)
    for index in range(_NUM_FILES):
        pq.write_table(table.slice(index * step, step), folder / f"{index:02d}.parquet")
    return int(table.num_rows)


def raw_task(requests: list[tuple[list[int], int]]) -> dict[str, float]:
    """On a worker: nothing but the engine's own loop. Requests are (token ids, length to generate)."""

    def drive(core: Core) -> dict[str, float]:
        began, tokens, done = time.perf_counter(), 0, 0
        for key, (ids, length) in enumerate(requests):
            sampling = Sampling(max_tokens=length, ignore_eos=True)
            error = core.add(key, Request(position=key, token_ids=ids, sampling=sampling))
            if error is not None:
                raise RuntimeError(error.message)
        while core.busy:
            for _, generation in core.step():
                tokens += len(generation.choices[0].token_ids)
                done += 1
        return {"tokens": tokens, "rows": done, "seconds": time.perf_counter() - began}

    result: dict[str, float] = get_worker().replica.engine.borrow(drive)
    return result


def run_pipeline(accepted: Accepted, cluster: LocalCluster) -> tuple[Measured, dict[str, float], Any]:
    """One whole job on warm replicas: from the first unit's start to the last commit."""
    busy_before = {replica.name: replica.ledger.busy_s for replica in cluster.replicas() if replica.ledger is not None}
    progress = Driver(accepted, cluster).run()
    ended = time.time()
    assert progress.state == "complete", progress
    finish(accepted)
    totals = progress.totals
    assert totals.started_at is not None
    time.sleep(1.5)  # the replicas' last heartbeat
    seconds = {f"thread seconds, {kind}": value for kind, value in totals.seconds.items()}
    for replica in cluster.replicas():
        if replica.ledger is not None:
            seconds[f"engine busy, {replica.name}"] = replica.ledger.busy_s - busy_before.get(replica.name, 0.0)
    return Measured(output_tokens=totals.completion_tokens, seconds=ended - totals.started_at), seconds, totals


def lengths_of(accepted: Accepted) -> list[int]:
    """Completion tokens of every row, in input order."""
    lengths: list[int] = []
    for unit in accepted.plan.units:
        part = pq.read_table(Path(accepted.out_uri) / unit.part_name(accepted.record.fingerprint), columns=["completion_tokens"])
        lengths += part.column("completion_tokens").to_pylist()
    return lengths


def token_ids_of(accepted: Accepted, max_model_len: int) -> list[list[int]]:
    """Every row's prompt ids, in input order, made by the pipeline's own renderer."""
    renderer = Renderer(load_tokenizer(accepted.model.path), accepted.job, max_model_len=max_model_len, seed_base="bench")
    ids = []
    for unit in accepted.plan.units:
        for position, batch in read_unit(unit, accepted.record.input_schema, 256):
            for item in renderer.render(read_prompts(batch, position, accepted.job)):
                assert isinstance(item, Request)
                ids.append(item.token_ids)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_test.jsonl")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--no-raw", action="store_true", help="the pipeline alone")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tokenmill-bench-"))
    rows_in = write_input(options.data, work / "in", options.rows)

    def job(index: int) -> Accepted:
        data = {
            "name": "gsm8k",
            "model": options.model,
            "input": {"uri": str(work / "in" / "*.parquet"), "prompt": "question"},
            "output": {"uri": str(work / f"out-{index}")},
            "sampling": {"max_tokens": _MAX_TOKENS, "temperature": 0},
            "cluster": {"kind": "local", **({"replicas": options.replicas} if options.replicas else {})},
        }
        return store(accept(parse_job(data)))

    first = job(0)
    cluster = make_cluster(first)
    assert isinstance(cluster, LocalCluster)
    shares, piped, raws = [], [], []
    try:
        while len(cluster.replicas()) < cluster.num_replicas:
            time.sleep(0.2)
        print(f"replicas up after {cluster.start_seconds()} s", flush=True)
        ids = token_ids_of(first, first.model.max_position_embeddings)
        for index in range(options.rounds):
            accepted = first if index == 0 else job(index)
            pipeline, seconds, totals = run_pipeline(accepted, cluster)
            lengths = lengths_of(accepted)
            verdict = verify(accepted.out_uri)
            print(
                f"round {index + 1} pipeline: rows in {rows_in}, rows out {totals.rows} ({totals.error_rows} errors), "
                f"verify {'complete' if verdict.complete else verdict.problems}, "
                f"{totals.prompt_tokens} prompt and {totals.completion_tokens} "
                f"output tokens in {pipeline.seconds:.1f} s: {pipeline.tokens_per_s:.1f} output tokens/s",
                flush=True,
            )
            print("  " + ", ".join(f"{kind} {value:.1f} s" for kind, value in seconds.items()), flush=True)
            piped.append(pipeline.tokens_per_s)
            if options.no_raw:
                continue
            raw = run_raw(cluster, ids, lengths)
            raws.append(raw.tokens_per_s)
            shares.append(pipeline.tokens_per_s / raw.tokens_per_s)
            print(
                f"round {index + 1} raw engine: {raw.output_tokens} output tokens in {raw.seconds:.1f} s: "
                f"{raw.tokens_per_s:.1f} output tokens/s; pipeline / raw = {shares[-1]:.3f}",
                flush=True,
            )
    finally:
        cluster.close()
        shutil.rmtree(work, ignore_errors=True)
    print(f"pipeline, median of {len(piped)}: {statistics.median(piped):.1f} output tokens/s")
    if shares:
        print(f"raw engine, median of {len(raws)}: {statistics.median(raws):.1f} output tokens/s")
        print(f"share of raw engine, median of {len(shares)}: {statistics.median(shares):.3f}")


def run_raw(cluster: LocalCluster, ids: list[list[int]], lengths: list[int]) -> Measured:
    """All replicas at once, each with every nth row; the slowest one's time counts."""
    names = [replica.name for replica in cluster.replicas()]
    work = list(zip(ids, lengths, strict=True))
    futures = [cluster.client.submit(raw_task, work[index :: len(names)], workers=[name], pure=False) for index, name in enumerate(names)]
    results = [future.result() for future in futures]
    return Measured(output_tokens=int(sum(r["tokens"] for r in results)), seconds=max(r["seconds"] for r in results))


if __name__ == "__main__":
    main()
