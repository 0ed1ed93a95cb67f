"""Engines alone: a replica plan and requests in, tokens and seconds out. No Dask, no Parquet, nothing between a row and its engine.

Each replica is a process with the plan's environment and options, as in a job (see pipeline.trial_worker). All of them begin a
round at one barrier and run the bare add and step loop, each over every nth request. None outlives the Replicas that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from typing import Self

from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.profile import ReplicaPlan
from pipeline.supervisor import engines_at_once
from pipeline.supervisor import exit_words
from pipeline.supervisor import start_failure
from pipeline.worker import ENVIRONMENT
from schemas.errors import EngineDead
from schemas.errors import EngineError
from schemas.errors import EngineStartError

_LOG_LINES = 15
_TICK_S = 1.0
_CLOSE_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialProgress:
    """How far a running trial is, over all replicas."""

    rows: int
    """Finished."""
    output_tokens: int
    """Also of rows that are not finished, where that can be told (see Core.begun)."""
    prompt_tokens: int
    """Of rows that were finished or had begun to generate."""
    seconds: float
    """Since the barrier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaResult:
    """What one replica did in one round."""

    name: str
    engine: EngineInfo
    start_s: float
    """From its process's start until its engine was ready."""
    seconds: float
    """From the first request that it took until the last one was done."""
    rows: int
    """Finished."""
    prompt_tokens: int
    """Of rows that were finished or had begun to generate."""
    output_tokens: int
    """Also of rows that were not finished when the trial was stopped, where that can be told (see Core.begun)."""
    generations: dict[int, Generation] = field(default_factory=dict)
    """By position; empty unless they are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What all replicas did in one round."""

    replicas: tuple[ReplicaResult, ...]
    elapsed_s: float
    """From the first replica's begin to the last one's end."""
    stopped: bool
    """Whether it was stopped before every row was done."""

    @property
    def rows(self) -> int:
        return sum(replica.rows for replica in self.replicas)

    @property
    def prompt_tokens(self) -> int:
        return sum(replica.prompt_tokens for replica in self.replicas)

    @property
    def output_tokens(self) -> int:
        return sum(replica.output_tokens for replica in self.replicas)

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens only."""
        return self.output_tokens / self.elapsed_s

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens."""
        return (self.prompt_tokens + self.output_tokens) / self.elapsed_s

    @property
    def generations(self) -> dict[int, Generation]:
        """Of all replicas, by position; empty unless they are kept."""
        return {position: generation for replica in self.replicas for position, generation in replica.generations.items()}


def run_trial(
    plan: ReplicaPlan,
    model: Model,
    kind: str,
    requests: Sequence[Request],
    *,
    timeout_s: float,
    stop_after_s: float | None = None,
    keep: bool = False,
    on_progress: Callable[[TrialProgress], bool | None] | None = None,
) -> TrialResult:
    """Start replicas, run one round, end them; see Replicas. The timeout is for all of it."""
    until = time.monotonic() + timeout_s
    with Replicas(plan, model, kind, timeout_s=timeout_s) as replicas:
        left_s = max(0.0, until - time.monotonic())
        return replicas.run(requests, timeout_s=left_s, stop_after_s=stop_after_s, keep=keep, on_progress=on_progress)


