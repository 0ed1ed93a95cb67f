"""The process that owns one engine replica and is a member of a Dask cluster (see pipeline.membership).

It registers with the scheduler only when its engine is ready, says in files of its folder how it fares, ignores Ctrl-C
(its driver decides), hands its units back and leaves on SIGTERM, and ends when whoever holds its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from pipeline.flight import forget_flight
from schemas.errors import EngineEvicted
from schemas.errors import JobError
from schemas.errors import TokenmillError

if TYPE_CHECKING:
    from pipeline.group import Group
    from pipeline.model import Model
    from pipeline.replica import Replica

EXIT_START_FAILED = 78
"""sysexits' EX_CONFIG: starting it again would not help."""
EXIT_ENGINE_DEAD = 70
EXIT_GROUP_OVER = 69
"""sysexits' EX_UNAVAILABLE: another node of the same replica went away; the others meet again. See pipeline/group.py."""
EXIT_EVICTED = 75
"""sysexits' EX_TEMPFAIL: it was asked to leave, and did."""
METRICS_KEY = "tokenmill"
"""Under it a worker tells its scheduler, once, what it is, and with each heartbeat how it fares."""
WAITING = "waiting for"
"""So begins a replica's word on its membership while it has none: a scheduler, or other nodes of the replica, are missing."""
_WATCH_S = 0.2
_DYING_S = 30.0
_SAVE_S = 18.0
_SURE_S = 5.0
"""For the end of a group to be noticed, where an engine failed of it before."""

ENVIRONMENT = {
    # Must be set before a worker's process starts. Arrow's own pool keeps what it freed, and every thread that runs units
    # has an arena: 385 MB instead of 241 MB for 300,000 rows through the simulated engine.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",  # a profile whose engine runs in this process sets both high, for its speed
    "TOKENIZERS_PARALLELISM": "false",  # the Rust tokenizer's threads would take the engine's cores
}

