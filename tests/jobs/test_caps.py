"""When a run must end, by the clock or by its cost."""

from __future__ import annotations

from datetime import UTC
from datetime import datetime

import pytest

from jobs.caps import Caps
from jobs.caps import Earlier
from jobs.caps import NodeSeconds
from jobs.caps import caps_of
from schemas.errors import JobError
from schemas.job import LimitsSpec

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def made(price: float | None = None, **limits: object) -> Caps:
    return caps_of(LimitsSpec.model_validate(limits), profile_usd_per_hour=price, now=NOW)


def test_without_limits_nothing_is_reached() -> None:
    assert made().reached(1e9, 72e9, 72, 1e9) is None


def test_a_deadline_is_a_length_of_time_or_a_moment() -> None:
    assert made(deadline="8h").deadline_s == 8 * 3600
    assert made(deadline="2026-11-26T13:00:00Z").deadline_s == 3600
    assert made(deadline="2026-11-26T14:00:00+01:00").deadline_s == 3600


@pytest.mark.parametrize(
    ("deadline", "message"),
    [
        ("2026-11-26T11:59:59Z", "has passed"),
        ("2026-11-26T13:00:00", "expected a moment with its zone"),
        ("tonight", "limits.deadline: found 'tonight', expected a length of time"),
    ],
)
def test_a_deadline_that_is_none_is_refused(deadline: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        made(deadline=deadline)


def test_a_driver_that_goes_on_for_one_that_died_has_what_is_left() -> None:
    limits = LimitsSpec(deadline="100s", max_cost_usd=10.0, usd_per_hour=36.0)
    caps = caps_of(limits, profile_usd_per_hour=None, now=NOW, earlier=Earlier(seconds=60.0, node_s=900.0))
    assert caps.reached(10, 40, 1, 20) is None
    assert caps.reached(20, 40, 1, 20) == "limits.deadline: 80 s of 100 s are over, and a unit takes 20 s"
    assert "9.75 of 10.00 USD are spent" in str(caps.reached(10, 75, 1, 25))
    moment = LimitsSpec(deadline="2026-11-26T11:59:50Z")  # ten seconds ago, and fifty after the first one began
    late = caps_of(moment, profile_usd_per_hour=None, now=NOW, earlier=Earlier(seconds=60.0))
    assert late.reached(0, 0, 1, 0) == "limits.deadline: 50 s are over"
    with pytest.raises(JobError, match="has passed"):
        caps_of(moment, profile_usd_per_hour=None, now=NOW, earlier=Earlier(seconds=5.0))


def test_units_stop_beginning_when_they_would_end_too_late() -> None:
    caps = made(deadline="100s")
    assert caps.reached(79, 79, 1, 20) is None
    assert caps.reached(80, 80, 1, 20) == "limits.deadline: 80 s of 100 s are over, and a unit takes 20 s"
    assert caps.reached(101, 101, 1, 0) == "limits.deadline: 100 s are over"


def test_a_run_stops_beginning_units_when_the_nodes_that_are_there_would_cost_too_much() -> None:
    caps = made(max_cost_usd=10.0, usd_per_hour=36.0)
    assert caps.usd(400) == pytest.approx(4.0)
    assert caps.reached(100, 900, 1, 50) is None
    assert "9.50 of 10.00 USD are spent, 10.00 when" in str(caps.reached(100, 950, 1, 50))
    assert "9.00 of 10.00 USD are spent, 11.00 when" in str(caps.reached(100, 900, 4, 50))


def seconds_after(looks: list[tuple[float, int]]) -> list[float]:
    """The sum at each look: (when, nodes there), of a run that began at 0."""
    nodes, sums = NodeSeconds(0.0), []
    for now, num_nodes in looks:
        nodes.add(now, num_nodes)
        sums.append(nodes.total)
    return sums


def test_nodes_that_come_together_cost_from_the_command_on() -> None:
    assert seconds_after([(10, 0), (60, 4), (160, 4)]) == [10, 240, 640]


def test_what_nodes_cost_stays_spent_when_they_go() -> None:
    assert seconds_after([(0, 8), (25_200, 2), (25_300, 2), (25_400, 0), (25_500, 0)]) == [0, 201_600, 201_800, 202_000, 202_100]


def test_a_node_that_comes_late_costs_from_as_long_before_as_the_first_took_to_come() -> None:
    assert seconds_after([(60, 1), (1060, 3), (1160, 3)]) == [60, 1060 + 2 * 60, 1180 + 300]


def test_a_node_that_comes_back_costs_while_it_is_there() -> None:
    assert seconds_after([(60, 2), (160, 1), (260, 2), (360, 2)]) == [120, 320, 420, 620]


def test_the_jobs_own_price_goes_before_the_profiles() -> None:
    assert made(98.0).usd_per_hour == 98.0
    assert made(98.0, usd_per_hour=60.0).usd_per_hour == 60.0


def test_a_cost_cap_without_a_price_is_refused() -> None:
    with pytest.raises(JobError, match=r"limits\.usd_per_hour"):
        made(max_cost_usd=10.0)
