"""Every message of a small job over Dask goes wrong once: one by one, and in pairs. What it sends is sent and answered for real.

A scheduler and two workers with a simulated replica each, in threads of this process; the driver, DaskUnits and the client are the
ones that every cluster has. See tests/chaos/faults.py for what happens to a message.

TOKENMILL_MESSAGE_PAIRS=all takes every pair.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from distributed import Client
from distributed import Scheduler
from distributed import SpecCluster
from distributed import Worker

import pipeline.replica
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.dask_units import DaskUnits
from jobs.cluster.dask_units import addresses_of
from jobs.cluster.dask_units import replica_states
from pipeline.model import resolve_model
from pipeline.replica import Replica
from pipeline.worker import METRICS_KEY
from schemas.job import SimulatedOptions
from schemas.unit import WorkUnit
from tests.chaos.faults import DASK_MESSAGES
from tests.chaos.faults import Faults
from tests.chaos.faults import Point
from tests.chaos.test_every_storage_call import Rig
from tests.chaos.test_every_storage_call import hasty as hasty

pytestmark = [pytest.mark.chaos, pytest.mark.long, pytest.mark.timeout(900)]

_UNITS = 3
_NAMES = ("a-0", "b-0")
_OPTIONS = SimulatedOptions(decode_tokens_per_s=1e7, prefill_tokens_per_s=1e8).model_dump()
_SEED = int(os.environ.get("TOKENMILL_SEED", "20261125"))
_PAIRS = os.environ.get("TOKENMILL_MESSAGE_PAIRS", "20")


class OverDask:
    """Replicas that are there already, over one client. A cluster, as far as a driver asks."""

    dashboard = None
    num_replicas = len(_NAMES)

    def __init__(self, client: Client) -> None:
        self._client, self._units = client, DaskUnits(client)

    def replicas(self) -> list[ReplicaState]:
        workers = self._client.sync(self._client.scheduler.identity, n_workers=-1)["workers"]
        self._units.allow(addresses_of(workers))
        return replica_states(workers)

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        self._units.submit(out_uri, fingerprint, unit, attempt, done, on)

    def notes(self) -> list[str]:
        return []

    def start_seconds(self) -> dict[str, float]:
        return {}

    def loading_seconds(self) -> dict[str, float]:
        return {}

    def evict(self) -> None:
        raise AssertionError("nobody asks for that")

    def close(self, *, at_once: bool = False) -> None:
        """The replicas stay for the next run."""


@pytest.fixture
def replicas(tiny_model: Path) -> Iterator[dict[str, Replica]]:
    """By name."""
    model = resolve_model(str(tiny_model))
    made = {name: Replica(name=name, model=model, kind="simulated", options=_OPTIONS) for name in _NAMES}
    yield made
    for replica in made.values():
        replica.close()


def worker_of(replica: Replica) -> dict[str, Any]:
    """As SpecCluster takes it."""
    metrics = {METRICS_KEY: lambda _: replica.status()}
    return {"cls": Worker, "options": {"host": "127.0.0.1", "nthreads": 8, "dashboard_address": "127.0.0.1:0", "metrics": metrics}}


@pytest.fixture
def client(replicas: dict[str, Replica]) -> Iterator[Client]:
    """Of a scheduler with two workers."""
    workers = {name: worker_of(replica) for name, replica in replicas.items()}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    with (
        SpecCluster(scheduler=scheduler, workers=workers, silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as made,
    ):
        for name, worker in cluster.workers.items():
            worker.replica = replicas[name]
        yield made


@pytest.fixture
def rig(client: Client, tiny_model: Path, hasty: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Three units in memory://, which all threads share."""
    root = f"memory://every-message-{os.getpid()}"
    faults = Faults(monkeypatch, root)
    faults.stand_before_dask(monkeypatch)
    yield Rig(root, tiny_model, faults, cluster_of=lambda _: OverDask(client))
    faults.settle()
    fsspec.filesystem("memory").rm(root.removeprefix("memory:/"), recursive=True)


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of units that replicas ran, all strikes together."""
    counted, run_unit = Counter[str](), pipeline.replica.run_unit

    def noted(*args: Any) -> Any:
        report, outcome = run_unit(*args)
        counted[outcome] += 1
        return report, outcome

    monkeypatch.setattr(pipeline.replica, "run_unit", noted)
    return counted


POINTS = [
    Point(function=function, name=f"unit {index}", number=1, when=when) for index in range(_UNITS) for function, when in DASK_MESSAGES
]


def test_a_single_message_that_goes_wrong_costs_no_row(rig: Rig, outcomes: Counter[str]) -> None:
    job = rig.job()
    for point in POINTS:
        assert rig.strike(job, [point]) == ["complete"]
        rig.faults.settle()
    print(f"\nover Dask: {len(POINTS)} points of {_UNITS} units, one by one: {rig.figures}; units run: {dict(outcomes)}")
    assert rig.figures.fired == rig.figures.points == len(POINTS)
    assert outcomes["created"] == _UNITS * len(POINTS)
    assert outcomes["already"] + outcomes["race_lost"] > 0  # what was sent or answered twice, or in vain, did run again


def test_two_messages_that_go_wrong_cost_no_row(rig: Rig, outcomes: Counter[str]) -> None:
    job, pairs = rig.job(), list(itertools.combinations(POINTS, 2))
    chosen = pairs if _PAIRS == "all" else random.Random(_SEED).sample(pairs, int(_PAIRS))
    for pair in chosen:
        rig.strike(job, pair)
        rig.faults.settle()
    print(f"\nover Dask: {len(chosen)} of {len(pairs)} pairs (seed {_SEED}): {rig.figures}; units run: {dict(outcomes)}")
    assert rig.figures.fired >= rig.figures.points * 0.8  # what was never sent is not sent twice
