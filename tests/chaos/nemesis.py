"""Nemesis: finds the processes of a running job and strikes them with signals. Knows process trees, not what they compute."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
import signal
import time
from collections.abc import Callable
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import psutil

Target = Literal["worker", "engine", "node", "scheduler", "driver"]
Kind = Literal["SIGKILL", "SIGTERM", "SIGSTOP"]

KINDS: tuple[Kind, ...] = ("SIGKILL", "SIGTERM", "SIGSTOP")
TARGETS: tuple[Target, ...] = ("worker", "engine", "node", "scheduler", "driver")
_WEIGHTS: dict[tuple[Kind, Target], int] = {
    ("SIGKILL", "worker"): 5,
    ("SIGTERM", "worker"): 3,
    ("SIGSTOP", "worker"): 4,
    ("SIGKILL", "engine"): 3,
    ("SIGSTOP", "engine"): 2,
    ("SIGKILL", "node"): 2,
    ("SIGTERM", "node"): 2,
    ("SIGSTOP", "node"): 1,
    ("SIGKILL", "scheduler"): 3,
    ("SIGTERM", "scheduler"): 1,
    ("SIGSTOP", "scheduler"): 2,
    ("SIGKILL", "driver"): 3,
    ("SIGTERM", "driver"): 2,
    ("SIGSTOP", "driver"): 2,
}
_COMMANDS: dict[str, Target] = {"run": "driver", "worker": "node", "scheduler": "scheduler"}
_PAUSE_S = (0.5, 6.0)
"""Long enough that others take over what a stopped process had, and that it then wakes as a zombie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One signal that was sent."""

    kind: Kind
    target: Target
    at: float
    """Monotonic seconds."""


def role_of(process: psutil.Process) -> Target | None:
    """By its command line; None for helpers, such as Python's resource tracker."""
    words = process.cmdline()
    if any(word.endswith("pipeline.worker") for word in words):
        return "worker"
    for word, following in itertools.pairwise(words):
        if word.rsplit("/", 1)[-1] == "tokenmill" and following in _COMMANDS:
            return _COMMANDS[following]
    return None


class Nemesis:
    """Strikes at processes below `roots`. Owns those it has stopped, and whatever it ever saw."""

    def __init__(
        self,
        roots: Callable[[], list[int]],
        moments: random.Random,
        kinds: Collection[Kind] = KINDS,
        targets: Collection[Target] = TARGETS,
    ) -> None:
        """`roots` gives the ids of the processes that were started last and still run."""
        self._roots, self._moments, self._kinds, self._targets = roots, moments, kinds, targets
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self._stopped: list[tuple[float, int, psutil.Process]] = []
        self.faults: list[Fault] = []

    def look(self) -> dict[Target, list[psutil.Process]]:
        """The job's processes now, by what they are. A driver's children of no known role below a worker are its engine's."""
        found: dict[Target, list[psutil.Process]] = {}
        for root in self._roots():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._walk(psutil.Process(root), None, found)
        return found

    def strike(self, wanted: tuple[Kind, Target] | None = None) -> Fault | None:
        """One fault of those possible now, or the one wanted, at one process of those there; None where there is nobody."""
        there = self.look()
        stopped = {process.pid for _, _, process in self._stopped}
        there = {target: processes for target, processes in there.items() if target in self._targets}
        victims = {target: [process for process in processes if process.pid not in stopped] for target, processes in there.items()}
        possible = [choice for choice in _WEIGHTS if choice[0] in self._kinds and victims.get(choice[1])]
        possible = [choice for choice in possible if wanted in (None, choice)]
        if not possible:
            return None
        kind, target = self._moments.choices(possible, [_WEIGHTS[choice] for choice in possible])[0]
        victim = self._moments.choice(sorted(victims[target], key=lambda process: process.create_time()))
        pause_s = self._moments.uniform(*_PAUSE_S)
        try:
            victim.send_signal(getattr(signal, kind))
        except psutil.NoSuchProcess:
            return None
        if kind == "SIGSTOP":
            heapq.heappush(self._stopped, (time.monotonic() + pause_s, victim.pid, victim))
        fault = Fault(kind=kind, target=target, at=time.monotonic())
        self.faults.append(fault)
        return fault

    def wake(self, *, all_of_them: bool = False) -> None:
        """Continue those whose time has come."""
        while self._stopped and (all_of_them or self._stopped[0][0] <= time.monotonic()):
            _, _, process = heapq.heappop(self._stopped)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    @property
    def stopped(self) -> int:
        return len(self._stopped)

    def left(self, patience_s: float, *, but: Collection[int] = ()) -> list[psutil.Process]:
        """Processes that do not end by themselves, but for those that are to stay and what they started."""
        self.wake(all_of_them=True)
        deadline = time.monotonic() + patience_s
        while alive := self._alive(but):
            if time.monotonic() > deadline:
                return alive
            time.sleep(0.1)
        return []

    def end(self, *, but: Collection[int] = ()) -> None:
        """Kill whatever is left."""
        self.wake(all_of_them=True)
        for process in self._alive(but):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _alive(self, but: Collection[int]) -> list[psutil.Process]:
        stay = set(but)
        for root in but:
            with contextlib.suppress(psutil.NoSuchProcess):
                stay |= {child.pid for child in psutil.Process(root).children(recursive=True)}
        alive = []
        for process in self._seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in stay and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process)
        return alive

    def _walk(self, process: psutil.Process, above: Target | None, found: dict[Target, list[psutil.Process]]) -> None:
        try:
            role = role_of(process)
            children = process.children()
            self._seen.setdefault((process.pid, process.create_time()), process)
            # vLLM names its processes; on CPUs its engine runs inside the worker's, unless a profile says otherwise.
            if role is None and above == "worker" and "EngineCore" in " ".join([process.name(), *process.cmdline()]):
                role = "engine"
        except psutil.NoSuchProcess:
            return
        if role is not None:
            found.setdefault(role, []).append(process)
        for child in children:
            self._walk(child, role or above, found)
