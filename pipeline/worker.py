"""`tokenmill worker`: the process that owns one engine replica and runs a Dask worker inside. The only module with Dask.

It registers with the scheduler only when its engine is ready, says in a status file how it fares, ignores Ctrl-C
(its driver decides), and ends when whoever holds its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import EngineDead
from schemas.errors import TokenmillError

EXIT_START_FAILED = 78
"""sysexits' EX_CONFIG: starting it again would not help."""
EXIT_ENGINE_DEAD = 70
_METRICS_KEY = "tokenmill"
_WATCH_S = 0.2
_DYING_S = 30.0

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
    "distributed.scheduler.allowed-failures": 5,  # workers that a task may lose before that counts as an attempt of its unit
    "distributed.scheduler.worker-saturation": 1.0,  # nothing waits on a worker that another could do now
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.comm.timeouts.connect": "60s",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """What a worker process is told; read from a JSON file."""

    scheduler: str
    name: str
    model: dict[str, Any]
    kind: str
    options: dict[str, Any]
    num_threads: int
    """Units in flight at most."""
    status_path: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> WorkerConfig:
        return cls(**json.loads(path.read_text()))


def run_unit_task(out_uri: str, fingerprint: str, unit: dict[str, Any]) -> dict[str, Any]:
    """The Dask task: one unit on this worker's replica."""
    from distributed import get_worker

    replica = get_worker().replica
    if replica.engine.dead is not None:
        time.sleep(_DYING_S)  # the process ends under this task, which then runs elsewhere without having cost an attempt
    result: dict[str, Any] = replica.run(out_uri, fingerprint, unit)
    return result


def replica_metrics(worker_info: dict[str, Any]) -> dict[str, Any]:
    """The replica's last counters, out of what the scheduler knows of a worker; empty before its first heartbeat."""
    metrics: dict[str, Any] = worker_info.get("metrics", {}).get(_METRICS_KEY) or {}
    return metrics


def main(config_path: str) -> int:
    """Run until the scheduler lets go or standard input closes. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    config = WorkerConfig.load(Path(config_path))
    started = time.monotonic()
    _say(config, state="starting")
    from pipeline.model import Model
    from pipeline.replica import Replica

    try:
        replica = Replica(name=config.name, model=Model(**config.model), kind=config.kind, options=config.options)
    except Exception as error:  # the process's outermost: whatever it was, the driver must hear of it
        traceback.print_exc()
        message = str(error) if isinstance(error, TokenmillError) else f"{type(error).__name__}: {error}"
        _say(config, state="failed", message=message)
        return EXIT_START_FAILED
    threading.Thread(target=_end_with_engine, args=(replica,), name="engine-watch", daemon=True).start()
    info = asdict(replica.engine.info)
    _say(config, state="ready", start_s=round(time.monotonic() - started, 1), engine=info)
    try:
        asyncio.run(_serve(config, replica))
    finally:
        replica.close()
    return 0


async def _serve(config: WorkerConfig, replica: Any) -> None:
    import dask
    from distributed import Worker

    with dask.config.set(DASK_CONFIG):
        worker = Worker(
            config.scheduler,
            name=config.name,
            nthreads=config.num_threads,
            memory_limit=0,
            metrics={_METRICS_KEY: lambda _: replica.status()},
            dashboard=False,
            local_directory=str(Path(config.status_path).with_suffix(".scratch")),
        )
        worker.replica = replica
        await worker
        with contextlib.suppress(asyncio.CancelledError):
            await worker.finished()


def _say(config: WorkerConfig, **values: Any) -> None:
    path = Path(config.status_path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), **values}))
    temporary.replace(path)


def _end_with_parent() -> None:
    """Standard input is a pipe that the parent holds and never writes to: its end is the parent's end, however it came."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    if os.getpgrp() == os.getpid():  # engine cores in processes of their own would go on holding the GPU
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _end_with_engine(replica: Any) -> None:
    """A worker without its engine would fail every unit it is given: leave, and let the supervisor start a new one."""
    while replica.engine.dead is None:
        time.sleep(_WATCH_S)
    dead: EngineDead = replica.engine.dead
    print(f"worker {replica.name}: {dead}", file=sys.stderr, flush=True)
    time.sleep(1)  # units in flight report first
    os._exit(EXIT_ENGINE_DEAD)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
