"""Metrics: a replica's counters for Prometheus, and the port on which a process serves what it has. Read when asked; kept nowhere.

Names and numbers alone: no prompt, no completion, no secret.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from typing import TYPE_CHECKING
from typing import Any
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client import Metric
from prometheus_client import ProcessCollector
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from schemas.errors import JobError
from schemas.ledger import Reading

if TYPE_CHECKING:
    from pipeline.replica import Replica


class Server:
    """Serves what some collectors say, at http://HOST:PORT/metrics, from a thread of its own."""

    def __init__(self, collectors: Iterable[Collector], *, host: str, port: int) -> None:
        """Raises JobError where the port is not to be had."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        for collector in collectors:
            registry.register(collector)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            raise JobError(
                f"cluster.metrics_port: cannot serve metrics on {host}:{port}: {error}; choose another port, or leave it out"
            ) from None
        self.address = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Counted(Protocol):
    """What is asked of a replica."""

    @property
    def name(self) -> str: ...

    def status(self) -> dict[str, Any]:
        """As of pipeline.replica."""
        ...

    def errors(self) -> dict[str, int]:
        """Error rows committed here, by kind."""
        ...


class ReplicaMetrics(Collector):
    """One replica's counters at the moment that somebody asks."""

    def __init__(self, replica: Replica | Counted) -> None:
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        said, errors = self._replica.status(), self._replica.errors()
        yield from replica_families(self._replica.name, said, errors)

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of an engine for the sake of names."""
        return []


def replica_families(name: str, said: dict[str, Any], errors: dict[str, int]) -> Iterator[Metric]:
    """What a replica says of itself, as metrics."""
    for family, what, value in (
        ("rows", "Rows that the engine has answered.", said["rows"]),
        ("prompt_tokens", "Prompt tokens of those rows.", said["prompt_tokens"]),
        ("output_tokens", "Output tokens of those rows.", said["completion_tokens"]),
    ):
        counter = CounterMetricFamily(f"tokenmill_replica_{family}", what, labels=["replica"])
        counter.add_metric([name], value)
        yield counter
    failed = CounterMetricFamily("tokenmill_replica_error_rows", "Error rows committed, by kind.", labels=["replica", "kind"])
    for kind, count in sorted(errors.items()):
        failed.add_metric([name, kind], count)
    yield failed
    seconds = CounterMetricFamily(
        "tokenmill_replica_engine_seconds",
        "Seconds since the process was spawned, by kind; what is tail or lost only the driver knows.",
        labels=["replica", "kind"],
    )
    for kind, value in engine_seconds(said["ledger"]).items():
        seconds.add_metric([name, kind], value)
    yield seconds
    for family, what, value in (
        ("units_in_flight", "Units that are read, generated or committed.", len(said["units"])),
        ("rows_in_flight", "Rows in the engine.", said["in_flight"]),
        ("window_rows", "Rows that it may hold.", said["window_rows"]),
    ):
        gauge = GaugeMetricFamily(f"tokenmill_replica_{family}", what, labels=["replica"])
        gauge.add_metric([name], value)
        yield gauge


def engine_seconds(ledger: dict[str, Any]) -> dict[str, float]:
    """By the ledger's kinds; they add up to the process's age."""
    reading = Reading(**ledger)
    return {
        "start": reading.start_s,
        "busy": reading.busy_s,
        "starved": reading.starved_s + reading.pending_starved_s,
        "commit_blocked": reading.blocked_s + reading.pending_blocked_s,
    }
