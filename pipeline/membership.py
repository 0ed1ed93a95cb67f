"""A replica's place in a Dask cluster: joins the scheduler, joins the next one when that is lost, leaves when it is asked to.

Dask's own worker ends when its scheduler does, and would take the engine with it. Here the engine stays, and a new worker is
made around it. Knows nothing of engines but the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Any

import dask
from distributed import Worker
from distributed.comm import connect
from distributed.comm import get_address_host
from distributed.utils import get_ip

from pipeline import rendezvous
from pipeline import tls
from pipeline.replica import Replica
from pipeline.worker import DASK_CONFIG
from pipeline.worker import METRICS_KEY
from pipeline.worker import WAITING
from pipeline.worker import WorkerConfig
from schemas.address import check_address
from schemas.errors import JobError
from schemas.errors import root_cause

_REACH_S = 5.0
"""For a scheduler to answer before its address is looked up again; Dask's own worker would try the same one for ever."""
_JOIN_S = 20.0
"""For the rest, once it answers."""
_MAX_WAIT_S = 10.0
HAND_BACK_S = 18.0
"""For units to save their finished rows and to report, out of the 25 s that a supervisor waits after SIGTERM."""
_REPORT_S = 3.0


async def serve(config: WorkerConfig, replica: Replica, registration: dict[str, Any], say: Callable[[str], None]) -> None:
    """Until SIGTERM, whatever becomes of schedulers. What happens is told to `say`, in a few words."""
    leaving = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.set)
    failures = 0
    with dask.config.set(DASK_CONFIG):
        while not leaving.is_set():
            worker = await _unless(leaving, _join(config, replica, registration, say))
            if worker is None:
                failures += 1
                await _unless(leaving, asyncio.sleep(min(_MAX_WAIT_S, 0.25 * 2**failures)))
                continue
            failures = 0
            say(f"joined {worker.scheduler.address}")
            await _unless(leaving, worker.finished())
            if leaving.is_set():
                await _hand_back(worker, replica)
                return
            say(f"lost {worker.scheduler.address}; units in flight go on, and commit unless another replica was quicker")
    await asyncio.to_thread(replica.evict, HAND_BACK_S)


async def _unless(leaving: asyncio.Event, work: Any) -> Any:
    """What the work returns, or None where it was given up because it is time to leave."""
    asked, task = asyncio.create_task(leaving.wait()), asyncio.ensure_future(work)
    await asyncio.wait([asked, task], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if task.done():
        return task.result()
    task.cancel()
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await task
    return None


class _Worker(Worker):  # type: ignore[misc]
    """Closes without waiting for its tasks: units in flight finish and commit, while the next scheduler is looked for."""

    async def close(self, *args: Any, **kwargs: Any) -> Any:
        return await super().close(*args, **{**kwargs, "executor_wait": False})


async def _join(config: WorkerConfig, replica: Replica, registration: dict[str, Any], say: Callable[[str], None]) -> Worker | None:
    try:
        address, security = await asyncio.to_thread(_find, config), tls.security(config.keys)
        (await connect(address, timeout=_REACH_S, **security.get_connection_args("worker"))).abort()
        worker = _Worker(
            address,
            name=config.name,
            nthreads=config.num_threads,
            memory_limit=0,
            security=security,
            host=get_ip(get_address_host(address)),  # on all interfaces, by default
            dashboard=False,
            dashboard_address="127.0.0.1:0",
            death_timeout=_JOIN_S,
            metrics={METRICS_KEY: lambda _: replica.status()},
            startup_information={METRICS_KEY: lambda _: registration},
            local_directory=str(config.scratch_path),
        )
        worker.replica = replica
        await worker
    except (OSError, RuntimeError, JobError) as error:  # Dask wraps what went wrong
        why = root_cause(error)
        if "name taken" in why:
            why = f"it knows a {config.name} already: this one, not yet given up, or another node of the same name, which needs --name"
        say(f"{WAITING} a scheduler: {why}")
        return None
    return worker


def _find(config: WorkerConfig) -> str:
    """The scheduler's address. Raises OSError where nobody knows it yet, or JobError where it is not to be trusted."""
    if config.rendezvous is None:
        return config.scheduler
    entry = rendezvous.look_up(config.rendezvous)
    if entry is None:
        raise FileNotFoundError(f"none has published itself in {config.rendezvous}")
    try:
        check_address(entry.address, config.keys, config.insecure)
    except ValueError as error:
        raise JobError(f"number {entry.number} in {config.rendezvous}: {error}") from None
    return entry.address


def own_host(config: WorkerConfig) -> str:
    """This machine's address, as the rest of the cluster reaches it: that from which the scheduler is reached, where there is one yet."""
    try:
        return str(get_ip(get_address_host(_find(config))))
    except (OSError, JobError):  # it says so when it joins
        return str(get_ip())


async def _hand_back(worker: Worker, replica: Replica) -> None:
    """Take no further unit, let those in flight save what is finished and report, and leave the scheduler."""
    retire = worker.scheduler.retire_workers(workers=[worker.address], close_workers=False, remove=False)
    retiring = asyncio.ensure_future(retire)
    await asyncio.to_thread(replica.evict, HAND_BACK_S)
    deadline = asyncio.get_running_loop().time() + _REPORT_S
    while worker.state.executing_count and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    retiring.cancel()
    with contextlib.suppress(Exception, asyncio.CancelledError):  # the units are saved, whatever Dask says
        await retiring
    with contextlib.suppress(Exception):
        await asyncio.wait_for(worker.close(nanny=False), _REPORT_S)
