"""Ledger: where an engine's seconds go. Clock readings and row counts in, a Reading out; knows no thread, no request and no clock.

The batch is full enough while at least half of it is taken. Time below that is pending until another row comes (then the engine
was starved, or blocked by commits) or the job is over (then it was the tail, which the driver knows and the engine does not).

A step costs a comparison of two numbers. Seconds are added up only when the batch becomes half full, ceases to be, or empties;
they lie in one immutable value, which is replaced as a whole, so that another thread may read it at any time without a lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal
from typing import NamedTuple

from schemas.ledger import Reading

_LOOK_EVERY_S = 1.0
"""How often the tokens of unfinished rows are counted: what is known of them if the process dies."""

_Level = Literal["empty", "low", "full"]


class _Seconds(NamedTuple):
    """All that was added up until `since`, and how full the batch is from then on."""

    since: float
    level: _Level
    blocked_then_s: float
    busy_s: float = 0.0
    starved_s: float = 0.0
    blocked_s: float = 0.0
    pending_starved_s: float = 0.0
    pending_blocked_s: float = 0.0
    working_s: float = 0.0

    def until(self, now: float, blocked_now_s: float) -> _Seconds:
        """With the time since then added to what it was spent on."""
        spent_s = max(0.0, now - self.since)
        if self.level == "full":
            return self._replace(since=self.since + spent_s, blocked_then_s=blocked_now_s, busy_s=self.busy_s + spent_s)
        blocked_s = min(spent_s, max(0.0, blocked_now_s - self.blocked_then_s))
        return self._replace(
            since=self.since + spent_s,
            blocked_then_s=blocked_now_s,
            pending_starved_s=self.pending_starved_s + spent_s - blocked_s,
            pending_blocked_s=self.pending_blocked_s + blocked_s,
            working_s=self.working_s + (spent_s if self.level == "low" else 0.0),
        )

    def settled(self) -> _Seconds:
        """Another row came: what was pending was not the tail."""
        return self._replace(
            starved_s=self.starved_s + self.pending_starved_s,
            blocked_s=self.blocked_s + self.pending_blocked_s,
            pending_starved_s=0.0,
            pending_blocked_s=0.0,
        )


class Ledger:
    """Owned by the engine's thread. Only `read` may be called by others."""

    def __init__(self, *, engine: str, batch_rows: int, spawned_at: float, now: float, blocked_s: Callable[[float], float]) -> None:
        """The engine is up. `blocked_s` says for how many seconds until a moment commits have kept it from getting rows."""
        self._engine, self._half_rows, self._blocked_s = engine, batch_rows / 2, blocked_s
        self._start_s, self._up_at = now - spawned_at, now
        self._seconds = _Seconds(since=now, level="empty", blocked_then_s=blocked_s(now))
        self._rows = self._prompt_tokens = 0
        self._done_tokens = self._seen_tokens = self._busy_tokens = self._tokens_when_full = 0
        self._look_at = now
        self._stopped_at: float | None = None

    def admit(self, now: float) -> None:
        """Rows are about to go in."""
        if self._seconds.level != "full":
            self._seconds = self._seconds.until(now, self._blocked_s(now)).settled()

    def advance(self, now: float, num_rows: int, tokens_inside: Callable[[], int]) -> None:
        """So many rows are inside from now on. `tokens_inside` counts what they have generated; it is asked only now and then."""
        level: _Level = "full" if num_rows >= self._half_rows else "low" if num_rows else "empty"
        before = self._seconds.level
        if level != before:
            if "full" in (level, before):
                self._look(now, tokens_inside)
            if before == "full":
                self._busy_tokens += self._seen_tokens - self._tokens_when_full
            elif level == "full":
                self._tokens_when_full = self._seen_tokens
            self._seconds = self._seconds.until(now, self._blocked_s(now))._replace(level=level)
        elif now >= self._look_at:
            self._look(now, tokens_inside)

    def finish(self, prompt_tokens: int, generated_tokens: int) -> None:
        """A row was answered; of its output so many tokens were generated here."""
        self._rows += 1
        self._prompt_tokens += prompt_tokens
        self._done_tokens += generated_tokens

    def throw_away(self, generated_tokens: int) -> None:
        """Rows left unanswered, with so many tokens."""
        self._done_tokens += generated_tokens

    @property
    def generated_tokens(self) -> int:
        """All that was made here, as far as it was counted."""
        return max(self._seen_tokens, self._done_tokens)

    def stop(self, now: float) -> None:
        """The engine died: no second after this is its own."""
        self._stopped_at = now

    def _look(self, now: float, tokens_inside: Callable[[], int]) -> None:
        self._look_at = now + _LOOK_EVERY_S
        self._seen_tokens = self._done_tokens + tokens_inside()

    def read(self, now: float, *, kept_tokens: int) -> Reading:
        """As of now."""
        now = now if self._stopped_at is None else min(now, self._stopped_at)
        seconds = self._seconds
        seconds = seconds.until(now, self._blocked_s(now))
        generated = self.generated_tokens
        return Reading(
            engine=self._engine,
            age_s=self._start_s + seconds.since - self._up_at,
            start_s=self._start_s,
            busy_s=seconds.busy_s,
            starved_s=seconds.starved_s,
            blocked_s=seconds.blocked_s,
            pending_starved_s=seconds.pending_starved_s,
            pending_blocked_s=seconds.pending_blocked_s,
            working_s=seconds.working_s,
            full=seconds.level == "full",
            rows=self._rows,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=generated,
            busy_tokens=self._busy_tokens + (generated - self._tokens_when_full if seconds.level == "full" else 0),
            kept_tokens=kept_tokens,
        )
