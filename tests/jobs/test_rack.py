"""The record's rack in numbers: speeds as Azure published them, lengths as MLPerf has them, and a table that fills it."""

from __future__ import annotations

import statistics

import pytest

from jobs.rack import ENGINE_TOKENS_PER_S
from jobs.rack import MEAN_TOKENS
from jobs.rack import length_of
from jobs.rack import length_scale
from jobs.rack import node_speeds
from jobs.rack import rows_for
from jobs.rack import slow_down_for


def evenly(count: int) -> list[int]:
    return [int((index + 0.5) / count * 2**32) for index in range(count)]


@pytest.mark.parametrize("num_nodes", [18, 36, 19, 180])
def test_nodes_are_as_uneven_as_the_eighteen_of_the_record(num_nodes: int) -> None:
    speeds = node_speeds(num_nodes)
    assert len(speeds) == num_nodes
    assert speeds == sorted(speeds)
    found = (min(speeds), statistics.mean(speeds), statistics.median(speeds), max(speeds))
    assert found == pytest.approx((57_599.1, 61_163.8, 61_759.1, 62_803.9), abs=0.5)


def test_a_single_node_has_the_mean_speed_and_its_engines_the_published_rate() -> None:
    assert node_speeds(1) == [61_163.8]
    assert pytest.approx(15_291, abs=1) == ENGINE_TOKENS_PER_S


@pytest.mark.parametrize("num_nodes", [2, 3, 4])
def test_few_nodes_still_reach_from_the_slowest_to_the_fastest(num_nodes: int) -> None:
    speeds = node_speeds(num_nodes)
    assert (speeds[0], speeds[-1]) == (57_599.1, 62_803.9)


def test_rows_become_as_long_as_the_records_in_the_mean_and_never_longer_than_asked() -> None:
    scale = length_scale(1024)
    lengths = [length_of(number, scale, 1024) for number in evenly(20_000)]
    assert statistics.mean(lengths) == pytest.approx(MEAN_TOKENS, rel=0.005)
    assert (min(lengths), max(lengths)) == (1, 1024)


def test_where_less_is_asked_rows_take_half_of_it_in_the_mean() -> None:
    scale = length_scale(64)
    lengths = [length_of(number, scale, 64) for number in evenly(20_000)]
    assert statistics.mean(lengths) == pytest.approx(32, rel=0.02)
    assert max(lengths) == 64


def test_a_rack_runs_slower_the_fewer_cores_there_are_and_a_node_at_its_own_speed() -> None:
    assert slow_down_for(1, 2) == 1
    assert slow_down_for(18, 2) > slow_down_for(18, 8) > 1 <= slow_down_for(18, 64)


def test_a_table_grows_with_the_engines_that_it_has_to_fill() -> None:
    assert rows_for(72) == 72 * rows_for(1)
