"""Units over a Dask client: each is answered once, whatever becomes of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed import Client
from distributed import LocalCluster

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.dask_units import DaskUnits
from jobs.cluster.dask_units import replica_states
from pipeline.worker import METRICS_KEY
from schemas.errors import ReplicaLost
from schemas.unit import WorkUnit

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
    client.close()
    answers.submit(units, UNITS[0])
    (only,) = answers.by_unit[0]
    assert isinstance(only, ReplicaLost)
    assert "could not be sent" in str(only)