class Replicas:
    """Replica processes for several rounds. They end with `close`, and with this process, however it ends."""

    def __init__(self, plan: ReplicaPlan, model: Model, kind: str, *, timeout_s: float) -> None:
        """Starts them and waits until all are ready. Raises EngineStartError with the cause, after which nothing runs."""
        self._folder = Path(tempfile.mkdtemp(prefix="tokenmill-trial-"))
        self._members: list[_Member] = []
        self._infos: dict[str, EngineInfo] = {}
        self._start_s: dict[str, float] = {}
        self._keep_logs = False
        try:
            self._start(plan, model, kind, until=time.monotonic() + timeout_s)
        except EngineError as error:
            raise EngineStartError(str(error)) from None
        except BaseException:
            self.close()
            raise

    @property
    def infos(self) -> dict[str, EngineInfo]:
        """What each engine says of itself, by the replica's name."""
        return {member.name: self._infos[member.name] for member in self._members}

    @property
    def start_seconds(self) -> dict[str, float]:
        """From each process's start until its engine was ready."""
        return {member.name: self._start_s[member.name] for member in self._members}

    def run(
        self,
        requests: Sequence[Request],
        *,
        timeout_s: float,
        stop_after_s: float | None = None,
        keep: bool = False,
        on_progress: Callable[[TrialProgress], bool | None] | None = None,
        on_finished: Callable[[list[Generation]], None] | None = None,
    ) -> TrialResult:
        """One round: every request once, replica n of m taking requests n, n + m, ... in their order, all queued at once.

        `stop_after_s` ends it early, and so does an `on_progress` that answers False; it is asked about once a second.
        `keep` brings the generations with the result; `on_finished` brings them as they come. Raises EngineDead where a replica
        dies or is not done in time, EngineError where an engine refuses a row; after either nothing runs any more.
        """
        until = time.monotonic() + timeout_s
        try:
            order = {
                "stop_after_s": stop_after_s,
                "keep": keep,
                "tick_s": _TICK_S if on_progress is not None else None,
                "stream": on_finished is not None,
            }
            for index, member in enumerate(self._members):
                member.send({**order, "requests": [_packed(request) for request in requests[index :: len(self._members)]]})
            for _ in self._hear(self._members, until, "loaded"):
                pass
            for member in self._members:  # the barrier: all have their rows, none has begun
                member.send({"go": True})
            return self._watch(until, on_progress, on_finished)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process and whatever it started. Logs stay where one failed, since its error names them."""
        for member in self._members:
            member.let_go()
        deadline = time.monotonic() + _CLOSE_GRACE_S
        for member in self._members:
            member.end(deadline)
        if not self._keep_logs:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, plan: ReplicaPlan, model: Model, kind: str, until: float) -> None:
        """As many at once as start soonest so."""
        at_once = engines_at_once(kind, plan.replicas)
        base = {} if plan.bare else ENVIRONMENT
        for first in range(0, plan.replicas, at_once):
            for index in range(first, min(first + at_once, plan.replicas)):
                self._members.append(
                    _Member(name=f"replica-{index}", folder=self._folder, environment={**base, **plan.environment_of(index)})
                )
                self._members[-1].send({"model": asdict(model), "kind": kind, "options": plan.options})
            for member, said in self._hear(self._members[first:], until, "ready"):
                self._infos[member.name] = EngineInfo(**said["ready"])
                self._start_s[member.name] = time.monotonic() - member.began

    def _watch(
        self,
        until: float,
        on_progress: Callable[[TrialProgress], bool | None] | None,
        on_finished: Callable[[list[Generation]], None] | None,
    ) -> TrialResult:
        began_at, stopping = time.monotonic(), False
        ticks: dict[str, dict[str, Any]] = {}
        done: dict[str, dict[str, Any]] = {}
        for member, said in self._hear(self._members, until, "done"):
            if "finished" in said and on_finished is not None:
                on_finished([_unpacked(item) for item in said["finished"]])
                continue
            if "done" in said:
                done[member.name] = said["done"]
            ticks[member.name] = said.get("tick") or said["done"]
            if on_progress is None or stopping:
                continue
            sums = {key: sum(tick[key] for tick in ticks.values()) for key in ("rows", "output_tokens", "prompt_tokens")}
            if on_progress(TrialProgress(**sums, seconds=time.monotonic() - began_at)) is False:
                stopping = True
                for other in self._members:
                    if other.name not in done:
                        other.send({"stop": True})
        return TrialResult(
            replicas=tuple(self._result(member.name, done[member.name]) for member in self._members),
            elapsed_s=max(said["ended"] for said in done.values()) - min(said["began"] for said in done.values()),
            stopped=any(said["stopped"] for said in done.values()),
        )

    def _result(self, name: str, said: dict[str, Any]) -> ReplicaResult:
        return ReplicaResult(
            name=name,
            engine=self._infos[name],
            start_s=self._start_s[name],
            seconds=said["ended"] - said["began"],
            rows=said["rows"],
            prompt_tokens=said["prompt_tokens"],
            output_tokens=said["output_tokens"],
            generations={item[0]: _unpacked(item) for item in said["kept"]},
        )

    def _hear(self, members: Sequence[_Member], until: float, last: str) -> Iterator[tuple[_Member, dict[str, Any]]]:
        """Messages of these replicas as they come, until each has said the last one."""
        waiting = {member.connection: member for member in members}
        while waiting:
            heard = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not heard:
                silent = ", ".join(member.name for member in waiting.values())
                self._fail(next(iter(waiting.values())), f"{silent}: not {last} within the time limit")
            for connection in heard:
                assert isinstance(connection, Connection)
                member = waiting[connection]
                try:
                    said: dict[str, Any] = json.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    self._fail(member, f"{member.name}: {member.how_it_ended()}")
                if "failed" in said:
                    self._keep_logs = True
                    self.close()
                    raise EngineError(f"{member.name}: {start_failure(said['failed'], member.log_lines())} (log: {member.log_path})")
                if last in said:
                    del waiting[connection]
                yield member, said

    def _fail(self, member: _Member, what: str) -> Any:
        """Ends everything."""
        self._keep_logs = True
        self.close()
        tail = "\n".join(member.log_lines()[-_LOG_LINES:])
        raise EngineDead(f"{what}; the end of its log ({member.log_path}):\n{tail}")


class _Member:
    """One replica's process and the way to it."""

    def __init__(self, *, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self.connection, theirs = Pipe()
        self.began = time.monotonic()
        with self.log_path.open("ab") as log, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.trial_worker", str(theirs.fileno())],
                stdin=subprocess.PIPE,  # its end tells the process that this one is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C reaches this process only
            )

    def send(self, message: dict[str, Any]) -> None:
        """To a process that is gone, nothing: its end is heard where answers are."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(json.dumps(message).encode())

    def how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"its process ended with {exit_words(self._process.wait(_CLOSE_GRACE_S))}"
        return "its process does not answer any more"

    def log_lines(self) -> list[str]:
        with contextlib.suppress(OSError):
            return self.log_path.read_text(errors="replace").splitlines()
        return []

    def let_go(self) -> None:
        """The process takes the end of its standard input as its own."""
        self.connection.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def end(self, deadline: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _packed(request: Request) -> list[Any]:
    sampling = request.sampling.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return [request.position, request.token_ids, sampling, request.seed]


def _unpacked(item: list[Any]) -> Generation:
    position, choices = item
    made = (GeneratedChoice(token_ids=ids, finish_reason=reason, text=text) for ids, reason, text in choices)
    return Generation(position=position, choices=tuple(made))
