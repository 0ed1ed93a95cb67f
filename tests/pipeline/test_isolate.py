"""Which rows kill engines: found by halving, with few deaths, and never by one accident."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from pipeline.isolate import Death
from pipeline.isolate import Trial
from pipeline.isolate import guilty
from pipeline.isolate import next_trial
from pipeline.supervisor import MAX_DEADLY


def death(*rows: int, others: int = 0) -> Death:
    return Death(rows=frozenset(rows), others=others, how="signal SIGSEGV")


def test_one_death_makes_nobody_a_suspect() -> None:
    assert next_trial(range(10), [death(1, 2, 3)]) is None


def test_rows_that_nobody_suspects_are_finished_first() -> None:
    deaths = [death(1, 2, 3, others=5), death(2, 3, 4, others=5)]
    assert next_trial(range(6), deaths) == Trial(rows=frozenset({0, 1, 4, 5}), alone=False)


def test_suspects_are_tried_together_and_alone_before_any_is_halved() -> None:
    assert next_trial([2, 3], [death(2, 3, others=5), death(2, 3, others=9)]) == Trial(rows=frozenset({2, 3}), alone=True)


def test_the_smallest_set_that_killed_alone_is_halved() -> None:
    deaths = [death(0, 1, 2, 3, others=5), death(0, 1, 2, 3), death(0, 1)]
    assert next_trial([0, 1, 2, 3], deaths) == Trial(rows=frozenset({0}), alone=True)
    assert next_trial([1, 2, 3], deaths) == Trial(rows=frozenset({1}), alone=True)


def test_a_row_is_guilty_when_two_engines_died_with_it_alone_in_them() -> None:
    assert guilty([death(7)]) == {}
    assert guilty([death(7), death(7, others=1)]) == {}
    assert guilty([death(7), death(7, 8), death(7)]) == {7: ["signal SIGSEGV", "signal SIGSEGV"]}


def kill(*rows: int, others: int = 0) -> Death:
    return Death(rows=frozenset(rows), others=others, how="signal SIGKILL", killed=True)


@pytest.mark.parametrize(
    ("deaths", "proven"),
    [
        ([kill(7)] * 3, False),
        ([kill(7)] * 4, True),
        ([kill(7)] * 3 + [kill(7, 8), kill(7, others=1), kill(8)], False),
        ([death(7), kill(7)], False),
        ([death(7), kill(7), kill(7)], True),
    ],
)
def test_engines_that_somebody_killed_count_half(deaths: list[Death], proven: bool) -> None:
    """Two blows from outside, or two shortages of memory, must not condemn the row that happened to be alone in there."""
    assert (7 in guilty(deaths)) is proven


def isolate(
    rows: int, deadly: set[int], batch: int, accidents: random.Random | None = None, *, killed: bool = False
) -> tuple[set[int], int]:
    """Play a unit to its end on engines that die of deadly rows, and by accident. The rows found guilty, and deaths."""
    done: set[int] = set()
    deaths: list[Death] = []
    for _ in range(10_000):
        found = set(guilty(deaths))
        left = [row for row in range(rows) if row not in done and row not in found]
        trial = next_trial(left, deaths)
        if trial is None and not left:
            return found, len(deaths)
        wanted, others = (sorted(trial.rows), 0 if trial.alone else 3) if trial else (left, 3)
        for start in range(0, len(wanted), batch):
            inside = frozenset(wanted[start : start + batch])
            if inside & deadly or (accidents is not None and accidents.random() < 0.02):
                deaths.append(Death(rows=inside, others=others, how="signal SIGSEGV", killed=killed))
                break
            if trial:
                done |= inside  # saved in a segment when the trial is over; a death before that loses them
        else:
            done |= set(wanted)
            continue
        if trial:
            done -= set(wanted)  # only a whole trial is saved
    raise AssertionError("it never ends")


def test_one_deadly_row_in_512_is_found_with_a_dozen_deaths() -> None:
    for row in (0, 1, 255, 256, 511):
        found, deaths = isolate(512, {row}, batch=512)
        assert found == {row}
        assert deaths <= 2 + 1 + math.log2(512) + 2


def test_a_row_that_takes_all_memory_is_found_before_a_supervisor_gives_its_replica_up() -> None:
    for row in (0, 511):
        found, deaths = isolate(512, {row}, batch=512, killed=True)
        assert found == {row}
        assert deaths <= MAX_DEADLY


def test_a_unit_without_a_deadly_row_is_cleared_by_one_trial() -> None:
    deaths = [Death(rows=frozenset(range(64)), others=64, how="x")] * 2
    assert next_trial(range(64), deaths) == Trial(rows=frozenset(range(64)), alone=True)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 80),
    deadly=st.sets(st.integers(0, 79), max_size=3),
    batch=st.integers(1, 100),
)
def test_exactly_the_deadly_rows_are_found(rows: int, deadly: set[int], batch: int) -> None:
    found, _ = isolate(rows, deadly, batch)
    assert found == {row for row in deadly if row < rows}


@settings(deadline=None, max_examples=40)
@given(deadly=st.sets(st.integers(0, 39), max_size=2), seed=st.integers(0, 2**32))
def test_accidents_cost_time_and_hide_no_deadly_row(deadly: set[int], seed: int) -> None:
    found, _ = isolate(40, deadly, batch=16, accidents=random.Random(seed))
    assert found >= deadly