DASK_CONFIG: dict[str, Any] = {
    # Dask sees only its own process's memory, and the engine's weights would pause or kill the worker for ever.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.daemon": False,  # vLLM on GPUs has children, which daemons may not
    "distributed.worker.profile.enabled": False,  # samples stacks every 10 ms with the GIL held
    # Every wake-up of an event loop takes the GIL, or a core, from an engine in the same process or on the same machine.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.tick.limit": "60s",  # an in-process engine holds the GIL now and then: no reason to log
    "distributed.scheduler.worker-ttl": "30 minutes",  # for the same reason
    # The driver hears of every lost replica and decides; Dask would run a unit with a deadly row on one replica after the other.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-saturation": 1.0,  # nothing waits on a worker that another could do now
    # It moves results between workers. Ours are under a KiB and fetched at once; retire_workers starts one for itself where none runs.
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.comm.timeouts.connect": "60s",  # an in-process engine keeps the thread that listens from its turn, too
    "distributed.worker.http.routes": ["distributed.http.health"],  # nothing there asks for a password
    # comm.retry.count stays at 0. Heartbeats come again by themselves; a result that does not arrive in time is found in storage, and
    # tries at a replica that is gone would only keep its unit from the others. deploy.lost-worker-timeout is for workers that Dask's
    # own clusters start; ours are the supervisor's.
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """What a worker process is told; read from a JSON file."""

    name: str
    model: dict[str, Any]
    kind: str
    options: dict[str, Any]
    num_threads: int
    """Units in flight at most."""
    folder: str
    """On a local disk; its files are named after the replica."""
    scheduler: str = ""
    """Its address, where it is known and stays."""
    rendezvous: str | None = None
    """Where else schedulers publish their address."""
    nodes: int = 1
    """That the replica spans."""
    group: str | None = None
    """The folder in which they meet."""
    keys: str | None = None
    """Folder; without one, connections are plain TCP."""
    insecure: bool = False
    """Whether a published address may be tcp://."""
    spawned_at: float | None = None
    """When its process was started, monotonic seconds (one clock for all processes of a machine)."""

    metrics_port: int | None = None
    """Where to serve Prometheus metrics; None for nowhere."""
    metrics_host: str = "127.0.0.1"

    @property
    def config_path(self) -> Path:
        return Path(self.folder, f"{self.name}.config.json")

    @property
    def status_path(self) -> Path:
        return Path(self.folder, f"{self.name}.status.json")

    @property
    def flight_path(self) -> Path:
        """See pipeline.flight."""
        return Path(self.folder, f"{self.name}.flight")

    @property
    def log_path(self) -> Path:
        return Path(self.folder, f"{self.name}.log")

    @property
    def scratch_path(self) -> Path:
        """For Dask's own files."""
        return Path(self.folder, f"{self.name}.scratch")

    def save(self) -> None:
        self.config_path.write_text(json.dumps(asdict(self)))

    def clear(self) -> None:
        """Forget what an earlier process of this replica left, but for its log."""
        self.status_path.unlink(missing_ok=True)
        forget_flight(self.flight_path)
        shutil.rmtree(self.scratch_path, ignore_errors=True)

    @classmethod
    def load(cls, path: Path) -> WorkerConfig:
        return cls(**json.loads(path.read_text()))


def run_unit_task(out_uri: str, fingerprint: str, unit: dict[str, Any]) -> str:
    """The Dask task: one unit on this worker's replica; what came of it as JSON, as Dask sends nested dicts in many small pieces."""
    from distributed import get_worker

    replica = get_worker().replica
    if replica.engine.dead is not None:
        time.sleep(_DYING_S)  # the process ends under this task; an answer at once would bring the next unit here
    return json.dumps(replica.run(out_uri, fingerprint, unit))


def replica_metrics(worker_info: Mapping[str, Any]) -> dict[str, Any]:
    """The replica's last counters, out of what the scheduler knows of a worker; empty before its first heartbeat."""
    metrics: dict[str, Any] = worker_info.get("metrics", {}).get(METRICS_KEY) or {}
    return metrics


def registration(worker_info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a worker said of itself when it joined, out of what the scheduler knows of it; None of somebody else's worker."""
    said: dict[str, Any] | None = worker_info.get(METRICS_KEY)
    return said


def main(config_path: str) -> int:
    """Run until SIGTERM comes or standard input closes. Returns the exit code of a replica that never came up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_EVICTED))  # while there is nothing to hand back
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    gc.disable()  # an engine's imports make millions of objects that stay: looking through them again and again takes 3 s of CPU
    config = WorkerConfig.load(Path(config_path))
    spawned_at = time.monotonic() if config.spawned_at is None else config.spawned_at
    _say(config, state="starting")
    from pipeline.model import Model
    from pipeline.replica import Replica

    if config.kind == "vllm":
        start_reaper()
    model = Model(**config.model)
    group, watch, options = None, None, config.options
    try:
        if config.nodes > 1:
            group = _meet(config)
            spawned_at, options = time.monotonic(), {**options, **group.engine_options()}
            if not group.seat.leads:
                return _follow(config, model, group, options, spawned_at)
            watch = _GroupWatch(config.name, group)
        replica = Replica(
            name=config.name,
            model=model,
            kind=config.kind,
            options=options,
            flight_path=config.flight_path,
            answers_path=Path(config.folder, "answers.db"),  # one for all replicas of this node
            spawned_at=spawned_at,
        )
    except Exception as error:  # the process's outermost: whatever it was, the driver must hear of it
        traceback.print_exc()
        if group is not None and not isinstance(error, JobError):
            # Whoever fails first need not be who is at fault: each may try again a few times, as after any other death.
            return EXIT_GROUP_OVER if group.is_over(_SURE_S) else EXIT_ENGINE_DEAD
        message = str(error) if isinstance(error, TokenmillError) else f"{type(error).__name__}: {error}"
        _say(config, state="failed", message=message)
        return EXIT_START_FAILED
    gc.freeze()
    gc.enable()
    threading.Thread(target=_end_with_engine, args=(replica, group), name="engine-watch", daemon=True).start()
    if watch is not None:
        watch.look_after(replica)
    if config.metrics_port is not None:
        _serve_metrics(config, replica)
    ready: dict[str, Any] = {"state": "ready", "start_s": round(time.monotonic() - spawned_at, 1), "engine": asdict(replica.engine.info)}
    _say(config, **ready)
    from pipeline.membership import serve  # Dask: a second of imports

    said = introduction(config, model, replica, start_s=ready["start_s"])

    async def live() -> None:
        await serve(config, replica, said, lambda member: _say(config, **ready, member=member))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_EVICTED)  # a thread that still waits for storage would hold the process past its time

    asyncio.run(live())
    return EXIT_EVICTED


def _meet(config: WorkerConfig) -> Group:
    """The nodes with which this one holds the replica."""
    from pipeline.group import gather
    from pipeline.interface import interface_of
    from pipeline.membership import own_host
    from pipeline.tls import security

    assert config.group is not None
    protection = security(config.keys)

    def say(what: str) -> None:
        _say(config, state="gathering", member=f"{WAITING} {what}")

    group = gather(
        config.group,
        config.nodes,
        name=config.name,
        own_host=lambda: own_host(config),
        say=say,
        server_tls=protection.get_listen_args("worker").get("ssl_context"),
        client_tls=protection.get_connection_args("worker").get("ssl_context"),
    )
    place = f"part {group.seat.rank} of {group.seat.size} of a replica, with {', '.join(group.peers.values())}"
    print(f"worker {config.name}: {place}; this host is {group.own}", flush=True)
    os.environ["VLLM_HOST_IP"] = group.own  # before vllm is imported
    if (interface := interface_of(group.own)) is not None:  # else they take what the host's name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    _say(config, state="starting", member=place)
    return group


def _follow(config: WorkerConfig, model: Model, group: Group, options: dict[str, Any], spawned_at: float) -> int:
    """Hold this node's part of the replica, whose leader alone is a member of the cluster, until the group is over."""
    from pipeline.engine.cores import follower

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        group.say_leaving()
        threading.Timer(_DYING_S, os._exit, [EXIT_EVICTED]).start()
        leaving.set()

    leaving = threading.Event()
    signal.signal(signal.SIGTERM, leave)

    def watch() -> None:
        group.wait()
        os._exit(EXIT_EVICTED if leaving.is_set() else EXIT_GROUP_OVER)

    threading.Thread(target=watch, name="group-watch", daemon=True).start()

    def ready(engine: dict[str, Any]) -> None:
        member = f"part {group.seat.rank} of {group.seat.size} of the replica {group.peers[0]}"
        _say(config, state="ready", start_s=round(time.monotonic() - spawned_at, 1), engine=engine, member=member)

    follower(model, config.kind, options)(ready)
    return EXIT_ENGINE_DEAD


class _GroupWatch:
    """A replica without one of its nodes is none: it saves what is finished, and the supervisor looks for another group."""

    def __init__(self, name: str, group: Group) -> None:
        """From before the engine starts, which would wait for a lost node for ever."""
        self._name, self._group = name, group
        self._replica: Replica | None = None
        threading.Thread(target=self._end_with_group, name="group-watch", daemon=True).start()

    def look_after(self, replica: Replica) -> None:
        self._replica = replica

    def _end_with_group(self) -> None:
        self._group.wait()
        print(f"worker {self._name}: another node of group {self._group.seat.group} is gone", file=sys.stderr, flush=True)
        if self._replica is not None:
            self._replica.evict(_SAVE_S)
            time.sleep(1)  # units report
            if isinstance(self._replica.engine.dead, EngineEvicted):
                os._exit(EXIT_EVICTED)  # between two steps, its rows handed back
        os._exit(EXIT_GROUP_OVER)  # it waited for the lost node, and its rows end with it


def introduction(config: WorkerConfig, model: Model, replica: Replica, *, start_s: float) -> dict[str, Any]:
    """What a replica says of itself when it joins; see `registration`."""
    from pipeline.versions import versions

    return {
        "versions": versions(),
        "model": model.path,
        "digests": model.digests,
        "engine": config.kind,
        "engine_info": asdict(replica.engine.info),
        "start_s": start_s,
        "pid": os.getpid(),
    }


def _serve_metrics(config: WorkerConfig, replica: Replica) -> None:
    """They are for people: a port that is taken stops nothing, and is said in the replica's log."""
    from pipeline.metrics import ReplicaMetrics
    from pipeline.metrics import Server

    assert config.metrics_port is not None
    try:
        server = Server([ReplicaMetrics(replica)], host=config.metrics_host, port=config.metrics_port)
    except JobError as error:
        print(f"worker {config.name}: {error}", file=sys.stderr, flush=True)
        return
    print(f"worker {config.name}: metrics at {server.address}", flush=True)


def _say(config: WorkerConfig, **values: Any) -> None:
    path = config.status_path
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), **values}))
    temporary.replace(path)


