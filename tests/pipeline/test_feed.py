"""What an engine's ledger hears of the units around it: when commits alone keep rows from it, and what was kept."""

from __future__ import annotations

import time

import pytest

from pipeline.clock import Clock
from pipeline.feed import Feed


@pytest.fixture
def began() -> float:
    return time.monotonic() + 1000.0  # after the feed's own beginning


@pytest.mark.parametrize("kind", ["decode", "write", "commit"])
def test_a_unit_that_writes_while_none_reads_keeps_rows_from_the_engine(began: float, kind: str) -> None:
    feed = Feed()
    feed.move(None, "read", began)
    feed.move("read", kind, began + 1)
    assert feed.blocked_s(began + 3) == pytest.approx(2)
    feed.move(kind, None, began + 4)
    assert feed.blocked_s(began + 9) == pytest.approx(3)


@pytest.mark.parametrize("kind", ["read", "render"])
def test_not_while_another_unit_reads(began: float, kind: str) -> None:
    feed = Feed()
    feed.move(None, "commit", began)
    feed.move(None, kind, began + 1)
    feed.move(kind, "generate", began + 5)
    assert feed.blocked_s(began + 6) == pytest.approx(2)  # before it read and after


@pytest.mark.parametrize("kind", [None, "generate"])
def test_units_that_neither_read_nor_write_do_not_count(began: float, kind: str | None) -> None:
    feed = Feed()
    feed.move(None, kind, began)
    assert feed.blocked_s(began + 5) == 0


def test_seconds_never_run_backwards(began: float) -> None:
    feed = Feed()
    feed.move(None, "write", began + 5)
    feed.move("write", None, began + 4)  # a thread that looked at the clock before the other one
    assert feed.blocked_s(began + 3) == 0


def test_kept_tokens_add_up() -> None:
    feed = Feed()
    feed.keep(3)
    feed.keep(4)
    assert feed.kept_tokens == 7


def test_a_clock_tells_the_feed_what_its_thread_turns_to() -> None:
    class Heard(Feed):
        moves: list[tuple[str | None, str | None]]

        def move(self, before: str | None, after: str | None, now: float) -> None:
            self.moves = [*getattr(self, "moves", []), (before, after)]

    feed = Heard()
    clock = Clock(feed)
    with clock.spend("generate"), clock.spend("read"):
        pass
    assert feed.moves == [(None, "generate"), ("generate", "read"), ("read", "generate"), ("generate", None)]
    assert set(clock.seconds) == {"generate", "read"}
