"""The pipeline benchmark: Parquet to Parquet, and what share of the raw engine that reaches.

Pipeline and raw engine take turns on the same warm replicas. Raw: the bare loop in the engine's own thread, all of its rows queued
at once; the same token ids in the same order, each row made exactly as long as the pipeline made it, so that both sides generate
the same number of tokens. That holds only where no row is copied, so engine.ordering is off where raw is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from jobs.api import make_cluster
from jobs.bench.result import BenchResult
from jobs.bench.result import Measured
from jobs.bench.result import ReplicaMeasured
from jobs.bench.rows import accept_for_bench
from jobs.bench.rows import check_comparable
from jobs.bench.rows import into
from jobs.bench.rows import read_rows
from jobs.bench.rows import with_engine
from jobs.bench.setting import setting_of
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.local import LocalCluster
from jobs.driver import Driver
from jobs.driver import Progress
from jobs.finish import finish
from jobs.verify import verify
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import Request
from schemas.completions import COMPLETION_TOKENS
from schemas.errors import EngineDead
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.errors import UnitError
from schemas.job import JobSpec

_POLL_S = 0.1
_HEARTBEAT_S = 1.5
"""After which a replica's last counters are here."""
_WINDOW = "from the first read to the last commit, on replicas that are up"


def bench_pipeline(job: JobSpec, *, num_rows: int | None, rounds: int, with_raw: bool, say: Callable[[str], None]) -> BenchResult:
    """Raises JobError, EngineStartError, and EngineDead or UnitError where a round did not run through."""
    if with_raw and job.sampling.n > 1:
        raise JobError(f"sampling.n: found {job.sampling.n}; raw rows are made as long as the pipeline's, which needs n: 1 (or --no-raw)")
    with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as folder:
        work = Path(folder)
        first = accept_for_bench(with_engine(job, ordering="off") if with_raw else job, work, num_rows)
        # What one round leaves in a prefix cache, or in the answers that are copied, would spare the next one its work.
        fresh = first.job.engine.ordering != "off"
        if not fresh and (with_raw or rounds > 1):
            check_comparable(first, "pipeline and raw engine" if with_raw else "several rounds")
        rows = read_rows(first)
        measured: list[Measured] = []
        raw: list[Measured] = []
        for count in [1] * rounds if fresh else [rounds]:
            with _replicas_up(first) as cluster:
                say(f"{cluster.num_replicas} replicas are up")
                for _ in range(count):
                    accepted = store(accept(into(first.job, work / f"out-{len(measured)}")))
                    measured.append(_run_once(accepted, cluster))
                    text = f"round {len(measured)}: pipeline {measured[-1].output_tokens_per_s:,.1f} output tokens/s"
                    if with_raw:
                        raw.append(_run_raw(cluster, as_long(rows.requests, _lengths(accepted))))
                        _check_same(measured[-1], raw[-1])
                        share = measured[-1].output_tokens_per_s / raw[-1].output_tokens_per_s
                        text += f", raw engine {raw[-1].output_tokens_per_s:,.1f}: {share:.3f}"
                    say(text)
                setting = setting_of(first, EngineInfo(**cluster.replicas()[0].engine), cluster.start_seconds())
    return BenchResult(mode="pipeline", rounds=tuple(measured), raw=tuple(raw), setting=setting, error_rows=rows.error_rows, window=_WINDOW)


def as_long(requests: Sequence[Request], lengths: Sequence[int]) -> list[Request]:
    """The requests that generated something, each made exactly so long. Lengths are those of all rows of the table, by position."""
    free: dict[str, Any] = {"ignore_eos": True, "min_tokens": 0, "stop": [], "stop_token_ids": []}
    return [
        replace(request, sampling=request.sampling.model_copy(update={**free, "max_tokens": lengths[request.position]}))
        for request in requests
        if lengths[request.position]
    ]


@contextmanager
def _replicas_up(accepted: Accepted) -> Iterator[LocalCluster]:
    """A cluster whose replicas are all ready. Raises EngineStartError."""
    cluster = make_cluster(accepted)
    assert isinstance(cluster, LocalCluster)
    whole = False
    try:
        while len(cluster.replicas()) < cluster.num_replicas:
            if reasons := cluster.given_up():
                raise EngineStartError("; ".join(f"replica {name}: {why}" for name, why in reasons.items()))
            time.sleep(_POLL_S)
        yield cluster
        whole = True
    finally:
        cluster.close(at_once=not whole)


