"""The numbers behind a report, from values alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jobs.reporting import figures
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount
from schemas.manifest import UnitReport


def unit(index: int = 0, **values: Any) -> UnitReport:
    """10 s for 100 tokens of 4 rows."""
    return UnitReport(
        **{
            "unit": index, "fingerprint": "f", "attempt": f"a{index}", "worker": "a-0", "rows": 4, "error_rows": 0, "prompt_tokens": 40,
            "completion_tokens": 100, "started_at": 1000.0, "finished_at": 1010.0, **values,
        }
    )  # fmt: skip


def replica(name: str = "a-0", **values: Any) -> ReplicaAccount:
    counts = {"rows": 4, "prompt_tokens": 40, "generated_tokens": 120, "output_tokens": 100, "busy_s": 8.0, "busy_tokens": 100}
    return ReplicaAccount(**{"name": name, "processes": 1, "seconds": {"start": 2.0, "busy": 8.0}, **counts, **values})


def run_of(*replicas: ReplicaAccount, **values: Any) -> RunAccount:
    return RunAccount(
        **{
            "run": "r1", "fingerprint": "f", "state": "complete", "host": "h", "whole": True, "began_at": 1000.0, "ended_at": 1010.0,
            "elapsed_s": 10.0, "units": 1, "rows": 4, "error_rows": 0, "prompt_tokens": 40, "output_tokens": 100, "retries": 0,
            "profile": "p", "engine": {}, "versions": {}, "replicas": replicas or (replica(),), **values,
        }
    )  # fmt: skip


def test_intervals_that_touch_are_one_span_and_pauses_are_none() -> None:
    assert figures.active_spans([(20, 21), (0, 5), (3, 8), (8.5, 9)]) == [(0, 9), (20, 21)]
    assert figures.active_spans([]) == []


def test_a_units_tokens_are_spread_evenly_over_its_time() -> None:
    found = figures.throughput([unit(), unit(1, started_at=1005.0)], [run_of()], num_buckets=2)
    assert found.edges_s.tolist() == [0.0, 5.0, 10.0]
    assert found.tokens_per_s.tolist() == [10.0, 30.0]
    assert found.rows.tolist() == [0.0, 0.0, 8.0]


def test_no_token_is_lost_or_doubled_in_buckets() -> None:
    units = [unit(index, started_at=1000.0 + index * 3.7, finished_at=1000.0 + index * 3.7 + 11.3) for index in range(50)]
    found = figures.throughput(units, [], num_buckets=37)
    assert float(np.sum(found.tokens_per_s * np.diff(found.edges_s))) == pytest.approx(5000.0)


def test_a_pause_of_a_day_between_runs_takes_no_room() -> None:
    later = 1000.0 + 86_400
    units = [unit(), unit(1, started_at=later, finished_at=later + 10)]
    found = figures.throughput(units, [run_of(), run_of(run="r2", began_at=later)], num_buckets=4)
    assert found.edges_s[-1] == 20.0
    assert found.run_begins_s == (10.0,)
    assert found.tokens_per_s.tolist() == [10.0, 10.0, 10.0, 10.0]


def test_tokens_taken_over_from_earlier_outputs_are_no_throughput() -> None:
    taken_over, half = unit(reused_rows=4, reused_tokens=100), unit(1, started_at=1005.0, reused_rows=2, reused_tokens=50)
    found = figures.throughput([taken_over, half], [run_of()], num_buckets=2)
    assert found.tokens_per_s.tolist() == [0.0, 10.0]
    assert found.rows.tolist() == [0.0, 0.0, 8.0]


def test_tokens_copied_or_saved_by_earlier_attempts_are_this_jobs_own_as_in_its_account() -> None:
    found = figures.throughput([unit(copied_rows=1, copied_tokens=25, resumed_rows=1, resumed_tokens=25)], [run_of()], num_buckets=1)
    assert found.tokens_per_s.tolist() == [10.0]


def test_without_units_and_runs_there_is_nothing_to_draw() -> None:
    assert figures.throughput([], []).tokens_per_s.size == 0


def test_a_unit_without_any_duration_is_counted() -> None:
    found = figures.throughput([unit(finished_at=1000.0)], [], num_buckets=1)
    assert float(np.sum(found.tokens_per_s * np.diff(found.edges_s))) == pytest.approx(100.0)


def test_balance_adds_up_by_node_or_by_replica() -> None:
    units = [unit(0), unit(1, worker="a-1"), unit(2, worker="b-0", completion_tokens=50)]
    replicas = [replica("a-0"), replica("a-1"), replica("b-0")]
    a, b = figures.balance(units, replicas, by_node=True)
    assert (a.name, a.replicas, a.units, a.rows, a.output_tokens, a.lifetime_s, a.busy_s) == ("a", 2, 2, 8, 200, 20.0, 16.0)
    assert (b.name, b.output_tokens) == ("b", 50)
    assert [share.name for share in figures.balance(units, replicas, by_node=False)] == ["a-0", "a-1", "b-0"]


def test_balance_leaves_out_what_earlier_outputs_gave() -> None:
    units = [unit(0), unit(1, worker="b-0", reused_rows=3, reused_tokens=80)]
    assert [share.output_tokens for share in figures.balance(units, [replica("a-0"), replica("b-0")], by_node=True)] == [100, 20]


def test_bins_are_whole_tokens_and_hold_every_row() -> None:
    lengths = np.array([3, 3, 4, 90, 100], dtype=np.int64)
    found = figures.histogram(lengths, num_bins=10)
    assert (found.edges[0], int(found.rows.sum())) == (3, 5)
    assert set(np.diff(found.edges)) == {10}
    assert figures.histogram(np.array([7, 7])).rows.tolist() == [2]
    assert figures.histogram(np.zeros(0, dtype=np.int64)).rows.size == 0


def test_cost_counts_each_node_once_and_every_run() -> None:
    runs = [run_of(replica("a-0"), replica("a-1"), elapsed_s=3600.0), run_of(replica("a-0"), replica("b-0"), run="r2", elapsed_s=1800.0)]
    assert figures.cost(runs, {"r1": 10.0, "r2": 10.0}) == figures.Cost(usd=20.0, node_hours=2.0)


def test_a_node_that_came_late_or_went_early_costs_only_its_own_time() -> None:
    runs = [run_of(replica("a-0"), replica("b-0"), elapsed_s=3600.0, node_s=5400.0)]
    assert figures.cost(runs, {"r1": 10.0}) == figures.Cost(usd=15.0, node_hours=1.5)


def test_one_run_without_a_price_leaves_the_cost_unknown() -> None:
    assert figures.cost([run_of(), run_of(run="r2")], {"r1": 10.0, "r2": None}) is None


def test_repeated_work_leaves_out_what_a_run_that_goes_on_may_still_keep() -> None:
    units = [unit(resumed_rows=1, resumed_tokens=20, copied_rows=2, copied_tokens=30)]
    runs = [run_of(replica(processes=3), retries=2, doubled=1), run_of(run="r2")]
    over = figures.repeated(units, runs, goes_on=False)
    assert (over.resumed_rows, over.resumed_tokens, over.copied_rows, over.copied_tokens) == (1, 20, 2, 30)
    assert (over.retries, over.doubled, over.processes, over.wasted_tokens) == (2, 1, 2, 40)
    assert figures.repeated(units, runs, goes_on=True).wasted_tokens == 20


def test_counts_come_most_first() -> None:
    assert list(figures.counted([{"stop": 1, "error": 3}, {"stop": 9}, {"b": 3}]).items()) == [("stop", 10), ("b", 3), ("error", 3)]


def test_flagged_rows_are_named_by_position() -> None:
    units = [unit(flagged={"repetition": [1, 2]}), unit(1, flagged={"repetition": [7, 9], "invalid_json": [8]})]
    assert figures.first_flagged(units, "repetition") == [1, 2, 7]
    assert figures.first_flagged(units, "truncation") == []


def test_examples_are_the_first_few_of_each_kind() -> None:
    units = [
        unit(index, examples=[{"row": index, "kind": "k", "message": "m"}, {"row": index, "kind": "j", "message": "m"}])
        for index in range(9)
    ]
    found = figures.error_examples(units)
    assert {kind: [example["row"] for example in examples] for kind, examples in found.items()} == {"k": [0, 1, 2], "j": [0, 1, 2]}


def test_of_many_replicas_the_least_and_the_most_busy_are_drawn() -> None:
    replicas = [replica(f"a-{index:02d}", seconds={"busy": float(index)}) for index in range(20)]
    assert [item.name for item in figures.ends_of(replicas, 4)] == ["a-00", "a-01", "a-18", "a-19"]
    assert figures.ends_of(replicas, 20) == replicas
