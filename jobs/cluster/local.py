"""A cluster on this machine: a Dask scheduler in this process, worker processes beside it, and a supervisor over them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import fields
from pathlib import Path
from typing import Any

import dask
from distributed import Client
from distributed import Future
from distributed import LocalCluster as DaskCluster

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from pipeline.model import Model
from pipeline.profile import ReplicaPlan
from pipeline.worker import DASK_CONFIG
from pipeline.worker import ENVIRONMENT
from pipeline.worker import EXIT_START_FAILED
from pipeline.worker import WorkerConfig
from pipeline.worker import replica_metrics
from pipeline.worker import run_unit_task
from schemas.errors import EngineStartError
from schemas.unit import WorkUnit

_MAX_RESTARTS = 5
"""Of one replica in a row, each after less than `_STABLE_S` of work."""
_STABLE_S = 600.0
_START_LIMIT_S = 1800.0
_POLL_S = 0.2
_CLOSE_GRACE_S = 10.0
_LOG_LINES = 15
_CAUSE_IS_IN_THE_LOG = "See root cause above"
_ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception): .+)$")


@dataclass(slots=True)
class _Slot:
    """One replica's process and what is known of it."""

    name: str
    index: int
    process: subprocess.Popen[bytes] | None = None
    state: str = "waiting"
    restarts: int = 0
    message: str = ""
    start_s: float | None = None
    since: float = 0.0
    """Of its state, monotonic seconds."""


