"""When a run must end, by the clock or by its cost. Pure; the driver asks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from datetime import timedelta

from schemas.duration import parse_duration
from schemas.errors import JobError
from schemas.job import LimitsSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """What the drivers of the same command took that died before this one."""

    seconds: float = 0.0
    """Since the first one began."""
    node_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Caps:
    """Of one run. None is no cap."""

    earlier: Earlier = Earlier()
    deadline_s: float | None = None
    """Since the run's command, or its first driver's where that died."""
    max_usd: float | None = None
    usd_per_hour: float | None = None
    """Of one node."""

    def usd(self, node_s: float) -> float | None:
        """For so many seconds of a node; None where no price is known."""
        return None if self.usd_per_hour is None else node_s / 3600 * self.usd_per_hour

    def reached(self, elapsed_s: float, node_s: float, num_nodes: int, usual_unit_s: float) -> str | None:
        """Why no unit may begin any more: it would not be done within the cap, going by how long units usually take. None if it may.

        `node_s` are all nodes' seconds so far, `num_nodes` are there now; both without what earlier drivers took.
        """
        elapsed_s, node_s = elapsed_s + self.earlier.seconds, node_s + self.earlier.node_s
        if self.deadline_s is not None and elapsed_s + usual_unit_s >= self.deadline_s:
            return (
                f"limits.deadline: {elapsed_s:,.0f} s of {self.deadline_s:,.0f} s are over, and a unit takes {usual_unit_s:,.0f} s"
                if elapsed_s < self.deadline_s
                else f"limits.deadline: {self.deadline_s:,.0f} s are over"
            )
        spent = self.usd(node_s)
        if self.max_usd is None or spent is None:
            return None
        then = self.usd(node_s + usual_unit_s * max(1, num_nodes)) or 0.0
        if then < self.max_usd:
            return None
        return f"limits.max_cost_usd: {spent:,.2f} of {self.max_usd:,.2f} USD are spent, {then:,.2f} when what is in flight is done"


class NodeSeconds:
    """Seconds of nodes that a run has cost since its command, by how many there were at each look. Never less than before.

    A node costs while its engines load, too: one more than ever before counts from as long before it was seen as the first one took.
    """

    def __init__(self, began: float) -> None:
        self._began = self._looked = began
        self._num_nodes = self._most = 1
        self._start_s: float | None = None
        self.total = 0.0

    def add(self, now: float, num_nodes: int) -> None:
        """Until now there were those of the last look. Where none is seen, one costs all the same."""
        self.total += (now - self._looked) * self._num_nodes
        self._looked, self._num_nodes = now, max(1, num_nodes)
        if num_nodes:
            self._start_s = now - self._began if self._start_s is None else self._start_s
            self.total += self._start_s * max(0, num_nodes - self._most)
            self._most = max(self._most, num_nodes)


def caps_of(limits: LimitsSpec, *, profile_usd_per_hour: float | None, now: datetime, earlier: Earlier | None = None) -> Caps:
    """Of a driver that begins now. Raises JobError where the deadline is none, or a cost is capped and no price known.

    Where the deadline has passed it does so only for a command's first driver: one that goes on for another reaches it.
    """
    price = limits.usd_per_hour or profile_usd_per_hour
    if limits.max_cost_usd is not None and price is None:
        raise JobError(
            "limits.max_cost_usd: nobody knows what a node costs here; set limits.usd_per_hour, or engine.profile to a size with a price"
        )
    before = earlier or Earlier()
    deadline_s = _seconds_until(limits.deadline, now - timedelta(seconds=before.seconds)) if limits.deadline is not None else None
    return Caps(earlier=before, deadline_s=deadline_s, max_usd=limits.max_cost_usd, usd_per_hour=price)


def _seconds_until(deadline: str, now: datetime) -> float:
    try:
        at = datetime.fromisoformat(deadline)
    except ValueError:
        return parse_duration(deadline, "limits.deadline")
    if at.tzinfo is None:
        raise JobError(f"limits.deadline: found {deadline!r}, expected a moment with its zone, as in 2026-11-27T06:00:00Z, or 8h")
    left_s = (at - now).total_seconds()
    if left_s <= 0:
        raise JobError(f"limits.deadline: {deadline} has passed")
    return left_s
