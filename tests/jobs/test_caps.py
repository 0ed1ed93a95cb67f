"""When a run must end, by the clock or by its cost."""

from __future__ import annotations

from datetime import UTC
from datetime import datetime

import pytest

from jobs.caps import Caps
from jobs.caps import caps_of
from schemas.errors import JobError
from schemas.job import LimitsSpec

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def made(price: float | None = None, **limits: object) -> Caps:
    return caps_of(LimitsSpec.model_validate(limits), profile_usd_per_hour=price, now=NOW)


def test_without_limits_nothing_is_reached() -> None:
    assert made().reached(1e9, 72, 1e9) is None


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


def test_units_stop_beginning_when_they_would_end_too_late() -> None:
    caps = made(deadline="100s")
    assert caps.reached(79, 1, 20) is None
    assert caps.reached(80, 1, 20) == "limits.deadline: 80 s of 100 s are over, and a unit takes 20 s"
    assert caps.reached(101, 1, 0) == "limits.deadline: 100 s are over"


def test_every_node_costs_from_the_command_on() -> None:
    caps = made(max_cost_usd=10.0, usd_per_hour=36.0)
    assert caps.usd(100, 1) == pytest.approx(1.0)
    assert caps.usd(100, 4) == pytest.approx(4.0)
    assert caps.usd(100, 0) == pytest.approx(1.0)
    assert caps.reached(900, 1, 50) is None
    assert "9.50 of 10.00 USD are spent, 10.00 when" in str(caps.reached(950, 1, 50))


def test_the_jobs_own_price_goes_before_the_profiles() -> None:
    assert made(98.0).usd_per_hour == 98.0
    assert made(98.0, usd_per_hour=60.0).usd_per_hour == 60.0


def test_a_cost_cap_without_a_price_is_refused() -> None:
    with pytest.raises(JobError, match=r"limits\.usd_per_hour"):
        made(max_cost_usd=10.0)
