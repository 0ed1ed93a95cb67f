"""From measured costs to the tokens/s at which each part would hold the others back: arithmetic, checked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.bottlenecks import MOST_HEARD
from jobs.bottlenecks import bottlenecks
from jobs.bottlenecks import fit_cost
from jobs.rack import ENGINE_TOKENS_PER_S
from jobs.rack import RECORD_TOKENS_PER_S
from schemas.rehearsal import ProcessCost
from schemas.rehearsal import StorageCost
from schemas.rehearsal import WorkerCost

FREE = ProcessCost(s_per_unit=0.0, s_per_replica_s=0.0, total_s=0.0, peak_mb=0.0)
NOTHING = StorageCost(requests_per_unit=None, driver_requests_per_s=None, bytes_in_per_row=0.0, bytes_out_per_row=0.0)
IDLE = WorkerCost(by_kind={}, simulated=0.0, peak_mb=0.0)


def at(**costs: Any) -> dict[str, float]:
    """Tokens/s by name."""
    given = {"driver": FREE, "scheduler": FREE, "worker": IDLE, "storage": NOTHING, **costs}
    found = bottlenecks(**given, tokens_per_row=300.0, tokens_per_unit=900_000.0, node_cores=128.0, engines_per_node=4)
    assert [one.tokens_per_s for one in found] == sorted(one.tokens_per_s for one in found)
    assert all(one.times_record == pytest.approx(one.tokens_per_s / RECORD_TOKENS_PER_S) for one in found)
    return {one.name: one.tokens_per_s for one in found}


def test_what_costs_nothing_holds_nobody_back() -> None:
    assert at() == {}


def test_a_driver_of_ten_milliseconds_a_unit_carries_a_hundred_units_a_second() -> None:
    found = at(driver=ProcessCost(s_per_unit=0.01, s_per_replica_s=0.0, total_s=1.0, peak_mb=0.0))
    assert found["driver, units alone"] == pytest.approx(100 * 900_000)
    assert found["driver, units and replicas"] == pytest.approx(100 * 900_000)


def test_hearing_of_replicas_takes_of_the_same_core() -> None:
    found = at(scheduler=ProcessCost(s_per_unit=0.01, s_per_replica_s=0.004, total_s=1.0, peak_mb=0.0))
    rate = found["scheduler, units and replicas"]
    assert rate / 900_000 * 0.01 + rate / ENGINE_TOKENS_PER_S * 0.004 == pytest.approx(1.0)
    assert rate < found["scheduler, units alone"]


def test_beyond_some_hundred_replicas_no_more_of_them_are_heard_of_in_a_second() -> None:
    cost = ProcessCost(s_per_unit=0.01, s_per_replica_s=0.001, total_s=1.0, peak_mb=0.0)
    many = at(driver=cost)["driver, units and replicas"]
    assert many / ENGINE_TOKENS_PER_S > MOST_HEARD
    assert many == pytest.approx(100 * 900_000 * (1 - MOST_HEARD * 0.001))


def test_a_worker_has_one_core_for_its_engine_and_a_node_all_of_its_own_for_four() -> None:
    found = at(worker=WorkerCost(by_kind={"render": 0.0006, "write": 0.0004}, simulated=9.0, peak_mb=0.0))
    rows_per_s_of_an_engine = ENGINE_TOKENS_PER_S / 300
    times = 1 / (rows_per_s_of_an_engine * 0.001)
    assert found["a worker's process"] == pytest.approx(times * RECORD_TOKENS_PER_S)
    assert found["a node's CPU"] == pytest.approx(128 / 4 * times * RECORD_TOKENS_PER_S)


def test_an_account_takes_twenty_thousand_requests_and_so_many_bytes_a_second() -> None:
    found = at(storage=StorageCost(requests_per_unit=10.0, driver_requests_per_s=1.0, bytes_in_per_row=1500.0, bytes_out_per_row=750.0))
    assert found == {
        "storage requests": pytest.approx(2_000 * 900_000),
        "storage egress": pytest.approx(50e9 / 8 / 1500 * 300),
        "storage ingress": pytest.approx(25e9 / 8 / 750 * 300),
    }


def test_costs_of_units_and_of_seconds_are_told_apart() -> None:
    units = [0, 100, 100, 100, 110, 120, 150, 151, 200]
    samples = [(float(second), float(done), 3.0 + 0.02 * done + 0.005 * second) for second, done in enumerate(units)]
    assert fit_cost(samples) == pytest.approx((0.02, 0.005))


@pytest.mark.parametrize("samples", [[], [(0.0, 0.0, 1.0)], [(0.0, 5.0, 1.0), (0.0, 5.0, 1.0), (0.0, 5.0, 1.0)]])
def test_of_too_few_looks_nothing_is_made(samples: list[tuple[float, float, float]]) -> None:
    assert fit_cost(samples) == (0.0, 0.0)


def test_no_cost_is_below_nothing() -> None:
    assert fit_cost([(0.0, 0.0, 0.0), (1.0, 10.0, 1.0), (2.0, 15.0, 1.0), (3.0, 40.0, 5.0)])[1] == 0.0
    a, b = fit_cost([(0.0, 9.0, 0.0), (1.0, 6.0, 1.0), (2.0, 4.0, 2.0), (3.0, 0.0, 2.5)])
    assert a >= 0
    assert b >= 0


def test_units_that_come_as_evenly_as_the_seconds_are_charged_with_all() -> None:
    assert fit_cost([(0.0, 0.0, 0.0), (1.0, 10.0, 1.0), (2.0, 20.0, 2.0)]) == pytest.approx((0.1, 0.0))
