"""Metrics of a run, as its driver sees it, for Prometheus. The driver tells, every few seconds; whoever asks gets what it told last."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import InfoMetricFamily
from prometheus_client.registry import Collector

from jobs.driver import Progress
from pipeline.metrics import Server
from schemas.job import ClusterSpec
from schemas.job import JobSpec
from schemas.ledger import KINDS
from schemas.ledger import RunAccount


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A run at one moment. Counts are of this run; `rows_done` and `units_done` of the whole output."""

    state: str
    rows: int
    prompt_tokens: int
    output_tokens: int
    errors: Mapping[str, int] = field(default_factory=dict)
    """Rows by kind."""
    engine_seconds: Mapping[str, float] = field(default_factory=dict)
    """By kind, over all replicas."""
    retries: int = 0
    units_in_flight: int = 0
    units_failed: int = 0
    units_done: int = 0
    units: int = 0
    rows_done: int = 0
    rows_planned: int = 0
    replicas: int = 0
    usd: float | None = None


def snapshot(progress: Progress, account: RunAccount) -> Snapshot:
    """What can be said of a run now."""
    totals = progress.totals
    return Snapshot(
        state=progress.state,
        rows=totals.rows,
        prompt_tokens=totals.prompt_tokens,
        output_tokens=totals.completion_tokens,
        errors=dict(totals.errors),
        engine_seconds={kind: sum(replica.seconds.get(kind, 0.0) for replica in account.replicas) for kind in KINDS},
        retries=progress.retries,
        units_in_flight=progress.units_in_flight,
        units_failed=len(progress.failed),
        units_done=progress.done_before + totals.units,
        units=progress.total_units,
        rows_done=progress.rows_before + totals.rows,
        rows_planned=progress.total_rows,
        replicas=len(progress.replicas),
        usd=progress.usd,
    )


class RunMetrics(Collector):
    """What a driver told last, labelled with its job's name. Safe to be asked from any thread."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._told: Snapshot | None = None

    def tell(self, told: Snapshot) -> None:
        self._told = told

    def collect(self) -> Iterator[Metric]:
        if self._told is not None:
            yield from run_families(self._job, self._told)

    def describe(self) -> Iterable[Metric]:
        return []


def run_families(job: str, told: Snapshot) -> Iterator[Metric]:
    """A snapshot as metrics. The label is `job_name`: Prometheus gives every series a `job` of its own."""
    for name, what, count in (
        ("rows", "Rows committed by this run.", told.rows),
        ("prompt_tokens", "Prompt tokens of those rows.", told.prompt_tokens),
        ("output_tokens", "Output tokens of those rows.", told.output_tokens),
        ("unit_retries", "Units that were tried again.", told.retries),
    ):
        counter = CounterMetricFamily(f"tokenmill_run_{name}", what, labels=["job_name"])
        counter.add_metric([job], count)
        yield counter
    failed = CounterMetricFamily("tokenmill_run_error_rows", "Error rows committed by this run, by kind.", labels=["job_name", "kind"])
    for kind, count in sorted(told.errors.items()):
        failed.add_metric([job, kind], count)
    yield failed
    # Not counters: what is starved now is tail in the end.
    seconds = GaugeMetricFamily(
        "tokenmill_run_engine_seconds", "Seconds of all replicas, by the ledger's kinds.", labels=["job_name", "kind"]
    )
    for kind, value in told.engine_seconds.items():
        seconds.add_metric([job, kind], value)
    yield seconds
    for name, what, number in (
        ("units_in_flight", "Units that are with a replica.", told.units_in_flight),
        ("units_failed", "Units that were given up.", told.units_failed),
        ("units_done", "Units of the output that are committed.", told.units_done),
        ("units_planned", "Units of the output.", told.units),
        ("rows_done", "Rows of the output that are committed.", told.rows_done),
        ("rows_planned", "Rows of the output.", told.rows_planned),
        ("replicas", "Replicas that are ready.", told.replicas),
    ):
        gauge = GaugeMetricFamily(f"tokenmill_run_{name}", what, labels=["job_name"])
        gauge.add_metric([job], number)
        yield gauge
    cost = GaugeMetricFamily(
        "tokenmill_run_cost_usd", "What this run's nodes have cost; not there where no price is known.", labels=["job_name"]
    )
    if told.usd is not None:
        cost.add_metric([job], told.usd)
    yield cost
    state = InfoMetricFamily("tokenmill_run_state", "How the run stands.", labels=["job_name"])
    state.add_metric([job], {"state": told.state})
    yield state


def addresses(cluster: ClusterSpec, replicas: Iterable[str]) -> list[str]:
    """Where metrics of a run are served, as far as its driver knows: its own, then those of the replicas that are on its machine."""
    if cluster.metrics_port is None:
        return []
    everywhere = cluster.metrics_host in ("0.0.0.0", "::")
    host = socket.gethostname() if everywhere else cluster.metrics_host
    here = replicas if cluster.kind == "local" else ()
    ports = [cluster.metrics_port, *sorted(cluster.metrics_port + 1 + int(name.rpartition("-")[2]) for name in here)]
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics" for port in ports]


@contextmanager
def served(job: JobSpec) -> Iterator[RunMetrics]:
    """While the job runs, and where it asks for that. Raises JobError where the port is not to be had."""
    metrics = RunMetrics(job.name)
    if job.cluster.metrics_port is None:
        yield metrics
        return
    server = Server([metrics], host=job.cluster.metrics_host, port=job.cluster.metrics_port)
    try:
        yield metrics
    finally:
        server.close()
