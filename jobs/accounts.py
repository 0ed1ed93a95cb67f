"""Accounts: what a driver hears of its replicas' ledgers, added up to one account a replica. Clock readings are passed in; no I/O.

What counts is the part of each process's life that lies in the run. A process that is gone can say no more: what was heard of it
last counts, and its time from then until its successor was started, or until it was missed, is lost.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace

from schemas.ledger import KINDS
from schemas.ledger import Kind
from schemas.ledger import Reading
from schemas.ledger import ReplicaAccount

_DIGITS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One process that owned an engine, as a driver heard of it. Seconds are on the driver's clock."""

    first: Reading
    last: Reading
    spawned_at: float
    """As near as the quickest message told it."""
    gone_at: float | None = None
    """When it was missed."""

    def hears(self, reading: Reading, now: float) -> Life:
        """With one more word of it; words may overtake each other."""
        spawned_at = min(self.spawned_at, now - reading.age_s)
        return replace(self, last=reading if reading.age_s >= self.last.age_s else self.last, spawned_at=spawned_at)


def account_of(life: Life, *, began_at: float, ends_at: float, is_last: bool, over: bool) -> ReplicaAccount:
    """A life's part in a run that began and, here, ended at these moments; `is_last` where no other process followed it.

    `over` says whether tokens that are not kept by now never will be, and whether no further row will come.
    """
    last, alive = life.last, is_last and life.gone_at is None
    base = _before(life, began_at)
    start_s = last.start_s - base.start_s
    busy_s, working_s = last.busy_s - base.busy_s, last.working_s - base.working_s
    starved_s = last.starved_s + last.pending_starved_s - base.starved_s - base.pending_starved_s
    blocked_s = last.blocked_s + last.pending_blocked_s - base.blocked_s - base.pending_blocked_s
    rest_s = max(0.0, ends_at - life.spawned_at - last.age_s)  # since the last word
    lost_s = tail_s = 0.0
    if is_last and over:
        tail_starved_s, tail_blocked_s = min(last.pending_starved_s, starved_s), min(last.pending_blocked_s, blocked_s)
        starved_s, blocked_s, tail_s = starved_s - tail_starved_s, blocked_s - tail_blocked_s, tail_starved_s + tail_blocked_s
    busy_tokens, busy_before_s = last.busy_tokens - base.busy_tokens, busy_s
    generated, kept = last.generated_tokens - base.generated_tokens, last.kept_tokens - base.kept_tokens
    if over or not alive:
        # Of the seconds with a row in the engine, the share of tokens that came to nothing.
        wasted = min(1.0, max(0, generated - kept) / generated) if generated > 0 else float(not alive)
        low_s = starved_s + blocked_s + tail_s
        useful = 1.0 - wasted * min(1.0, working_s / low_s) if low_s > 0 else 1.0
        lost_s = wasted * busy_s + (1.0 - useful) * low_s
        busy_s, starved_s, blocked_s, tail_s = (1.0 - wasted) * busy_s, useful * starved_s, useful * blocked_s, useful * tail_s
    if not alive or (over and last.full):
        lost_s += rest_s
    elif over:
        tail_s += rest_s
    elif last.full:
        busy_s += rest_s
    else:
        starved_s += rest_s
    return ReplicaAccount(
        name="",
        processes=1,
        seconds=_rounded(
            {"start": start_s, "busy": busy_s, "starved": starved_s, "commit_blocked": blocked_s, "tail": tail_s, "lost": lost_s}
        ),
        rows=last.rows - base.rows,
        prompt_tokens=last.prompt_tokens - base.prompt_tokens,
        generated_tokens=max(0, generated),
        output_tokens=max(0, kept),
        busy_s=round(busy_before_s, _DIGITS),
        busy_tokens=max(0, busy_tokens),
    )


def _before(life: Life, began_at: float) -> Reading:
    """What its ledger said, or would have said, when the run began. A negative count is time before the first word, but in the run."""
    first = life.first
    nothing = replace(
        first, age_s=0.0, start_s=0.0, busy_s=0.0, starved_s=0.0, blocked_s=0.0, pending_starved_s=0.0, pending_blocked_s=0.0,
        working_s=0.0, rows=0, prompt_tokens=0, generated_tokens=0, busy_tokens=0, kept_tokens=0,
    )  # fmt: skip
    age_s = began_at - life.spawned_at
    if age_s <= 0:
        return nothing
    start_s = min(age_s, first.start_s)
    unheard_s = max(0.0, first.age_s - max(age_s, first.start_s))  # ready, in the run, and waiting for this driver to find it
    return replace(first, start_s=start_s, starved_s=first.starved_s - unheard_s)


def summed(name: str, accounts: Collection[ReplicaAccount]) -> ReplicaAccount:
    """Several accounts of one replica as one."""
    return ReplicaAccount(
        name=name,
        processes=sum(account.processes for account in accounts),
        seconds=_rounded({kind: sum(account.seconds.get(kind, 0.0) for account in accounts) for kind in KINDS}),
        rows=sum(account.rows for account in accounts),
        prompt_tokens=sum(account.prompt_tokens for account in accounts),
        generated_tokens=sum(account.generated_tokens for account in accounts),
        output_tokens=sum(account.output_tokens for account in accounts),
        busy_s=round(sum(account.busy_s for account in accounts), _DIGITS),
        busy_tokens=sum(account.busy_tokens for account in accounts),
    )


def _rounded(seconds: Mapping[Kind, float]) -> dict[Kind, float]:
    return {kind: round(max(0.0, value), _DIGITS) for kind, value in seconds.items()}


class Accounts:
    """One run's. Owned by its driver."""

    def __init__(self, began_at: float) -> None:
        self._began_at = began_at
        self._lives: dict[str, list[Life]] = {}

    def hear(self, name: str, reading: Reading, now: float) -> None:
        """A word of a replica has come."""
        lives = self._lives.setdefault(name, [])
        for number, life in enumerate(lives):
            if life.last.engine == reading.engine:
                lives[number] = life.hears(reading, now)
                return
        lives.append(Life(first=reading, last=reading, spawned_at=now - reading.age_s))

    def look(self, names: Collection[str], now: float) -> None:
        """These are there now. Who is missed may come back."""
        for name, lives in self._lives.items():
            gone_at = None if name in names else now if lives[-1].gone_at is None else lives[-1].gone_at
            lives[-1] = replace(lives[-1], gone_at=gone_at)

    def at(self, now: float, *, over: bool, loading: Mapping[str, float]) -> tuple[ReplicaAccount, ...]:
        """One account a replica, by name; `loading` has those whose process is not ready, with the seconds since its start."""
        return tuple(self._account(name, now, over, loading.get(name)) for name in sorted({*self._lives, *loading}))

    def _account(self, name: str, now: float, over: bool, loading_s: float | None) -> ReplicaAccount:
        lives = self._lives.get(name, [])
        accounts = []
        for number, life in enumerate(lives):
            is_last = number + 1 == len(lives)
            if not is_last:
                ends_at = lives[number + 1].spawned_at
            elif loading_s is not None:
                ends_at = now - loading_s
            else:
                ends_at = now if life.gone_at is None else life.gone_at
            accounts.append(account_of(life, began_at=self._began_at, ends_at=ends_at, is_last=is_last, over=over))
        account = summed(name, accounts)
        if loading_s is None:
            return account
        start_s = account.seconds["start"] + min(loading_s, now - self._began_at)
        return account.model_copy(update={"seconds": {**account.seconds, "start": round(start_s, _DIGITS)}})
