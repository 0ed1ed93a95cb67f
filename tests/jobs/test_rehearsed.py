"""What was seen of a rehearsal, as figures: real idle seconds against unscaled busy ones, tails in engine seconds, CPU by kind."""

from __future__ import annotations

import pytest

from jobs.rehearsal_node import Reading
from jobs.rehearsed import balance
from jobs.rehearsed import by_node
from jobs.rehearsed import rows_per_unit_of_an_hour
from jobs.rehearsed import steady
from jobs.rehearsed import tail
from jobs.rehearsed import worker_cost
from schemas.ledger import Kind
from schemas.ledger import ReplicaAccount
from schemas.rehearsal import RehearsalSpec

SPEC = RehearsalSpec(nodes=2, engines_per_node=1, rows=100, slow_down=10.0)
SPEEDS = (57_599.1, 62_803.9)


def account(name: str, *, tokens: int = 0, rows: int = 0, **seconds: float) -> ReplicaAccount:
    by_kind: dict[Kind, float] = {"start": 5.0, **seconds}  # type: ignore[typeddict-item]
    return ReplicaAccount(
        name=name,
        processes=1,
        seconds=by_kind,
        rows=rows,
        prompt_tokens=0,
        generated_tokens=tokens,
        output_tokens=tokens,
        busy_s=seconds.get("busy", 0.0),
        busy_tokens=tokens,
    )


def both(**values: float) -> dict[str, ReplicaAccount]:
    """The same of both nodes' engines, but for tokens, of which each makes what it was asked for."""
    made = {f"node-0{number}-0": int(values.get("busy", 0.0) * speed / 4 / SPEC.slow_down) for number, speed in enumerate(SPEEDS)}
    return {name: account(name, tokens=tokens, **values) for name, tokens in made.items()}


def test_idle_seconds_are_real_ones_and_busy_ones_unscaled() -> None:
    before = both(busy=100.0, starved=50.0)
    after = both(busy=1100.0, starved=51.0, commit_blocked=1.0)
    found = steady(SPEC, (10.0, before), (1000.0, after))
    assert found is not None
    assert (found.wall_s, found.busy_s, found.starved_s, found.blocked_s) == pytest.approx((990.0, 200.0, 2.0, 2.0))
    assert found.idle_share == pytest.approx(4 / 204)
    assert found.idle_share_scaled == pytest.approx(4 / 2004)
    assert found.rate_kept == pytest.approx(1.0, abs=1e-3)
    assert found.tokens_per_s == pytest.approx(sum(SPEEDS) / 4 * 100 / 102, rel=1e-3)


def test_waiting_that_was_pending_and_then_counted_as_another_kind_makes_no_idle_time_below_zero() -> None:
    found = steady(SPEC, (10.0, both(busy=100.0, starved=2.0)), (1000.0, both(busy=1100.0, starved=1.5)))
    assert found is not None
    assert (found.starved_s, found.idle_share) == (0.0, 0.0)


@pytest.mark.parametrize(("full_at", "sent_at"), [(None, 5.0), (5.0, None), (5.0, 5.0), (6.0, 5.0)])
def test_where_all_was_sent_before_every_engine_was_full_there_is_no_steady_state(full_at: float | None, sent_at: float | None) -> None:
    full = None if full_at is None else (full_at, both())
    sent = None if sent_at is None else (sent_at, both(busy=1.0))
    assert steady(SPEC, full, sent) is None


def test_a_tail_is_engine_time_and_its_share_that_of_the_node_that_waits_longest() -> None:
    at_end = {"node-00-0": account("node-00-0", tail=10.0), "node-00-1": account("node-00-1", tail=30.0), "node-01-0": account("node-01-0")}
    found = tail(SPEC, at_end, 1000.0)
    assert (found.job_s, found.max_s, found.node_s) == pytest.approx((100.0, 3.0, 2.0))
    assert found.mean_s == pytest.approx(4 / 3)
    assert found.node_share == pytest.approx(0.02)
    assert found.node_share_of_an_hour == pytest.approx(2 / 3600)


def test_each_node_is_held_against_its_own_speed() -> None:
    slow, fast = balance(SPEC, (0.0, both()), (100.0, both(busy=100.0)), both(busy=100.0))
    assert (slow.name, fast.name) == ("node-00", "node-01")
    assert (slow.tokens_per_s, fast.tokens_per_s) == pytest.approx((SPEEDS[0] / 4, SPEEDS[1] / 4), rel=1e-2)
    assert (slow.speed_tokens_per_s, fast.speed_tokens_per_s) == pytest.approx((SPEEDS[0] / 4, SPEEDS[1] / 4))


def test_a_table_of_an_hour_has_the_planners_largest_units_but_for_its_end() -> None:
    largest = 4_000_000 / 1320
    assert 0.85 * largest < rows_per_unit_of_an_hour(1320.0, 294.45) < largest


def test_replicas_belong_to_the_node_in_their_names() -> None:
    assert by_node({"node-00-0": 1.0, "node-00-1": 2.0, "node-10-0": 3.0}) == {"node-00": [1.0, 2.0], "node-10": [3.0]}


def test_a_simulated_engines_own_seconds_are_no_workers() -> None:
    one = Reading(process_s=20.0, by_kind={"read": 1.0, "render": 4.0, "generate": 2.0, "write": 1.0}, owner_s=7.0, simulated_s=5.0)
    found = worker_cost([one, one], rows=1000)
    expected = {"read": 2.0, "render": 8.0, "decode": 0.0, "write": 2.0, "commit": 0.0, "feed": 8.0, "other": 10.0}
    assert found.by_kind == pytest.approx({kind: seconds / 1000 for kind, seconds in expected.items()})
    assert found.simulated == pytest.approx(0.01)
    assert found.s_per_row == pytest.approx((40.0 - 10.0) / 1000)


def test_a_reading_since_another_one_is_what_was_spent_between_them() -> None:
    before = Reading(process_s=1.0, by_kind={"read": 1.0}, owner_s=1.0, simulated_s=1.0, requests=5)
    after = Reading(process_s=4.0, by_kind={"read": 2.0, "write": 1.0}, owner_s=3.0, simulated_s=2.0, requests=9, peak_mb=7.0)
    assert after.since(before) == Reading(
        process_s=3.0, by_kind={"read": 1.0, "write": 1.0}, owner_s=2.0, simulated_s=1.0, requests=4, peak_mb=7.0
    )
