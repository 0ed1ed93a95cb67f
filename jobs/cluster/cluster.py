"""Cluster: who runs units. The seam that every backend fills and that the driver knows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from schemas.ledger import Reading
from schemas.unit import WorkUnit

Result = dict[str, Any] | BaseException
"""What Replica.run returned, or what it raised."""

MOST_UNITS_AT_ONCE = 128
"""In flight on a replica. Of two rows each, they fill a batch of 256; 24 of them leave it so empty that a quarter of the speed is lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaState:
    """One ready replica, as last heard of. Counts are since its engine came up; see EngineCounters."""

    name: str
    window_rows: int
    rows: int = 0
    completion_tokens: int = 0
    prompt_tokens: int = 0
    in_flight: int = 0
    ledger: Reading | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    """Its EngineInfo as plain data."""


def node_of(replica: str) -> str:
    """Replicas are named after their node, with a number."""
    return replica.rpartition("-")[0] or replica


def num_nodes(replicas: Iterable[ReplicaState]) -> int:
    """That are there: a replica that spans several has a name on one alone."""
    spans: dict[str, int] = {}
    for replica in replicas:
        node = node_of(replica.name)
        spans[node] = max(spans.get(node, 1), int(replica.engine.get("options", {}).get("nnodes", 1)))
    return sum(spans.values())


class Cluster(Protocol):
    """Runs units on replicas."""

    @property
    def dashboard(self) -> str | None:
        """Address of a live view, where there is one."""
        ...

    def replicas(self) -> list[ReplicaState]:
        """Those ready now. Raises EngineStartError once it is clear that none will be."""
        ...

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        """Run a unit somewhere; `done` is called once, from any thread.

        If possible on the replica named, or rather where the unit is in flight still, on behalf of an earlier driver. That a
        replica went away comes as ReplicaLost, and as often as it happens: nobody else tries the unit again.
        """
        ...

    @property
    def num_replicas(self) -> int:
        """Those that are ready, or will soon be, as far as this side knows."""
        ...

    def notes(self) -> list[str]:
        """What happened to replicas since the last call, for the user: started, lost, restarted."""
        ...

    def start_seconds(self) -> dict[str, float]:
        """Seconds that each replica took to come up."""
        ...

    def loading_seconds(self) -> dict[str, float]:
        """Seconds since their process was started, of replicas that are not ready yet, as far as this side knows of them."""
        ...

    def evict(self) -> None:
        """The machine is needed: units in flight save what is finished and come back as ReplicaLost. Returns at once."""
        ...

    def close(self, *, at_once: bool = False) -> None:
        """End every process. At once: without waiting for anything."""
        ...
