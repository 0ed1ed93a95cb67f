"""The ledger by a clock that the test sets: every second is of one kind, and what is pending is known only afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pipeline.engine.ledger import Ledger
from schemas.ledger import Reading

BATCH_ROWS = 8


def no_tokens() -> int:
    return 0


def ledger(blocked_s: Callable[[float], float] = lambda _: 0.0, *, batch_rows: int = BATCH_ROWS) -> Ledger:
    """Spawned at 100, up at 110."""
    return Ledger(engine="e", batch_rows=batch_rows, spawned_at=100.0, now=110.0, blocked_s=blocked_s)


def read(book: Ledger, now: float) -> Reading:
    return book.read(now, kept_tokens=0)


def parts(reading: Reading) -> tuple[float, float, float, float, float, float]:
    """start, busy, starved, blocked, and of the last two what is pending."""
    starved, blocked = reading.starved_s, reading.blocked_s
    return reading.start_s, reading.busy_s, starved, blocked, reading.pending_starved_s, reading.pending_blocked_s


def whole(reading: Reading) -> float:
    return sum(parts(reading))


def test_an_engine_without_a_row_has_its_start_and_what_is_pending() -> None:
    reading = read(ledger(), 113.0)
    assert parts(reading) == (10.0, 0.0, 0.0, 0.0, 3.0, 0.0)
    assert (reading.age_s, reading.full, reading.working_s) == (13.0, False, 0.0)


def test_time_before_a_row_was_starved() -> None:
    book = ledger()
    book.admit(112.0)
    book.advance(112.0, 1, no_tokens)
    assert parts(read(book, 112.0)) == (10.0, 0.0, 2.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("rows", "busy_s"), [(0, 0.0), (1, 0.0), (3, 0.0), (4, 5.0), (8, 5.0), (20, 5.0)])
def test_a_batch_of_eight_is_busy_from_four_rows_on(rows: int, busy_s: float) -> None:
    book = ledger()
    book.advance(110.0, rows, no_tokens)
    assert read(book, 115.0).busy_s == busy_s


@pytest.mark.parametrize(("batch_rows", "rows", "full"), [(1, 1, True), (3, 1, False), (3, 2, True)])
def test_half_of_an_odd_batch_is_the_larger_half(batch_rows: int, rows: int, full: bool) -> None:
    book = ledger(batch_rows=batch_rows)
    book.advance(110.0, rows, no_tokens)
    assert read(book, 111.0).full is full


def test_time_under_half_full_is_pending_until_another_row_comes() -> None:
    book = ledger()
    book.admit(110.0)
    book.advance(110.0, 8, no_tokens)
    book.advance(120.0, 3, no_tokens)
    book.advance(124.0, 0, no_tokens)
    assert parts(read(book, 125.0)) == (10.0, 10.0, 0.0, 0.0, 5.0, 0.0)
    assert read(book, 125.0).working_s == 4.0
    book.admit(126.0)
    book.advance(126.0, 1, no_tokens)
    assert parts(read(book, 129.0)) == (10.0, 10.0, 6.0, 0.0, 3.0, 0.0)


def test_a_row_that_comes_while_the_batch_is_half_full_settles_nothing() -> None:
    book = ledger()
    book.admit(110.0)
    book.advance(110.0, 8, no_tokens)
    book.admit(115.0)
    book.advance(115.0, 9, no_tokens)
    book.advance(120.0, 2, no_tokens)
    assert parts(read(book, 121.0)) == (10.0, 10.0, 0.0, 0.0, 1.0, 0.0)


def test_waiting_for_commits_is_told_from_waiting_for_rows() -> None:
    """Commits from 112 to 115."""
    book = ledger(lambda now: min(max(now - 112.0, 0.0), 3.0))
    assert parts(read(book, 114.0)) == (10.0, 0.0, 0.0, 0.0, 2.0, 2.0)
    book.admit(120.0)
    book.advance(120.0, 8, no_tokens)
    assert parts(read(book, 121.0)) == (10.0, 1.0, 7.0, 3.0, 0.0, 0.0)


def test_commits_beside_a_full_batch_block_nothing() -> None:
    book = ledger(lambda now: now - 110.0)
    book.advance(110.0, 8, no_tokens)
    book.advance(120.0, 1, no_tokens)
    assert parts(read(book, 121.0)) == (10.0, 10.0, 0.0, 0.0, 0.0, 1.0)


def test_tokens_of_the_busy_time_are_told_from_the_others() -> None:
    """40 tokens in the first row's time alone, 800 with eight of them, 60 in the tail."""
    book = ledger()
    book.advance(110.0, 1, no_tokens)
    book.advance(112.0, 8, lambda: 40)
    for _ in range(6):
        book.finish(5, 120)
    book.advance(120.0, 2, lambda: 120)
    for _ in range(2):
        book.finish(5, 90)
    book.advance(125.0, 0, no_tokens)
    reading = read(book, 126.0)
    assert (reading.rows, reading.prompt_tokens, reading.generated_tokens, reading.busy_tokens) == (8, 40, 900, 800)


def test_tokens_of_rows_inside_are_seen_every_second() -> None:
    book, asked = ledger(), []

    def tokens_inside() -> int:
        asked.append(True)
        return 100 * len(asked)

    book.advance(110.0, 8, tokens_inside)
    for step in range(1, 13):
        book.advance(110.0 + step / 4, 8, tokens_inside)
    assert len(asked) == 4  # when it became full, and after one, two and three seconds
    reading = read(book, 113.0)
    assert (reading.generated_tokens, reading.busy_tokens) == (400, 300)


def test_tokens_of_rows_thrown_away_were_generated_all_the_same() -> None:
    book = ledger()
    book.throw_away(70)
    book.finish(5, 30)
    assert (read(book, 111.0).generated_tokens, read(book, 111.0).rows) == (100, 1)


def test_a_dead_engine_has_no_more_seconds() -> None:
    book = ledger()
    book.advance(110.0, 8, no_tokens)
    book.stop(115.0)
    assert read(book, 115.0) == read(book, 999.0)
    assert parts(read(book, 999.0)) == (10.0, 5.0, 0.0, 0.0, 0.0, 0.0)


def test_a_reader_whose_clock_is_behind_sees_the_last_change() -> None:
    book = ledger()
    book.advance(120.0, 8, no_tokens)
    assert read(book, 119.0).age_s == 20.0


@pytest.mark.parametrize("seed", range(20))
def test_every_second_is_counted_once_whatever_happens(seed: int) -> None:
    draw = random.Random(seed)
    book, now, rows = ledger(lambda at: (at - 110.0) * 0.3), 110.0, 0
    for _ in range(500):
        now += draw.expovariate(10)
        if draw.random() < 0.4:
            book.admit(now)
            rows += draw.randint(1, 6)
        else:
            rows = max(0, rows - draw.randint(0, 6))
        book.advance(now, rows, no_tokens)
        reading = read(book, now + draw.random())
        assert whole(reading) == pytest.approx(reading.age_s)
        assert reading.working_s <= whole(reading) - reading.start_s - reading.busy_s + 1e-9
    assert min(parts(reading)[:4]) > 0