def end_with_parent() -> None:
    """Standard input is a pipe that the parent holds and never writes to: its end is the parent's end, however it came."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    if os.getpgrp() == os.getpid():  # engine cores in processes of their own would go on holding the GPU
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def start_reaper() -> None:
    """A shell that outlives this process and then ends what else is in its group: vLLM's engine core, holding the GPU's memory.

    A supervisor does the same, but may have been killed together with this process.
    """
    if os.getpgrp() == os.getpid():
        script = f"trap '' TERM; while kill -0 {os.getpid()} 2>/dev/null; do sleep 1; done; kill -s KILL -- -{os.getpid()}"
        subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _end_with_engine(replica: Replica, group: Group | None) -> None:
    """A worker without its engine would fail every unit it is given: leave, and let the supervisor start a new one."""
    while replica.engine.dead is None:
        time.sleep(_WATCH_S)
    dead = replica.engine.dead
    if isinstance(dead, EngineEvicted):
        return  # the process hands its units back and ends by itself
    print(f"worker {replica.name}: {dead}", file=sys.stderr, flush=True)
    replica.wait_idle(_SAVE_S)  # units in flight save what is finished
    time.sleep(1)  # and report
    os._exit(EXIT_GROUP_OVER if group is not None and group.is_over(_SURE_S) else EXIT_ENGINE_DEAD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
