"""Run an accepted job on a cluster: keep the replicas fed, collect reports, try again, drain. Decisions are pure functions."""

from __future__ import annotations

import heapq
import math
import queue
import statistics
import threading
import time
from collections import defaultdict
from collections import deque
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Literal

from jobs.accept import Accepted
from jobs.accounts import Accounts
from jobs.brake import tripped
from jobs.caps import Caps
from jobs.caps import NodeSeconds
from jobs.cluster.cluster import MOST_UNITS_AT_ONCE
from jobs.cluster.cluster import Cluster
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.cluster import num_nodes
from jobs.drain import ASKED_AT as ASKED_AT
from jobs.drain import DrainWatch
from jobs.load import Load
from jobs.plan import Plan
from jobs.plan import canary_units
from pipeline.engine.continuous import WIDER
from schemas.errors import EngineDead
from schemas.errors import ForeignOutput
from schemas.errors import InputChanged
from schemas.errors import ReplicaLost
from schemas.errors import TokenmillError
from schemas.ledger import Reading
from schemas.ledger import ReplicaAccount
from schemas.manifest import Totals
from schemas.manifest import UnitReport
from schemas.unit import WorkUnit

State = Literal["starting", "running", "draining", "complete", "failed", "limit", "drained", "interrupted"]

_TICK_S = 0.5
_LOOK_EVERY_S = 0.25
"""At all replicas, whose words are a second old, or older where they are many."""
_CONTROL_EVERY_S = 2.0
_BACKOFF_S = 1.0
_MIN_UNITS_PER_REPLICA = 2
LIGHTEST = 8
"""Where rows are taken over from earlier outputs, up to so many times the usual units are sent, since engines see few of their rows."""
_MAX_NOTES = 50
_MAX_LOSSES = 30
"""Of one unit: replicas that went away under it. Isolating a deadly row takes some ten; more than this is no accident."""
_LOSS_WAIT_S = 2.0
"""Before a unit whose replica went away is tried again: what was in its engine is stored meanwhile."""
_SOON_S = 30.0
"""For so long after the first replica the others are taken to be up soon, and their share of a small table is kept for them."""
_USUAL_OF = 64
"""Latest units whose median time is the usual one."""
_SLOW_FACTOR = 3.0
_SLOW_LEAST_S = 10.0
"""A unit is slow when it takes three times the usual, and longer than this."""


@dataclass(slots=True)
class Progress:
    """What the driver knows at this moment. Owned by the driver; others read."""

    state: State
    total_units: int
    total_rows: int
    done_before: int
    """Units that an earlier run had committed."""
    rows_before: int
    totals: Totals = field(default_factory=Totals)
    """Of this run."""
    replicas: list[ReplicaState] = field(default_factory=list)
    units_in_flight: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    """Why a unit was given up, by unit."""
    retries: int = 0
    doubled: int = 0
    """Units that were run a second time because they held up the end."""
    outcomes: dict[str, int] = field(default_factory=dict)
    began_at: float = 0.0
    """Unix seconds."""
    dashboard: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    """The EngineInfo of the replica heard of first, as plain data."""
    canary: Literal["", "running", "done", "stopped"] = ""
    """Whether rows that run first are still at it; stopped where the run ended before their last one."""
    usd: float | None = None
    """What this run's nodes have cost, where their price is known."""
    node_s: float = 0.0
    """Seconds of all its nodes together."""
    notes: list[str] = field(default_factory=list)
    """What the user should hear, in order; whoever shows them takes them out."""


def may_submit(units_in_flight: int, fewest_windows: float, wanted_windows: float, num_replicas: int) -> bool:
    """Whether one more unit keeps the replicas busy, rather than only waiting on one of them.

    Enough rows to fill every replica's window, and two units a replica, so that the next one's reading overlaps. `fewest_windows` are
    the rows left of the emptiest replica by its window: that others have more than they need does not help that one.
    """
    return num_replicas > 0 and (fewest_windows < wanted_windows or units_in_flight < _MIN_UNITS_PER_REPLICA * num_replicas)


def wanted_rows(replicas: Sequence[ReplicaState], *, wide: bool, rows_left: int, num_expected: int) -> int:
    """Rows that the replicas should have between them: a window each.

    Wide windows are filled only up to these replicas' share of what is left, or the first one up would take a small table whole.
    """
    usual = sum(replica.window_rows for replica in replicas)
    if not wide or not replicas:
        return usual
    share = math.ceil(rows_left * len(replicas) / max(num_expected, len(replicas)))
    return max(usual, min(WIDER * usual, share))


