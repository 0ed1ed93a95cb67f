"""Supervisor: keeps replica processes alive on one node. Starts them, watches them from outside, restarts them, ends them.

Knows nothing of jobs, and of units only what a dead replica's flight record says.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from pipeline.flight import Flight
from pipeline.flight import is_hung
from pipeline.flight import read_flight
from pipeline.worker import ENVIRONMENT
from pipeline.worker import EXIT_EVICTED
from pipeline.worker import EXIT_GROUP_OVER
from pipeline.worker import EXIT_START_FAILED
from pipeline.worker import WorkerConfig
from schemas.errors import EngineStartError

MAX_FRUITLESS = 5
"""Deaths of one replica in a row before which no row was inside: starting it again does not help."""
MAX_DEADLY = 16
"""The same with rows inside, but none finished. Halving finds one row in 512 in ten; a broken device never ends."""
_STABLE_S = 600.0
_START_LIMIT_S = 1800.0
_POLL_S = 0.2
_WATCH_S = 2.0
_CLOSE_GRACE_S = 10.0
EVICT_GRACE_S = 25.0
"""Of the 30 s that Azure gives a spot machine between its notice and its end."""
_LOG_LINES = 15
_CAUSE_IS_IN_THE_LOG = "See root cause above"
_ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception): .+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """One replica to keep alive."""

    config: WorkerConfig
    environment: dict[str, str]
    """Over this process's, set before the replica's process starts."""


@dataclass(slots=True)
class _Slot:
    """One replica's process and what is known of it."""

    spec: ReplicaSpec
    process: subprocess.Popen[bytes] | None = None
    state: str = "waiting"
    """waiting, starting, ready, failed (given up) or left (evicted on request)."""
    deaths: int = 0
    """In a row, without a finished row or a time of calm between them."""
    restarted: bool = False
    message: str = ""
    start_s: float | None = None
    since: float = 0.0
    """Of its state, monotonic seconds."""

    @property
    def name(self) -> str:
        return self.spec.config.name


