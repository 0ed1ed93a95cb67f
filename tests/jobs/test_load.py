"""Load: what each replica still has before it, by what was sent, taken back, and heard of its counters."""

from __future__ import annotations

from collections import Counter

from jobs.cluster.cluster import ReplicaState
from jobs.load import Load
from jobs.load import begun_rows
from jobs.load import paces
from schemas.ledger import Reading


def reading(engine: str, rows: int, *, busy_s: float = 0.0, tokens: int = 0) -> Reading:
    seconds = {"age_s": busy_s, "start_s": 0.0, "busy_s": busy_s, "starved_s": 0.0, "blocked_s": 0.0, "working_s": 0.0}
    pending = {"pending_starved_s": 0.0, "pending_blocked_s": 0.0}
    counts = {"prompt_tokens": 0, "generated_tokens": tokens, "busy_tokens": tokens, "kept_tokens": tokens}
    return Reading(engine=engine, full=True, rows=rows, **seconds, **pending, **counts)


def replica(
    name: str, *, window: int = 100, rows: int = 0, busy_s: float = 0.0, tokens: int = 0, answered: int = 0, engine: str | None = None
) -> ReplicaState:
    """Of its `tokens`, those of rows that it has answered are `answered`."""
    ledger = reading(engine or name, rows, busy_s=busy_s, tokens=tokens)
    return ReplicaState(name=name, window_rows=window, rows=rows, ledger=ledger, completion_tokens=answered)


def sent_until(load: Load, windows: float) -> Counter[str | None]:
    """Rows by replica, ten at a time, until each has so many windows left."""
    sent = Counter[str | None]()
    while load.fewest_windows < windows:
        name = load.emptiest()
        sent[name] += 10
        load.send(name, 10)
    return sent


def test_a_unit_goes_to_the_replica_with_the_fewest_rows_for_its_window() -> None:
    load, sent = Load(), Counter[str | None]()
    load.look([replica("small", window=16), replica("large", window=64)])
    for _ in range(10):
        name = load.emptiest()
        sent[name] += 1
        load.send(name, 16)
    assert sent == {"small": 2, "large": 8}
    assert load.fewest_windows == 2.0


def test_beyond_its_first_window_a_quicker_replica_gets_more_so_that_all_end_together() -> None:
    load = Load()
    load.look([replica("slow", busy_s=100.0, tokens=1000), replica("quick", busy_s=100.0, tokens=3000)])
    assert sent_until(load, 4.0) == {"slow": 200, "quick": 600}


def test_no_replica_waits_for_its_first_window_however_slow_it_is() -> None:
    load = Load()
    load.look([replica("slow", busy_s=100.0, tokens=10), replica("quick", busy_s=100.0, tokens=3000)])
    assert sent_until(load, 1.0) == {"slow": 100, "quick": 100}


def test_a_pace_is_known_after_twenty_busy_seconds_and_until_then_the_usual_one() -> None:
    assert paces([]) == {}
    assert paces([replica("a"), replica("b", busy_s=19.0, tokens=5)]) == {"a": 1.0, "b": 1.0}
    early, mute = replica("c", busy_s=3.0, tokens=900), ReplicaState(name="d", window_rows=8)
    assert paces([replica("a", busy_s=20.0, tokens=200), replica("b", busy_s=50.0, tokens=1500), early, mute]) == {
        "a": 0.5, "b": 1.5, "c": 1.0, "d": 1.0
    }  # fmt: skip


def test_nobody_is_the_emptiest_of_none() -> None:
    load = Load()
    assert (load.emptiest(), load.fewest_windows) == (None, 0.0)
    load.look([])
    assert (load.emptiest(), load.fewest_windows) == (None, 0.0)


def test_a_unit_that_is_nearly_done_holds_hardly_a_row() -> None:
    load = Load()
    load.look([replica("a", rows=5000), replica("b", rows=70)])  # of an earlier job
    load.send("a", 300)
    load.send("b", 300)
    assert (load.left("a"), load.left("b"), load.fewest_windows) == (300, 300, 3.0)
    load.look([replica("a", rows=5290), replica("b", rows=170)])
    assert (load.left("a"), load.left("b"), load.fewest_windows) == (10, 200, 0.1)
    assert load.emptiest() == "a"