def units_at_once(plan: Plan, window_rows: int) -> int:
    """Units that one replica has in flight at most: enough rows for its window, one that is read, and one whose last rows are under way.

    No more threads than that: each keeps what the tokenizer's Rust side caches, 16 of them 45 MB more than 2.
    """
    rows_per_unit = max(1.0, plan.num_rows / len(plan.units))
    return min(math.ceil(window_rows / rows_per_unit) + 2, MOST_UNITS_AT_ONCE)


def engine_rows(num_rows: int, so_far: Totals) -> int:
    """Rows of a unit that an engine will see, going by how many the units so far took over from earlier outputs."""
    share = so_far.reused_rows / so_far.rows if so_far.rows else 0.0
    return math.ceil(num_rows * max(1 - share, 1 / LIGHTEST))


def next_step(error: BaseException, tries: Tries, max_attempts: int) -> Literal["retry", "give_up", "stop"]:
    """What a unit's failure leads to, counted in `tries` already."""
    if isinstance(error, ForeignOutput):
        return "stop"
    if isinstance(error, InputChanged):
        return "give_up"
    return "retry" if tries.attempts < max_attempts and tries.losses < _MAX_LOSSES else "give_up"


def slow_unit(flying: Mapping[int, Flying], usual_s: float | None, idle: Sequence[ReplicaState], now: float) -> int | None:
    """The unit to run a second time because it holds up the end: the longest in flight, if that is far beyond the usual."""
    if usual_s is None or not idle:
        return None
    single = {index: flight for index, flight in flying.items() if not flight.doubled}
    if not single:
        return None
    index = min(single, key=lambda each: single[each].since)
    return index if now - single[index].since > max(_SLOW_LEAST_S, _SLOW_FACTOR * usual_s) else None


@dataclass(slots=True)
class Tries:
    """How often a unit went wrong."""

    attempts: int = 0
    """For reasons of its own."""
    losses: int = 0
    """Because its replica went away."""


@dataclass(slots=True)
class Flying:
    """A unit that is with a replica, or with two."""

    unit: WorkUnit
    since: float
    on: str | None
    """The replica that it was meant for."""
    rows: int = 0
    """Of it, that an engine will see as far as is known."""
    copies: int = 1
    """Still at work."""
    doubled: bool = False
    """Whether a second one was ever sent."""


