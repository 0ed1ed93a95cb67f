"""The engine benchmark: a job's rows fed to replicas directly. No Dask, no Parquet out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from jobs.bench.result import BenchResult
from jobs.bench.result import Measured
from jobs.bench.rows import accept_for_bench
from jobs.bench.rows import check_comparable
from jobs.bench.rows import plan_of
from jobs.bench.rows import read_rows
from jobs.bench.rows import with_engine
from jobs.bench.setting import setting_of
from pipeline.trial import Replicas
from schemas.job import JobSpec

LIMIT_S = 24 * 3600.0
"""Of a start or a round: far beyond any that is not stuck."""
_WINDOW = "from the first request that an engine takes to the last one done; starts are not in it"


def bench_engine(job: JobSpec, *, num_rows: int | None, rounds: int, say: Callable[[str], None]) -> BenchResult:
    """Every row once a round, on replicas that stay warm. Raises JobError, EngineStartError and EngineError."""
    with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as folder:
        accepted = accept_for_bench(with_engine(job, ordering="off"), Path(folder), num_rows)  # nothing here orders or copies rows
        if rounds > 1:
            check_comparable(accepted, "several rounds")
        rows = read_rows(accepted)
        plan = plan_of(accepted)
        say(f"{len(rows.requests):,} rows, {plan.replicas} replicas")
        with Replicas(plan, accepted.model, job.engine.kind, timeout_s=LIMIT_S) as replicas:
            measured = []
            for number in range(rounds):
                measured.append(Measured.of(replicas.run(rows.requests, timeout_s=LIMIT_S)))
                say(f"round {number + 1}: {measured[-1].output_tokens_per_s:,.1f} output tokens/s in {measured[-1].elapsed_s:.1f} s")
            info = next(iter(replicas.infos.values()))
            setting = setting_of(accepted, info, replicas.start_seconds)
    return BenchResult(mode="engine", rounds=tuple(measured), setting=setting, error_rows=rows.error_rows, window=_WINDOW)
