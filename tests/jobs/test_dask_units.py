"""Units over a Dask client: each is answered once, whatever becomes of the client."""

from __future__ import annotations

import asyncio
import gc
import queue
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client
from distributed import LocalCluster
from distributed import Scheduler
from distributed import SpecCluster
from distributed import Worker

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.dask_units import DaskUnits
from jobs.cluster.dask_units import addresses_of
from jobs.cluster.dask_units import replica_states
from pipeline.worker import METRICS_KEY
from schemas.errors import ReplicaLost
from schemas.errors import UnitError
from schemas.unit import WorkUnit

AWAY = {"a-0": "tcp://127.0.0.1:1"}
"""A replica that the scheduler has never seen."""
UNITS = [WorkUnit(index=index, ranges=()) for index in range(3)]


@pytest.fixture
def client() -> Iterator[Client]:
    """Of a scheduler without workers: what is submitted waits there."""
    with (
        LocalCluster(n_workers=0, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as made,
    ):
        yield made


class Answers:
    """What came back, by unit."""

    def __init__(self) -> None:
        self.by_unit: dict[int, list[Result]] = {}

    def submit(self, units: DaskUnits, unit: WorkUnit) -> None:
        units.submit("out", "f" * 64, unit, 1, lambda result: self.by_unit.setdefault(unit.index, []).append(result))


def test_replicas_are_those_that_report_by_name() -> None:
    metrics = {METRICS_KEY: {"window_rows": 8, "rows": 3, "something_new": 1}}
    workers = {
        "tcp://b:1": {"name": "b-0", "metrics": metrics},
        "tcp://a:1": {"name": "a-0", "metrics": metrics},
        "tcp://c:1": {"name": "c"},
    }
    assert replica_states(workers) == [ReplicaState(name=name, window_rows=8, rows=3) for name in ("a-0", "b-0")]


def test_units_in_flight_are_answered_when_the_client_is_given_up_and_later_ones_at_once(client: Client) -> None:
    units, answers = DaskUnits(client), Answers()
    units.allow(AWAY)
    for unit in UNITS[:2]:
        answers.submit(units, unit)
    assert (units.num_flying, answers.by_unit) == (2, {})
    units.lose_all("the scheduler went away")
    answers.submit(units, UNITS[2])
    assert units.num_flying == 0
    assert sorted(answers.by_unit) == [0, 1, 2]
    for (only,) in answers.by_unit.values():
        assert isinstance(only, ReplicaLost)
        assert str(only) == "the scheduler went away"


def test_a_client_that_is_closed_answers_too(client: Client) -> None:
    units, answers = DaskUnits(client), Answers()
    units.allow(AWAY)
    client.close()
    answers.submit(units, UNITS[0])
    (only,) = answers.by_unit[0]
    assert isinstance(only, ReplicaLost)
    assert "could not be sent" in str(only)


@pytest.mark.parametrize("handled", [True, False])
def test_a_fetch_that_ran_out_of_time_and_whose_key_was_then_forgotten_leaves_no_traceback(
    client: Client, handled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if handled:
        DaskUnits(client)
    future = client.submit(abs, -1, pure=False)
    client.loop.add_callback(client.futures[future.key].finish)  # as if a worker had it, and had then gone away: there is none
    with pytest.raises(TimeoutError):
        future.result(timeout=0.2)
    future.cancel()
    for _ in range(3 if handled else 50):
        client.sync(asyncio.sleep, 0.1)
        client.sync(_collect)
        if "AllExit" in caplog.text:
            break
    assert ("AllExit" in caplog.text) is not handled  # without us it is there: the test sees what it is about


async def _collect() -> None:
    gc.collect()


class Named:
    """What stands in a worker for a replica; its reports say where they come from."""

    class Engine:
        dead = None

    def __init__(self, name: str) -> None:
        self.name, self.engine = name, self.Engine()

    def run(self, out_uri: str, fingerprint: str, unit: dict[str, Any]) -> dict[str, Any]:
        if unit["index"] == 99:
            raise UnitError(f"unit 99 to {out_uri} cannot be done")
        return {"report": {"worker": self.name, "unit": unit["index"]}, "outcome": "created"}


@pytest.fixture
def two_workers() -> Iterator[Client]:
    """Workers a-0 and b-0, in threads of this process."""
    options = {"host": "127.0.0.1", "nthreads": 24, "dashboard_address": "127.0.0.1:0"}
    workers = {name: {"cls": Worker, "options": options} for name in ("a-0", "b-0")}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    with (
        SpecCluster(scheduler=scheduler, workers=workers, silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as made,
    ):
        for name, worker in cluster.workers.items():
            worker.replica = Named(name)
        yield made


def answers_of(client: Client, units: list[WorkUnit], on: str | None) -> list[Result]:
    got: queue.SimpleQueue[Result] = queue.SimpleQueue()
    flight = DaskUnits(client)
    flight.allow(addresses_of(client.scheduler_info(n_workers=-1)["workers"]))
    for unit in units:
        flight.submit("out", "f" * 64, unit, 1, got.put, on)
    return [got.get(timeout=30) for _ in units]


def test_a_unit_runs_on_the_replica_that_is_named_where_there_is_one(two_workers: Client) -> None:
    units = [WorkUnit(index=index, ranges=()) for index in range(8)]
    for name in ("a-0", "b-0"):
        found = [answer["report"]["worker"] for answer in answers_of(two_workers, units, name) if isinstance(answer, dict)]
        assert found == [name] * 8
    gone = answers_of(two_workers, units, "c-0")
    assert sorted(answer["report"]["unit"] for answer in gone if isinstance(answer, dict)) == list(range(8))


def test_units_go_to_allowed_replicas_alone_whoever_is_named(two_workers: Client) -> None:
    got: queue.SimpleQueue[Result] = queue.SimpleQueue()
    flight = DaskUnits(two_workers)
    flight.allow({"b-0": addresses_of(two_workers.scheduler_info(n_workers=-1)["workers"])["b-0"]})
    for on in (None, "a-0", "b-0"):
        for index in range(8):
            flight.submit("out", "f" * 64, WorkUnit(index=index, ranges=()), 1, got.put, on)
    answers = [got.get(timeout=30) for _ in range(24)]
    assert {answer["report"]["worker"] for answer in answers if isinstance(answer, dict)} == {"b-0"}
    assert flight.num_flying == 0


def test_units_whose_allowed_replicas_are_all_gone_come_back_as_lost(client: Client) -> None:
    """Dask would keep them for ever, also when others join."""
    units, answers = DaskUnits(client), Answers()
    units.allow({"a-0": "tcp://127.0.0.1:1", "b-0": "tcp://127.0.0.1:2"})
    answers.submit(units, UNITS[0])
    units.allow({"b-0": "tcp://127.0.0.1:2"})
    assert (units.num_flying, answers.by_unit) == (1, {})
    units.allow({"a-0": "tcp://127.0.0.1:3"})
    (only,) = answers.by_unit[0]
    assert isinstance(only, ReplicaLost)
    units.allow({})
    answers.submit(units, UNITS[1])
    (none,) = answers.by_unit[1]
    assert str(none) == "no replica is there that may run the unit"
    assert units.num_flying == 0


def test_what_a_unit_raises_comes_back_as_it_is(two_workers: Client) -> None:
    (answer,) = answers_of(two_workers, [WorkUnit(index=99, ranges=())], None)
    assert isinstance(answer, UnitError)
    assert not isinstance(answer, ReplicaLost)
    assert str(answer) == "unit 99 to out cannot be done"
