"""How long a call takes, on a clock that the test turns."""

from __future__ import annotations

import pytest

from pipeline.stopwatch import Slices
from pipeline.stopwatch import median_seconds


class Clock:
    """Each call of `work` takes the next of these seconds, the last one again and again."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.calls, self._seconds = 0.0, 0, list(seconds)

    def __call__(self) -> float:
        return self.now

    def work(self) -> None:
        self.calls += 1
        self.now += self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]


def test_the_first_call_does_not_count_and_the_median_does() -> None:
    clock = Clock(9.0, 1.0, 1.0, 5.0, 1.0, 1.0)
    assert median_seconds(clock.work, budget_s=17.5, clock=clock) == 1.0
    assert clock.calls == 6


def test_two_calls_are_made_however_little_time_there_is() -> None:
    clock = Clock(9.0, 3.0)
    assert median_seconds(clock.work, budget_s=0.1, clock=clock) == 3.0
    assert clock.calls == 2


def test_short_calls_are_timed_many_at_once() -> None:
    clock, waits = Clock(1e-4), []
    assert median_seconds(clock.work, budget_s=0.02, clock=clock, wait=lambda: waits.append(clock.calls)) == pytest.approx(1e-4)
    assert waits[:4] == [1, 2, 52, 102]


def test_what_one_leaves_the_others_get_and_nothing_is_left_after_the_end() -> None:
    clock = Clock(2.0, 1.0, 20.0)
    slices = Slices(12.0, 4, clock=clock)
    assert slices.next() == 3.0
    clock.work()
    assert slices.next() == pytest.approx(10 / 3)
    clock.work()
    assert slices.next() == 4.5
    clock.work()  # 23 s, of 12
    assert slices.next() is None


def test_past_the_budget_things_are_still_called_twice_for_half_as_long_again() -> None:
    clock = Clock(14.0, 5.0)
    slices = Slices(12.0, 4, clock=clock)
    clock.work()
    assert slices.next() == 0.0
    clock.work()
    assert slices.next() is None