class Driver:
    """One run of one job. `run` is called once; `drain` from anywhere."""

    def __init__(
        self,
        accepted: Accepted,
        cluster: Cluster,
        *,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
        caps: Caps | None = None,
    ) -> None:
        """Engine seconds, and what is capped, count from `began` on the clock; by default from now."""
        self._accepted, self._cluster, self._clock = accepted, cluster, clock
        self._job = accepted.job
        self._canary = canary_units(accepted.plan, accepted.job.canary)
        first = [unit for unit in accepted.todo if unit.index in self._canary]
        self._held = [unit for unit in accepted.todo if unit.index not in self._canary] if first else []
        self._ready: list[WorkUnit] = list(reversed(first or accepted.todo))
        self._later: list[tuple[float, int, WorkUnit]] = []  # (when, unit index, unit): a heap
        self._flying: dict[int, Flying] = {}
        self._tries: defaultdict[int, Tries] = defaultdict(Tries)
        self._took_s: deque[float] = deque(maxlen=_USUAL_OF)
        self._finished: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
        self._drain, self._drains = threading.Event(), DrainWatch(accepted.out_uri)
        self._stop: BaseException | None = None
        self._load = Load()
        self._wanted_windows, self._num_nodes = 1.0, 0
        self._first_at: float | None = None
        """When the first replica was seen."""
        self._next_look = -math.inf
        self._rows_left = sum(unit.num_rows for unit in accepted.todo)
        self._next_control = 0.0
        self._began = clock() if began is None else began
        self._accounts = Accounts(self._began)
        self._caps = caps or Caps()
        self._node_seconds = NodeSeconds(self._began)
        self._capped = False
        plan = accepted.plan
        self.progress = Progress(
            state="starting",
            total_units=len(plan.units),
            total_rows=plan.num_rows,
            done_before=len(accepted.done),
            rows_before=sum(unit.num_rows for unit in plan.units if unit.index in accepted.done),
            began_at=time.time(),
            dashboard=cluster.dashboard,
            canary="running" if self._held else "",
        )

    def drain(self) -> None:
        """Start no further unit; those in flight finish and are committed."""
        self._drain.set()

    def accounts(self, *, over: bool) -> tuple[ReplicaAccount, ...]:
        """Where each replica's seconds went until now; `over` says whether the run ends with that."""
        return self._accounts.at(self._clock(), over=over, loading=self._cluster.loading_seconds())

    def run(self, on_tick: Callable[[Progress], None] = lambda _: None) -> Progress:
        """Until everything is committed or given up, or the drain is done. Raises ForeignOutput and EngineStartError."""
        progress = self.progress
        while True:
            self._look_around()
            self._submit()
            if not self._flying and (self._drain.is_set() or not (self._ready or self._later or self._release())):
                break
            self._collect()
            on_tick(progress)
        if progress.canary == "running":
            progress.canary = "stopped" if self._ready or self._later else "done"
        if self._stop is not None:
            raise self._stop
        progress.state = self._final_state()
        on_tick(progress)
        return progress

    def _release(self) -> bool:
        """Now that the canary is over: let go what waited for it, if its rows are good enough, few as they may be; whether any did."""
        if not self._held:
            return False
        self.progress.canary = "done"
        if self._canary <= self.progress.failed.keys():
            self._say("every unit of the canary was given up: the rest does not begin")
            self.drain()
        elif (reason := tripped(self._job.limits, self.progress.totals, however_few=True)) is not None:
            self._stop_at(reason)
        else:
            self._ready, self._held = list(reversed(self._held)), []
        return bool(self._ready)

    def _final_state(self) -> State:
        if self.progress.failed:
            return "failed"
        if not (self._ready or self._later or self._held):
            return "complete"
        return "limit" if self._capped else "drained"

    def _look_around(self) -> None:
        progress, now = self.progress, self._clock()
        # Results may come a hundred a second and replicas be thousands: not at all of them for each.
        if now >= self._next_look or not progress.replicas:
            self._next_look = now + _LOOK_EVERY_S
            try:
                self._look_at_replicas(now)
            except TokenmillError:
                self._say_notes()  # why it gives up is in them
                raise
        self._say_notes()
        if progress.state == "starting" and progress.replicas:
            progress.state = "running"
        if now >= self._next_control and not self._drain.is_set():
            self._next_control = now + _CONTROL_EVERY_S
            if self._drains.asked():
                self._say("`tokenmill cancel` asked this job to drain")
                self.drain()
        self._look_at_caps(now)
        if self._drain.is_set() and progress.state in ("starting", "running"):
            progress.state = "draining"
        # Not while nobody is there: what is sent into the void comes back as lost, and a unit may be lost only so often.
        while self._later and self._later[0][0] <= now and progress.replicas and not self._drain.is_set():
            _, _, unit = heapq.heappop(self._later)
            self._fly(unit)

    def _say_notes(self) -> None:
        for note in self._cluster.notes():
            self._say(note)

    def _look_at_replicas(self, now: float) -> None:
        progress, replicas = self.progress, self._cluster.replicas()
        if replicas is progress.replicas:
            return  # not a word that was not there before
        progress.replicas = replicas
        self._accounts.look({replica.name for replica in replicas}, now)
        for replica in replicas:
            progress.engine = progress.engine or replica.engine
            if replica.ledger is not None:
                self._accounts.hear(replica.name, replica.ledger, now)
        expected = self._cluster.num_replicas
        if replicas and self._first_at is None:
            self._first_at = now
        # Those of a cluster are started together, and come up within moments of each other, or much later.
        soon = self._first_at is not None and now < self._first_at + _SOON_S
        flying = sum(flight.unit.num_rows for flight in self._flying.values())
        unsent = engine_rows(max(0, self._rows_left - flying), progress.totals)
        self._load.look(replicas, unsent, max(0, expected - len(replicas)) if soon else 0)
        self._num_nodes = num_nodes(replicas)
        wanted = wanted_rows(replicas, wide=self._job.lengths_vary, rows_left=self._rows_left, num_expected=expected)
        self._wanted_windows = wanted / max(1, sum(replica.window_rows for replica in replicas))

    def _look_at_caps(self, now: float) -> None:
        progress, node_seconds = self.progress, self._node_seconds
        node_seconds.add(now, self._num_nodes)
        progress.node_s, progress.usd = node_seconds.total, self._caps.usd(node_seconds.total)
        if self._drain.is_set() or not (self._ready or self._later or self._held):
            return
        usual_s = statistics.median(self._took_s) if self._took_s else 0.0
        reason = tripped(self._job.limits, progress.totals) or self._caps.reached(
            now - self._began, node_seconds.total, self._num_nodes, usual_s
        )
        if reason is not None:
            self._stop_at(reason)

    def _stop_at(self, reason: str) -> None:
        self._capped = True
        self._say(f"{reason}: draining; the same command with a higher limit goes on")
        self.drain()

    def _submit(self) -> None:
        num_replicas = len(self.progress.replicas)
        while self._ready and not self._drain.is_set():
            wanted = may_submit(len(self._flying), self._load.fewest_windows, self._wanted_windows, num_replicas)
            if not wanted or self._load.has_its_share:
                break
            self._fly(self._ready.pop())
        if self._ready or self._later or self._drain.is_set():
            return
        idle = [replica for replica in self.progress.replicas if not replica.in_flight]
        usual_s = statistics.median(self._took_s) if self._took_s else None
        index = slow_unit(self._flying, usual_s, idle, self._clock())
        if index is not None:
            flight = self._flying[index]
            flight.doubled, flight.copies = True, 2
            self.progress.doubled += 1
            self._say(f"unit {index} takes long: it is run a second time, on {idle[0].name}; the first to commit wins")
            self._send(flight.unit, idle[0].name)

    def _fly(self, unit: WorkUnit) -> None:
        on = self._load.emptiest()  # a cluster's own guess goes by seconds, which it does not know before the end
        rows = engine_rows(unit.num_rows, self.progress.totals)
        self._flying[unit.index] = Flying(unit=unit, since=self._clock(), on=on, rows=rows)
        self._load.send(on, rows)
        self.progress.units_in_flight = len(self._flying)
        self._send(unit, on)

    def _send(self, unit: WorkUnit, on: str | None) -> None:
        tries = self._tries[unit.index]

        def done(result: Result) -> None:
            self._finished.put((unit.index, result))

        attempt = tries.attempts + tries.losses + 1
        self._cluster.submit(self._accepted.out_uri, self._accepted.record.fingerprint, unit, attempt, done, on)

    def _collect(self) -> None:
        """Wait a tick for results; take all that are there."""
        try:
            index, result = self._finished.get(timeout=_TICK_S)
            while True:
                self._take(index, result)
                index, result = self._finished.get_nowait()
        except queue.Empty:
            return

    def _take(self, index: int, result: Result) -> None:
        said = result.said if isinstance(result, TokenmillError) else None if isinstance(result, BaseException) else result.get("said")
        if said is not None:
            reading = Reading(**said["ledger"])
            self._accounts.hear(said["name"], reading, self._clock())
            self._load.hear(said["name"], reading)
        flight = self._flying.get(index)
        if flight is None:
            return  # the second of two copies; the first one's word was enough
        failed = isinstance(result, BaseException)
        if failed and flight.copies > 1:
            flight.copies -= 1
            return  # the other copy is still at it
        del self._flying[index]
        self.progress.units_in_flight = len(self._flying)
        if isinstance(result, BaseException):
            self._load.take(flight.on, flight.rows)
            self._take_failure(flight.unit, result)
        else:
            report, outcome = UnitReport(**result["report"]), result["outcome"]
            answered = 0 if outcome == "already" else report.rows - report.resumed_rows - report.reused_rows - report.error_rows
            self._load.take(flight.on, flight.rows, answered_rows=max(0, answered), by=report.worker)
            if outcome != "already" and not report.resumed_rows and not self._tries[index].losses:
                self._took_s.append(self._clock() - flight.since)  # of what was begun before this says nothing
            self._rows_left -= flight.unit.num_rows
            self._take_report(report, outcome)

    def _take_report(self, report: UnitReport, outcome: str) -> None:
        progress = self.progress
        if outcome in ("created", "acknowledgement_lost"):
            progress.totals.add(report)
        else:  # another driver's work, or that of a copy
            progress.done_before += 1
            progress.rows_before += report.rows
        progress.outcomes[outcome] = progress.outcomes.get(outcome, 0) + 1

    def _take_failure(self, unit: WorkUnit, error: BaseException) -> None:
        progress, tries, limits = self.progress, self._tries[unit.index], self._job.limits
        lost = isinstance(error, ReplicaLost | EngineDead)
        tries.losses += lost
        tries.attempts += not lost
        reason = f"{type(error).__name__}: {error}"
        step = next_step(error, tries, limits.attempts)
        self._rows_left -= 0 if step == "retry" else unit.num_rows
        if step == "retry":
            wait_s = _LOSS_WAIT_S if lost else _BACKOFF_S * 2 ** (tries.attempts - 1)
            progress.retries += 1
            what = "came back" if lost else f"failed (attempt {tries.attempts} of {limits.attempts})"
            self._say(f"unit {unit.index} {what}, again in {wait_s:.0f} s: {reason}")
            heapq.heappush(self._later, (self._clock() + wait_s, unit.index, unit))
        else:
            self._say(f"unit {unit.index} is given up: {reason}")
            progress.failed[unit.index] = reason
            if step == "stop":
                self._stop = error
                self.drain()

    def _say(self, note: str) -> None:
        self.progress.notes.append(note)
        del self.progress.notes[:-_MAX_NOTES]