def test_a_unit_that_came_back_changes_nothing_for_the_next_one() -> None:
    load = Load()
    load.look([replica("a")])
    load.send("a", 300)
    load.send("a", 300)
    load.look([replica("a", rows=350)])
    assert load.left("a") == 250
    load.take("a", 300, answered_rows=300, by="a")
    assert load.left("a") == 250
    load.look([replica("a", rows=400)])
    assert load.left("a") == 200


def test_a_result_may_be_quicker_than_the_counter_that_tells_of_it() -> None:
    load = Load()
    load.look([replica("a")])
    load.send("a", 300)
    load.send("a", 300)
    load.take("a", 300, answered_rows=300, by="a")
    assert load.left("a") == 300
    load.look([replica("a", rows=320)])
    assert load.left("a") == 280


def test_a_new_engine_begins_with_all_that_is_sent_to_it() -> None:
    load = Load()
    load.look([replica("a", rows=1000)])
    load.send("a", 300)
    load.look([replica("a", rows=1200)])
    assert load.left("a") == 100
    load.look([replica("a", rows=0, engine="its next")])
    assert load.left("a") == 300
    load.hear("a", reading("a", 1300))  # the old one's last word
    assert load.left("a") == 300
    load.hear("a", reading("its next", 20))
    assert load.left("a") == 280


def test_rows_that_another_replica_answered_are_taken_off_its_own_count() -> None:
    load = Load()
    load.look([replica("a"), replica("b")])
    load.send("a", 300)
    load.send("b", 300)
    load.look([replica("a", rows=0), replica("b", rows=320)])
    load.take("a", 300, answered_rows=300, by="b")  # b had it
    assert (load.left("a"), load.left("b")) == (0, 280)


def test_units_for_replicas_that_are_gone_count_until_they_come_back() -> None:
    load = Load()
    load.look([replica("a"), replica("b")])
    load.send("a", 300)
    load.send(None, 50)
    load.look([replica("b")])
    assert (load.left("a"), load.left(None), load.emptiest()) == (300, 50, "b")
    load.take("a", 300)
    load.take(None, 50)
    assert (load.left("a"), load.left(None)) == (0, 0)


def test_rows_that_never_pass_through_an_engine_are_forgotten_with_the_last_unit() -> None:
    load = Load()
    load.look([replica("a")])
    load.send("a", 300)
    load.take("a", 300)  # all of them had been saved by an earlier attempt
    load.look([replica("a", rows=10)])
    load.send("a", 100)
    assert load.left("a") == 100


def test_a_word_that_comes_with_a_result_is_as_good_as_a_look() -> None:
    load = Load()
    load.look([replica("a"), replica("b")])
    load.send("a", 300)
    load.send("b", 300)
    load.hear("b", reading("b", 120))
    load.hear("b", reading("b", 110))  # an older one that was overtaken
    load.hear("stranger", reading("stranger", 7))
    assert (load.left("a"), load.left("b"), load.emptiest()) == (300, 180, "b")


def test_a_look_that_is_older_than_a_result_takes_nothing_back() -> None:
    load = Load()
    load.look([replica("a", rows=5000)])
    load.send("a", 300)
    load.hear("a", reading("a", 5120))
    load.look([replica("a", rows=5110)])
    assert load.left("a") == 180
    load.hear("a", reading("a", 5300))
    load.take("a", 300, answered_rows=300, by="a")
    load.look([replica("a", rows=5290)])
    load.send("a", 100)
    load.look([replica("a", rows=5295)])
    assert load.left("a") == 100
    load.look([replica("a", rows=5310)])
    assert load.left("a") == 90


def sent_at_once(load: Load, unsent: int) -> Counter[str | None]:
    """Rows by replica, ten at a time, until each has a window, or its share."""
    sent = Counter[str | None]()
    while unsent > 0 and load.fewest_windows < 1.0 and not load.has_its_share:
        name = load.emptiest()
        sent[name] += 10
        load.send(name, 10)
        unsent -= 10
    return sent


def two_at_work() -> Load:
    """Each of two replicas has a batch of a hundred rows."""
    load = Load()
    load.look([replica("a", window=200), replica("b", window=200)], 200)
    assert sent_at_once(load, 200) == {"a": 100, "b": 100}
    return load


