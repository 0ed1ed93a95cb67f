"""Load: rows that each replica still has before it. Units sent and taken back, and replicas' own counters in; who needs more out.

A unit that is nearly done holds hardly a row, and counted whole would keep its replica from getting the next one while its batch runs
empty. So rows that a replica has answered are taken off as it says so. Beyond a window, which every replica needs, a quicker one gets
more rows: what has been sent stays where it is, and all are to end at the same time. For the same reason no replica gets more than its
share of what is left while others are about to be done, or to be up: rows of equal length end together, and whoever is a moment ahead
would take what was left for all. Knows no cluster and no clock.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence

from jobs.cluster.cluster import ReplicaState
from schemas.ledger import Reading

_PACE_OF_S = 20.0
"""Busy seconds after which a replica's pace is known; batches of a few seconds differ by more than nodes do."""


class Load:
    """Owned by one driver. A look costs a little for each replica, everything else the same among a few and among thousands."""

    def __init__(self) -> None:
        self._sent: Counter[str | None] = Counter()
        """Rows of units in flight, by the replica that they were meant for."""
        self._units: Counter[str | None] = Counter()
        self._engines: dict[str, str] = {}
        """Each replica's present one."""
        self._heard: dict[str, int] = {}
        """Rows that it has answered since it came up."""
        self._taken: dict[str, int] = {}
        """Of those, rows that units in flight have no part in."""
        self._windows: dict[str, int] = {}
        """Of the replicas that are there."""
        self._paces: dict[str, float] = {}
        """Theirs, by the mean of those known; 1 where it is not."""
        self._order: dict[str, int] = {}
        self._heap: list[tuple[float, int, str]] = []
        """(windows left, place, name); entries that do not hold any more are passed over."""
        self._begun: dict[str, float] = {}
        """What has been generated of rows that are not answered, in rows."""
        self._share = math.inf
        """Windows of each replica, if all that is left, sent or not, were to be spread over them."""

    def look(self, replicas: Sequence[ReplicaState], unsent_rows: float = math.inf, num_coming: int = 0) -> None:
        """These are there, and this is what they say; so many rows have not been sent to any, and so many replicas will soon be there."""
        for replica in replicas:
            name, engine = replica.name, replica.ledger.engine if replica.ledger else ""
            if engine != self._engines.get(name, engine):
                self._heard[name] = self._taken[name] = 0  # it begins anew with what is sent to it
            self._engines[name] = engine
            # A result may have told of more than this, which is from before it.
            self._heard[name] = max(replica.rows, self._heard.get(name, 0))
            if not self._units[name] or name not in self._taken:
                self._taken[name] = self._heard[name]
        begun = begun_rows(replicas)  # by then, some of them may have been answered since, which a result has told
        self._begun = {replica.name: max(0.0, begun[replica.name] - self._heard[replica.name] + replica.rows) for replica in replicas}
        self._windows = {replica.name: replica.window_rows for replica in replicas}
        unfinished = sum(self._unfinished(name) for name in self._windows)
        here = sum(self._windows.values())
        self._share = (unsent_rows + unfinished) / max(1, here + num_coming * here / max(1, len(replicas)))
        self._paces = paces(replicas)
        self._order = {replica.name: place for place, replica in enumerate(replicas)}
        self._heap = [(self._windows_left(name), place, name) for name, place in self._order.items()]
        heapq.heapify(self._heap)

    def hear(self, name: str, reading: Reading) -> None:
        """What a replica's engine said with a result, before the next look; of an engine that no look has found yet, nothing."""
        if name in self._windows and reading.engine == self._engines[name] and reading.rows > self._heard[name]:
            self._begun[name] = max(0.0, self._begun[name] - (reading.rows - self._heard[name]))
            self._heard[name] = reading.rows
            self._push(name)

    def left(self, name: str | None) -> int:
        """Rows of units in flight that were meant for this replica and that, as far as is known, it has not answered."""
        if name is None:
            return self._sent[name]
        return max(0, self._sent[name] - max(0, self._heard.get(name, 0) - self._taken.get(name, 0)))

    def emptiest(self) -> str | None:
        """The replica with the fewest windows left; None where there is none."""
        while self._heap and self._heap[0][0] != self._windows_left(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    @property
    def fewest_windows(self) -> float:
        """Its rows left, by its window, and beyond the first one by its pace, too."""
        name = self.emptiest()
        return 0.0 if name is None else self._windows_left(name)

    @property
    def has_its_share(self) -> bool:
        """Whether the emptiest has as much before it as it should do of all that is left. One that has nothing may always have more."""
        name = self.emptiest()
        unfinished = 0.0 if name is None else self._unfinished(name)
        return name is not None and unfinished > 0 and unfinished / self._windows[name] >= self._share

    def _unfinished(self, name: str) -> float:
        return max(0.0, self.left(name) - self._begun[name])

    def send(self, name: str | None, num_rows: int) -> None:
        """A unit goes to this replica, or anywhere."""
        self._change(name, num_rows, 1, 0)

    def take(self, name: str | None, num_rows: int, *, answered_rows: int = 0, by: str | None = None) -> None:
        """It came back; so many of its rows had gone through an engine, and not always through that of the replica it was meant for."""
        self._change(name, -num_rows, -1, 0)
        if answered_rows:
            self._change(by, 0, 0, answered_rows)

    def _change(self, name: str | None, num_rows: int, num_units: int, answered_rows: int) -> None:
        self._sent[name] += num_rows
        self._units[name] += num_units
        if name is not None:
            self._taken[name] = self._taken.get(name, 0) + answered_rows
        if not self._units[name]:
            del self._sent[name], self._units[name]
        if name is not None and name in self._order:
            self._push(name)

    def _push(self, name: str) -> None:
        heapq.heappush(self._heap, (self._windows_left(name), self._order[name], name))

    def _windows_left(self, name: str) -> float:
        windows = self.left(name) / self._windows[name]
        return windows if windows < 1.0 else max(1.0, windows / self._paces[name])


def begun_rows(replicas: Sequence[ReplicaState]) -> dict[str, float]:
    """Output tokens of rows that are not answered, by what a row comes to: of half a window at most, which is a batch, since what an
    engine threw away is among them. 0 where no replica has answered any.
    """
    rows = sum(replica.rows for replica in replicas)
    mean = sum(replica.completion_tokens for replica in replicas) / rows if rows else 0.0

    def begun(replica: ReplicaState) -> float:
        if replica.ledger is None or not mean:
            return 0.0
        return min(max(0, replica.ledger.generated_tokens - replica.completion_tokens) / mean, replica.window_rows / 2)

    return {replica.name: begun(replica) for replica in replicas}


def paces(replicas: Sequence[ReplicaState]) -> dict[str, float]:
    """Output tokens in a busy second of each replica, by the mean of those that have been busy for long enough; 1 for the others."""
    known = {
        replica.name: replica.ledger.busy_tokens / replica.ledger.busy_s
        for replica in replicas
        if replica.ledger is not None and replica.ledger.busy_s >= _PACE_OF_S and replica.ledger.busy_tokens > 0
    }
    mean = sum(known.values()) / len(known) if known else 1.0
    return {replica.name: known.get(replica.name, mean) / mean for replica in replicas}