def engines_at_once(kind: str, num_replicas: int) -> int:
    """How many engines may load at the same time: most of what each does, it does on one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_replicas, cores) if kind == "vllm" else num_replicas


class Supervisor:
    """Replica processes as children. They end with this process, however it ends."""

    def __init__(
        self,
        specs: Sequence[ReplicaSpec],
        *,
        max_loading: int,
        silence_s: float,
        on_death: Callable[[Flight, str, bool], None] = lambda *_: None,
    ) -> None:
        """At most `max_loading` load their engine at once. A ready one that has rows and moves none for `silence_s` is ended.

        `on_death` hears what was in an engine that died, how, and whether somebody else killed it; it may raise OSError.
        """
        self._slots = [_Slot(spec=spec) for spec in specs]
        self._max_loading, self._silence_s, self._on_death = max_loading, silence_s, on_death
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._closing, self._leaving = threading.Event(), threading.Event()
        self._leave_by = 0.0
        self._next_watch = 0.0
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()

    @property
    def num_replicas(self) -> int:
        """Ready or not."""
        return len(self._slots)

    @property
    def ended(self) -> bool:
        """Whether no replica runs and none will."""
        return all(slot.state in ("failed", "left") for slot in self._slots)

    def notes(self) -> list[str]:
        """What happened since the last call, for people."""
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def start_seconds(self) -> dict[str, float]:
        """Seconds that each replica took to come up, the last time it did."""
        return {slot.name: slot.start_s for slot in self._slots if slot.start_s is not None}

    def loading_seconds(self) -> dict[str, float]:
        """Of replicas whose process is not ready yet: seconds since it was started."""
        now = time.monotonic()
        return {slot.name: now - slot.since for slot in self._slots if slot.state == "starting"}

    def given_up(self) -> dict[str, str]:
        """Why, by the names of replicas that will not come up, or not again."""
        return {slot.name: slot.message for slot in self._slots if slot.state == "failed"}

    def raise_if_hopeless(self) -> None:
        """Raises EngineStartError once every replica is given up."""
        if self._slots and all(slot.state == "failed" for slot in self._slots):
            reasons = "; ".join(dict.fromkeys(slot.message for slot in self._slots))
            logs = ", ".join(dict.fromkeys(slot.spec.config.folder for slot in self._slots))
            raise EngineStartError(f"no engine replica could be started: {reasons} (logs: {logs})")

    def evict(self) -> None:
        """Every replica hands its units back, finished rows saved, and leaves; none is started again. Returns at once."""
        self._leave_by = time.monotonic() + EVICT_GRACE_S
        self._leaving.set()
        for slot in self._slots:
            if slot.process is not None and slot.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.process.pid, signal.SIGTERM)

    def close(self, *, at_once: bool = False) -> None:
        """End every process. Logs stay where a replica failed."""
        self._closing.set()
        self._thread.join()
        for slot in self._slots:
            if slot.process is not None and slot.process.stdin is not None:
                slot.process.stdin.close()  # the worker takes this as its end
        deadline = time.monotonic() + (0 if at_once else _CLOSE_GRACE_S)
        for slot in self._slots:
            if slot.process is None:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                slot.process.wait(max(0.0, deadline - time.monotonic()))
            self._kill_group(slot)
            slot.process.wait()
        if not any(slot.state == "failed" or slot.restarted for slot in self._slots):
            for folder in {slot.spec.config.folder for slot in self._slots}:
                shutil.rmtree(folder, ignore_errors=True)

    def _supervise(self) -> None:
        try:
            while not self._closing.wait(_POLL_S):
                self._turn()
        except Exception as error:  # the thread's outermost: without it the driver would wait for replicas for ever
            for slot in self._slots:
                if slot.state != "ready":
                    slot.state, slot.message = "failed", f"its supervisor stopped: {type(error).__name__}: {error}"
            self._note(f"replicas are not looked after any more: {type(error).__name__}: {error}")

    def _turn(self) -> None:
        watch = time.monotonic() >= self._next_watch
        if watch:
            self._next_watch = time.monotonic() + _WATCH_S
        for slot in self._slots:
            self._look_at(slot)
            if watch:
                self._watch(slot)
        if self._leaving.is_set():
            return
        loading = sum(slot.state == "starting" for slot in self._slots)
        for slot in self._slots:
            if slot.state == "waiting" and loading < self._max_loading:
                self._start(slot)
                loading += 1

    def _look_at(self, slot: _Slot) -> None:
        if self._leaving.is_set() and slot.state == "waiting":
            slot.state = "left"
        if slot.process is None or slot.state in ("waiting", "failed", "left"):
            return
        said = self._status(slot)
        if said.get("state") == "ready" and slot.state != "ready":
            slot.state, slot.start_s, slot.message, slot.since = "ready", said["start_s"], "", time.monotonic()
            self._note(f"replica {slot.name} is ready after {said['start_s']:.0f} s ({said['engine']['kind']}, {said['engine']['dtype']})")
        if said.get("state") == "gathering":
            slot.since = time.monotonic()  # other nodes of its replica may come when they like
        code = slot.process.poll()
        if code is not None:
            self._take_death(slot, said, code)
        elif self._leaving.is_set() and time.monotonic() > self._leave_by:
            self._kill_group(slot)
        elif slot.state == "starting" and time.monotonic() - slot.since > _START_LIMIT_S:
            slot.state = "failed"
            slot.message = f"it was not ready after {_START_LIMIT_S / 60:.0f} minutes; the end of its log:\n{self._log_tail(slot)}"
            self._kill_group(slot)

    def _watch(self, slot: _Slot) -> None:
        """End a replica whose engine hangs; from outside, for its own threads may hang with it."""
        flight = read_flight(slot.spec.config.flight_path) if slot.state == "ready" else None
        if flight is not None and is_hung(flight, now=time.monotonic(), silence_s=self._silence_s):
            slot.message = f"its engine made no step for {self._silence_s:.0f} s that gave any of its {flight.num_rows} rows a token"
            self._kill_group(slot)

    def _take_death(self, slot: _Slot, said: dict[str, Any], code: int) -> None:
        self._kill_group(slot)
        if code == EXIT_EVICTED:
            slot.state, slot.restarted = ("left" if self._leaving.is_set() else "waiting"), True
            self._note(f"replica {slot.name} was evicted and handed its units back")
            return
        if self._leaving.is_set():
            slot.state = "left"
            return
        # A start that fails where one went well before (a GPU not yet given back, say) is worth another try.
        if (said.get("state") == "failed" or code == EXIT_START_FAILED) and slot.start_s is None:
            slot.state, slot.message = "failed", start_failure(said.get("message") or self._log_tail(slot), self._log_lines(slot))
            self._note(f"replica {slot.name} did not start: {slot.message} (log: {slot.spec.config.log_path})")
            return
        flight = read_flight(slot.spec.config.flight_path) if slot.state == "ready" else None
        how = slot.message or (
            "another node of its group was lost" if code == EXIT_GROUP_OVER else f"its process ended with {exit_words(code)}"
        )
        if code == EXIT_GROUP_OVER and not (flight is not None and flight.rows):
            slot.state, slot.restarted = "waiting", True
            self._note(f"replica {slot.name}: {how}; looking for another group")
            return
        if flight is not None and flight.rows:
            try:
                self._on_death(flight, how, code in (-signal.SIGKILL, EXIT_GROUP_OVER) and not slot.message)
            except OSError as error:
                self._note(f"replica {slot.name}: which rows were in it could not be stored: {error}")
        calm = (flight is not None and flight.rows_finished > 0) or (slot.state == "ready" and time.monotonic() - slot.since > _STABLE_S)
        slot.deaths = 1 if calm else slot.deaths + 1
        slot.message, slot.restarted = "", True
        if slot.deaths > (MAX_DEADLY if flight is not None and flight.rows else MAX_FRUITLESS):
            slot.state = "failed"
            slot.message = f"{how}, {slot.deaths} times in a row; the end of its log:\n{self._log_tail(slot)}"
            self._note(f"replica {slot.name} is given up: {slot.message}")
        else:
            slot.state = "waiting"
            self._note(f"replica {slot.name}: {how}; starting it again (log: {slot.spec.config.log_path})")

    def _start(self, slot: _Slot) -> None:
        config = replace(slot.spec.config, spawned_at=time.monotonic())
        config.clear()
        config.save()
        if slot.process is not None and slot.process.stdin is not None:
            slot.process.stdin.close()
        with config.log_path.open("ab") as log:
            slot.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.worker", str(config.config_path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **slot.spec.environment},
                start_new_session=True,  # a terminal's Ctrl-C reaches this process only
            )
        slot.state, slot.since = "starting", time.monotonic()

    def _kill_group(self, slot: _Slot) -> None:
        """The process and whatever it started, such as vLLM's engine core."""
        if slot.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(slot.process.pid, signal.SIGKILL)

    def _status(self, slot: _Slot) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(slot.spec.config.status_path.read_text())
        except (OSError, ValueError):
            return {}
        return said if slot.process is not None and said.get("pid") == slot.process.pid else {}

    def _log_lines(self, slot: _Slot) -> list[str]:
        try:
            return slot.spec.config.log_path.read_text(errors="replace").splitlines()
        except OSError:
            return []

    def _log_tail(self, slot: _Slot) -> str:
        return "\n".join(self._log_lines(slot)[-_LOG_LINES:])

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)


def start_failure(message: str, log_lines: Sequence[str]) -> str:
    """Why an engine did not start: its message, with the cause out of its log where vLLM's engine core died in a process of its own."""
    if _CAUSE_IS_IN_THE_LOG not in message:
        return message
    causes = [match.group(1) for line in log_lines if (match := _ERROR_LINE.search(line))]
    causes = [cause for cause in causes if _CAUSE_IS_IN_THE_LOG not in cause]
    return f"{causes[0]} ({message})" if causes else message


def exit_words(code: int) -> str:
    """How a process ended, by its return code."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"signal {signal.Signals(-code).name}{hint}"
    return f"signal {-code}"