class LocalCluster:
    """Replicas as child processes. They end with this process, however it ends."""

    def __init__(self, *, plan: ReplicaPlan, model: Model, kind: str, units_at_once: int) -> None:
        self._plan, self._model, self._kind, self._units_at_once = plan, model, kind, units_at_once
        self._folder = Path(tempfile.mkdtemp(prefix="tokenmill-"))
        self._slots = [_Slot(name=f"local-{index}", index=index) for index in range(plan.replicas)]
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # Two engines that load at the same time on two cores are both late; one at a time starts work sooner.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._max_loading = max(1, cores // 2) if kind == "vllm" else plan.replicas
        self._config = dask.config.set(DASK_CONFIG)
        self._config.__enter__()
        self._dask = DaskCluster(
            n_workers=0, processes=True, host="127.0.0.1", protocol="tcp://", dashboard_address="127.0.0.1:0", silence_logs=50
        )
        self._client = Client(self._dask, set_as_default=False)
        self._nonce = uuid.uuid4().hex[:6]
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._supervisor.start()

    @property
    def dashboard(self) -> str | None:
        return str(self._dask.dashboard_link) if _has_bokeh() else None

    @property
    def num_replicas(self) -> int:
        """Ready or not."""
        return len(self._slots)

    @property
    def client(self) -> Client:
        """For what goes beyond units, such as a benchmark's own tasks."""
        return self._client

    def replicas(self) -> list[ReplicaState]:
        known = {field.name for field in fields(ReplicaState)} - {"name"}
        states = []
        for info in self._client.sync(self._client.scheduler.identity, n_workers=-1)["workers"].values():
            metrics = {key: value for key, value in replica_metrics(info).items() if key in known}
            if metrics:
                states.append(ReplicaState(name=str(info["name"]), **metrics))
        if not states:
            self._raise_if_hopeless()
        return sorted(states, key=lambda state: state.name)

    def submit(self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None]) -> None:
        key = f"unit-{fingerprint[:8]}-{unit.index:08d}-{self._nonce}a{attempt}"
        future = self._client.submit(run_unit_task, out_uri, fingerprint, unit.to_dict(), key=key, retries=0, pure=False)

        def report(finished: Future) -> None:
            try:
                result: Result = finished.result()
            except BaseException as error:  # carried to the driver, which decides
                result = error
            finished.release()
            done(result)

        future.add_done_callback(report)

    def notes(self) -> list[str]:
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def start_seconds(self) -> dict[str, float]:
        return {slot.name: slot.start_s for slot in self._slots if slot.start_s is not None}

    def close(self, *, at_once: bool = False) -> None:
        """Ends every process and removes the logs, which are kept where a replica failed."""
        self._closing.set()
        self._supervisor.join()
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
        with contextlib.suppress(Exception):  # whatever Dask says at its end, the units are committed or not
            self._client.close(timeout=2)
            self._dask.close(timeout=5)
        self._config.__exit__(None, None, None)
        if not any(slot.state == "failed" or slot.restarts for slot in self._slots):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _supervise(self) -> None:
        try:
            self._watch()
        except Exception as error:  # the thread's outermost: without it the driver would wait for replicas for ever
            for slot in self._slots:
                if slot.state != "ready":
                    slot.state, slot.message = "failed", f"its supervisor stopped: {type(error).__name__}: {error}"
            self._note(f"replicas are not looked after any more: {type(error).__name__}: {error}")

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_S):
            for slot in self._slots:
                self._look_at(slot)
            loading = sum(slot.state == "starting" for slot in self._slots)
            for slot in self._slots:
                if slot.state == "waiting" and loading < self._max_loading:
                    self._start(slot)
                    loading += 1

    def _look_at(self, slot: _Slot) -> None:
        if slot.process is None or slot.state in ("waiting", "failed"):
            return
        said = self._status(slot)
        if said.get("state") == "ready" and slot.state != "ready":
            slot.state, slot.start_s, slot.message, slot.since = "ready", said["start_s"], "", time.monotonic()
            self._note(f"replica {slot.name} is ready after {said['start_s']:.0f} s ({said['engine']['kind']}, {said['engine']['dtype']})")
        code = slot.process.poll()
        if code is None:
            if slot.state == "starting" and time.monotonic() - slot.since > _START_LIMIT_S:
                slot.state, slot.message = (
                    "failed",
                    f"it was not ready after {_START_LIMIT_S / 60:.0f} minutes; the end of its log:\n{self._log_tail(slot)}",
                )
                self._kill_group(slot)
            return
        self._kill_group(slot)
        # A start that fails where one went well before (a GPU not yet given back, say) is worth another try.
        if (said.get("state") == "failed" or code == EXIT_START_FAILED) and slot.start_s is None:
            slot.state, slot.message = "failed", self._start_failure(slot, said)
            self._note(f"replica {slot.name} did not start: {slot.message} (log: {self._log(slot)})")
            return
        slot.message = f"its process ended with {_exit_words(code)}"
        stable = slot.state == "ready" and time.monotonic() - slot.since > _STABLE_S
        slot.restarts = 1 if stable else slot.restarts + 1
        if slot.restarts > _MAX_RESTARTS:
            slot.state = "failed"
            slot.message += f" {slot.restarts} times in a row; the end of its log:\n{self._log_tail(slot)}"
            self._note(f"replica {slot.name} is given up: {slot.message}")
        else:
            slot.state = "waiting"
            self._note(f"replica {slot.name}: {slot.message}; starting it again (log: {self._log(slot)})")

    def _start(self, slot: _Slot) -> None:
        status = self._folder / f"{slot.name}.json"
        status.unlink(missing_ok=True)
        config = WorkerConfig(
            scheduler=self._dask.scheduler_address,
            name=slot.name,
            model=asdict(self._model),
            kind=self._kind,
            options=self._plan.options,
            num_threads=self._units_at_once,
            status_path=str(status),
        )
        config_path = self._folder / f"{slot.name}.config.json"
        config.save(config_path)
        environment = {**os.environ, **ENVIRONMENT, **self._plan.environment_of(slot.index)}
        with self._log(slot).open("ab") as log:
            slot.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.worker", str(config_path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C reaches the driver only
            )
        slot.state, slot.since = "starting", time.monotonic()

    def _kill_group(self, slot: _Slot) -> None:
        """The process and whatever it started, such as vLLM's engine core."""
        if slot.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(slot.process.pid, signal.SIGKILL)

    def _raise_if_hopeless(self) -> None:
        if self._slots and all(slot.state == "failed" for slot in self._slots):
            reasons = "; ".join(dict.fromkeys(slot.message for slot in self._slots))
            raise EngineStartError(f"no engine replica could be started: {reasons} (logs: {self._folder})")

    def _status(self, slot: _Slot) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads((self._folder / f"{slot.name}.json").read_text())
        except (OSError, ValueError):
            return {}
        return said if slot.process is not None and said.get("pid") == slot.process.pid else {}

    def _log(self, slot: _Slot) -> Path:
        return self._folder / f"{slot.name}.log"

    def _log_tail(self, slot: _Slot) -> str:
        lines = self._log(slot).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def _start_failure(self, slot: _Slot, said: dict[str, Any]) -> str:
        """What the replica said, with the cause out of its log where vLLM's engine core died in a process of its own."""
        message: str = said.get("message") or self._log_tail(slot)
        if _CAUSE_IS_IN_THE_LOG in message:
            causes = [
                match.group(1) for line in self._log(slot).read_text(errors="replace").splitlines() if (match := _ERROR_LINE.search(line))
            ]
            causes = [cause for cause in causes if _CAUSE_IS_IN_THE_LOG not in cause]
            message = f"{causes[0]} ({message})" if causes else message
        return message

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"signal {signal.Signals(-code).name}{hint}"
    return f"signal {-code}"


def _has_bokeh() -> bool:
    import importlib.util

    return importlib.util.find_spec("bokeh") is not None