def test_who_is_a_moment_ahead_does_not_take_what_is_left_for_all() -> None:
    """Both had a batch of a hundred rows of fifty tokens; one is done, the other nearly."""
    load = two_at_work()
    load.take("a", 100, answered_rows=100, by="a")
    load.look([replica("a", window=200, rows=100, tokens=5000, answered=5000), replica("b", window=200, tokens=4600)], 100)
    assert load.left("b") == 100
    assert sent_at_once(load, 100) == {"a": 60}  # of the 100, and the 8 that the other has before it
    load.take("b", 100, answered_rows=100, by="b")
    done = [replica(name, window=200, rows=100, tokens=5000, answered=5000) for name in "ab"]
    load.look(done, 40)
    assert sent_at_once(load, 40) == {"b": 40}


def test_a_look_from_before_a_result_does_not_make_new_rows_look_begun() -> None:
    load = two_at_work()
    before = [replica(name, window=200, rows=40, tokens=4800, answered=2000) for name in "ab"]
    load.look(before, 100)
    load.hear("a", reading("a", 100, tokens=5000))
    load.take("a", 100, answered_rows=100, by="a")
    sent = sent_at_once(load, 100)
    assert sent == {"a": 60}
    load.look(before, 40)  # the same heartbeat still
    assert sent_at_once(load, 40) == {}
    assert load.has_its_share


def test_rows_that_are_only_begun_are_waited_for_by_nobody() -> None:
    load = two_at_work()
    load.take("a", 100, answered_rows=100, by="a")
    load.look([replica("a", window=200, rows=100, tokens=5000, answered=5000), replica("b", window=200, tokens=100)], 100)
    assert sent_at_once(load, 100) == {"a": 100}


def test_the_share_of_a_replica_that_is_up_soon_is_kept_for_it() -> None:
    load = Load()
    load.look([replica("a", window=256)], 384, 1)
    assert sent_at_once(load, 384) == {"a": 200}
    load.look([replica("a", window=256), replica("b", window=256)], 184)
    assert sent_at_once(load, 184) == {"b": 190}
    alone = Load()
    alone.look([replica("a", window=256)], 384)
    assert sent_at_once(alone, 384) == {"a": 260}


def test_far_from_the_end_every_replica_gets_its_window_whatever_others_have_done() -> None:
    load = Load()
    load.look([replica("a"), replica("b")], 10_000)
    assert sent_at_once(load, 10_000) == {"a": 100, "b": 100}
    load.take("a", 100, answered_rows=100, by="a")
    load.look([replica("a", rows=100, tokens=5000, answered=5000), replica("b", tokens=2400)], 9_800)
    assert sent_at_once(load, 9_800) == {"a": 100}


def test_shares_are_as_windows_are() -> None:
    load = Load()
    load.look([replica("small", window=100), replica("large", window=300)], 200)
    assert sent_at_once(load, 200) == {"small": 50, "large": 150}


def test_the_last_rows_are_sent_whoever_holds_the_others() -> None:
    load = Load()
    load.look([replica("a"), replica("b"), replica("c")], 10)
    assert sum(sent_at_once(load, 10).values()) == 10


def test_a_replica_with_nothing_before_it_may_have_a_unit_without_rows() -> None:
    load = Load()
    load.look([replica("a")], 0)
    assert not load.has_its_share
    load.send("a", 5)
    assert load.has_its_share


def test_a_result_takes_its_rows_off_what_was_begun() -> None:
    load = two_at_work()
    before = [replica(name, window=200, rows=40, tokens=4800, answered=2000) for name in "ab"]
    load.look(before, 20)  # of the sixty rows that each has, 56 rows' worth is generated
    load.hear("a", reading("a", 96, tokens=4800))  # but those are answered by now, and four are left
    assert sent_at_once(load, 20) == {"a": 10}


def test_what_is_begun_is_measured_in_rows_of_the_usual_length() -> None:
    assert begun_rows([]) == {}
    assert begun_rows([replica("a", tokens=500), ReplicaState(name="mute", window_rows=8)]) == {"a": 0.0, "mute": 0.0}
    known = [replica("a", rows=10, tokens=700, answered=500), replica("b", rows=30, tokens=1400, answered=1500)]
    assert begun_rows(known) == {"a": 4.0, "b": 0.0}
    threw_away = replica("a", window=100, rows=10, tokens=70_000, answered=500)
    assert begun_rows([threw_away]) == {"a": 50.0}