def _run_once(accepted: Accepted, cluster: LocalCluster) -> Measured:
    """One whole job on warm replicas."""
    before = {replica.name: replica for replica in cluster.replicas()}
    progress = Driver(accepted, cluster).run(lambda progress: _check_smooth(progress, cluster))
    ended = time.time()
    _check_smooth(progress, cluster)
    if progress.state != "complete":
        raise UnitError(f"the round ended as {progress.state}: {'; '.join(progress.failed.values())}")
    finish(accepted)
    if not (verdict := verify(accepted.out_uri)).complete:
        raise UnitError(f"the round's output is not whole: {'; '.join(verdict.problems[:5])}")
    totals = progress.totals
    assert totals.started_at is not None
    elapsed_s = ended - totals.started_at
    time.sleep(_HEARTBEAT_S)
    while any(replica.in_flight for replica in cluster.replicas()):
        time.sleep(_POLL_S)  # a unit that took long was run twice, and its other copy is still at it
    return Measured(
        rows=totals.rows,
        prompt_tokens=totals.prompt_tokens,
        output_tokens=totals.completion_tokens,
        elapsed_s=elapsed_s,
        replicas=tuple(_since(before[replica.name], replica, elapsed_s) for replica in cluster.replicas()),
    )


def _check_smooth(progress: Progress, cluster: LocalCluster) -> None:
    """Raises UnitError as soon as something is done twice."""
    if progress.retries:
        time.sleep(_HEARTBEAT_S)  # a unit comes back sooner than word of why its replica went
        why = "; ".join([*progress.failed.values(), *progress.notes, *cluster.notes()]) or "units were tried again"
        raise UnitError(f"the round did not run through at the first try, so its seconds would say nothing: {why}")


def _since(before: ReplicaState, now: ReplicaState, elapsed_s: float) -> ReplicaMeasured:
    return ReplicaMeasured(
        name=now.name,
        rows=now.rows - before.rows,
        prompt_tokens=now.prompt_tokens - before.prompt_tokens,
        output_tokens=now.completion_tokens - before.completion_tokens,
        seconds=elapsed_s,
    )


def _lengths(accepted: Accepted) -> list[int]:
    """Completion tokens of every row, in input order."""
    column, lengths = accepted.job.output.prefix + COMPLETION_TOKENS, []
    for unit in accepted.plan.units:
        part = pq.read_table(Path(accepted.out_uri, unit.part_name(accepted.record.fingerprint)), columns=[column])
        lengths += [length or 0 for length in part.column(column).to_pylist()]
    return lengths


def _run_raw(cluster: LocalCluster, requests: Sequence[Request]) -> Measured:
    """All replicas at once, each with every nth row; see jobs.bench.raw."""
    from jobs.bench.raw import raw_task

    names = [replica.name for replica in cluster.replicas()]
    shares = [requests[index :: len(names)] for index in range(len(names))]
    futures = [cluster.client.submit(raw_task, share, workers=[name], pure=False) for name, share in zip(names, shares, strict=True)]
    try:
        results = [future.result() for future in futures]
    except Exception as error:  # Dask wraps what a lost worker leaves behind in errors of its own
        raise EngineDead(f"the raw engine's round failed: {'; '.join(cluster.notes()) or f'{type(error).__name__}: {error}'}") from error
    replicas = tuple(
        ReplicaMeasured(
            name=name,
            rows=said["rows"],
            prompt_tokens=said["prompt_tokens"],
            output_tokens=said["output_tokens"],
            seconds=said["ended"] - said["began"],
        )
        for name, said in zip(names, results, strict=True)
    )
    return Measured(
        rows=sum(replica.rows for replica in replicas),
        prompt_tokens=sum(replica.prompt_tokens for replica in replicas),
        output_tokens=sum(replica.output_tokens for replica in replicas),
        elapsed_s=max(said["ended"] for said in results) - min(said["began"] for said in results),
        replicas=replicas,
    )


def _check_same(pipeline: Measured, raw: Measured) -> None:
    if pipeline.output_tokens != raw.output_tokens:
        raise JobError(
            f"the raw engine made {raw.output_tokens} output tokens where the pipeline made {pipeline.output_tokens}: rows of this job "
            "cannot be made exactly as long by max_tokens alone (structured_outputs?); use --no-raw"
        )
