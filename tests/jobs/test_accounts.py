"""Readings in, accounts out: whatever a replica lived through, its seconds by kind add up to its time in the run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jobs.accounts import Accounts
from schemas.ledger import KINDS
from schemas.ledger import Reading
from schemas.ledger import ReplicaAccount


def reading(engine: str = "e", *, start: float = 10.0, **values: Any) -> Reading:
    """Of a process that took 10 s to start; its age is the sum of its seconds."""
    seconds = dict.fromkeys(("busy_s", "starved_s", "blocked_s", "pending_starved_s", "pending_blocked_s"), 0.0)
    seconds |= {key: value for key, value in values.items() if key in seconds}
    counts: dict[str, Any] = {
        "working_s": 0.0, "full": False, "rows": 0, "prompt_tokens": 0, "generated_tokens": 0, "busy_tokens": 0, "kept_tokens": 0,
    }  # fmt: skip
    counts |= {key: value for key, value in values.items() if key in counts}
    assert not set(values) - set(seconds) - set(counts)
    return Reading(engine=engine, age_s=start + sum(seconds.values()), start_s=start, **seconds, **counts)


def only(accounts: Accounts, now: float, *, over: bool = True, loading: dict[str, float] | None = None) -> ReplicaAccount:
    (account,) = accounts.at(now, over=over, loading=loading or {})
    return account


def spent(account: ReplicaAccount) -> dict[str, float]:
    """Kinds with any seconds."""
    return {kind: seconds for kind, seconds in account.seconds.items() if seconds}


def test_a_replica_that_was_heard_to_the_end_has_its_readings_seconds_and_the_rest_is_tail() -> None:
    accounts = Accounts(100.0)
    last = reading(
        busy_s=20.0, starved_s=3.0, blocked_s=2.0, pending_starved_s=1.0, pending_blocked_s=4.0, generated_tokens=9, kept_tokens=9
    )
    accounts.hear("r", last, 140.0)
    account = only(accounts, 145.0)
    assert spent(account) == {"start": 10.0, "busy": 20.0, "starved": 3.0, "commit_blocked": 2.0, "tail": 10.0}
    assert account.lifetime_s == 45.0
    assert (account.name, account.processes, account.busy_s, account.generated_tokens, account.output_tokens) == ("r", 1, 20.0, 9, 9)


def test_while_the_run_goes_on_what_is_pending_counts_as_starved_or_blocked() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=20.0, pending_starved_s=1.0, pending_blocked_s=4.0, generated_tokens=9), 135.0)
    assert spent(only(accounts, 137.0, over=False)) == {"start": 10.0, "busy": 20.0, "starved": 3.0, "commit_blocked": 4.0}


def test_while_the_run_goes_on_a_full_engine_is_taken_to_go_on_and_no_token_is_lost() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=20.0, full=True, generated_tokens=900), 130.0)
    assert spent(only(accounts, 132.0, over=False)) == {"start": 10.0, "busy": 22.0}


def test_tokens_that_came_to_nothing_take_their_share_of_the_seconds_with_rows() -> None:
    """A quarter of the tokens; 20 s busy and 4 of the 8 s of tail had rows in them."""
    accounts = Accounts(100.0)
    last = reading(busy_s=20.0, pending_starved_s=8.0, working_s=4.0, generated_tokens=1000, busy_tokens=900, kept_tokens=750)
    accounts.hear("r", last, 138.0)
    account = only(accounts, 138.0)
    assert spent(account) == {"start": 10.0, "busy": 15.0, "tail": 7.0, "lost": 6.0}
    assert (account.busy_s, account.busy_tokens) == (20.0, 900)  # the raw rate is what it was


def test_rows_still_in_a_full_engine_when_the_run_ends_are_lost_with_the_time_since() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=20.0, full=True, generated_tokens=100, kept_tokens=100), 130.0)
    assert spent(only(accounts, 131.0)) == {"start": 10.0, "busy": 20.0, "lost": 1.0}


def test_a_killed_process_keeps_what_was_heard_of_it_and_the_rest_is_lost_until_its_successor_was_started() -> None:
    accounts = Accounts(100.0)
    accounts.look({"r"}, 130.0)
    accounts.hear("r", reading("first", busy_s=20.0, full=True, generated_tokens=200, kept_tokens=150), 130.0)
    accounts.look(set(), 131.0)
    accounts.look({"r"}, 146.0)  # started at 136
    accounts.hear("r", reading("second", generated_tokens=0), 146.0)
    accounts.hear("r", reading("second", busy_s=30.0, generated_tokens=300, kept_tokens=300), 176.0)
    account = only(accounts, 176.0)
    assert spent(account) == {"start": 20.0, "busy": 45.0, "lost": 11.0}
    assert (account.lifetime_s, account.processes) == (76.0, 2)


def test_a_process_that_died_before_its_first_token_did_nothing_that_lasts() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=5.0, pending_starved_s=2.0, working_s=1.0), 117.0)
    accounts.look(set(), 118.0)
    assert spent(only(accounts, 150.0)) == {"start": 10.0, "tail": 1.0, "lost": 7.0}


def test_a_replica_that_went_away_for_good_ends_when_it_was_missed() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=20.0, generated_tokens=100, kept_tokens=100), 130.0)
    accounts.look(set(), 131.0)
    accounts.look(set(), 140.0)
    assert spent(only(accounts, 200.0)) == {"start": 10.0, "busy": 20.0, "lost": 1.0}


def test_a_replica_that_was_only_out_of_sight_loses_nothing() -> None:
    """Its scheduler was lost; the process went on."""
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=20.0), 130.0)
    accounts.look(set(), 131.0)
    accounts.look({"r"}, 160.0)
    accounts.hear("r", reading(busy_s=50.0, generated_tokens=100, kept_tokens=100), 160.0)
    assert spent(only(accounts, 160.0)) == {"start": 10.0, "busy": 50.0}


def test_a_replica_that_other_jobs_used_before_counts_from_the_drivers_beginning() -> None:
    accounts = Accounts(100.0)
    before = reading(
        busy_s=500.0, starved_s=40.0, pending_starved_s=50.0, generated_tokens=5000, kept_tokens=5000, rows=70, prompt_tokens=9
    )
    accounts.hear("r", before, 102.0)
    after = reading(busy_s=520.0, starved_s=93.0, pending_starved_s=2.0, generated_tokens=5200, kept_tokens=5200, rows=80, prompt_tokens=11)
    accounts.hear("r", after, 127.0)
    account = only(accounts, 127.0)
    assert spent(account) == {"busy": 20.0, "starved": 5.0, "tail": 2.0}
    assert account.lifetime_s == 27.0
    assert (account.rows, account.prompt_tokens, account.generated_tokens, account.output_tokens) == (10, 2, 200, 200)


def test_a_replica_that_got_no_row_of_this_job_was_tail_from_the_beginning() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=500.0, pending_starved_s=50.0), 101.0)
    accounts.hear("r", reading(busy_s=500.0, pending_starved_s=70.0), 121.0)
    assert spent(only(accounts, 121.0)) == {"tail": 21.0}


def test_a_replica_that_was_starting_when_the_driver_began_has_the_rest_of_its_start() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(pending_starved_s=1.0), 105.0)  # started at 94, ready at 104
    accounts.hear("r", reading(starved_s=2.0, busy_s=8.0, generated_tokens=1, kept_tokens=1), 114.0)
    assert spent(only(accounts, 114.0)) == {"start": 4.0, "busy": 8.0, "starved": 2.0}


def test_words_that_overtake_each_other_change_nothing() -> None:
    early, late = reading(busy_s=5.0, generated_tokens=1, kept_tokens=1), reading(busy_s=20.0, generated_tokens=2, kept_tokens=2)
    inorder, swapped = Accounts(100.0), Accounts(100.0)
    for accounts, words in ((inorder, (early, late)), (swapped, (late, early))):
        for word in words:
            accounts.hear("r", word, 130.5)
    assert only(inorder, 131.0) == only(swapped, 131.0)


def test_the_quickest_word_tells_when_a_process_began() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=5.0, generated_tokens=1, kept_tokens=1), 117.5)
    accounts.hear("r", reading(busy_s=15.0, generated_tokens=1, kept_tokens=1), 126.0)  # began at 101, not at 102.5
    assert only(accounts, 126.0).lifetime_s == 25.0


def test_a_replica_that_is_not_ready_yet_has_its_start() -> None:
    assert spent(only(Accounts(100.0), 107.0, loading={"r": 6.0})) == {"start": 6.0}


def test_a_replica_that_is_started_again_when_the_run_ends_has_that_start_too() -> None:
    accounts = Accounts(100.0)
    accounts.hear("r", reading(busy_s=20.0, generated_tokens=1, kept_tokens=1), 130.0)
    accounts.look(set(), 131.0)
    account = only(accounts, 140.0, loading={"r": 5.0})
    assert spent(account) == {"start": 15.0, "busy": 20.0, "lost": 5.0}
    assert account.lifetime_s == 40.0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("over", [True, False])
def test_kinds_add_up_to_the_time_from_spawn_to_end(seed: int, over: bool) -> None:
    draw = random.Random(seed)
    accounts, now, began = Accounts(50.0), 0.0, draw.uniform(30.0, 60.0)
    spawned = began
    for number in range(draw.randint(1, 4)):
        now = spawned
        word = reading(f"e{number}", start=draw.uniform(1.0, 20.0), pending_starved_s=draw.random())
        for _ in range(draw.randint(1, 5)):
            growth = {key: getattr(word, key) + draw.uniform(0.0, 9.0) for key in ("busy_s", "starved_s", "blocked_s")}
            growth["starved_s"] += word.pending_starved_s
            tokens = word.generated_tokens + draw.randint(0, 100)
            kept = draw.randint(0, tokens)
            word = reading(
                word.engine, start=word.start_s, **growth, pending_starved_s=draw.uniform(0.0, 9.0), working_s=growth["starved_s"],
                full=draw.random() < 0.5, generated_tokens=tokens, kept_tokens=kept,
            )  # fmt: skip
            now = spawned + word.age_s
            if now >= 50.0:
                accounts.look({"r"}, now)
                accounts.hear("r", word, now)
        gone = now + draw.uniform(0.1, 3.0)
        spawned = gone + draw.uniform(0.0, 3.0)
    ends = now + 1.0
    first = min(life.spawned_at for life in accounts._lives["r"])
    account = only(accounts, ends, over=over)
    assert account.lifetime_s == pytest.approx(ends - max(first, 50.0), abs=0.01)
    assert min(account.seconds.values()) >= 0
    assert tuple(account.seconds) == KINDS
