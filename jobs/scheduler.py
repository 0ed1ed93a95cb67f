"""`tokenmill scheduler`: a Dask scheduler in a process of its own, for nodes that join and drivers that come and go.

It keeps nothing: when it dies, workers and drivers look for the next one, and what was in flight is run again. So it belongs
on a machine that stays, not on a spot node. Hears of units only as opaque tasks.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
from distributed import Scheduler

from pipeline import rendezvous
from pipeline import tls
from pipeline.rendezvous import Rendezvous
from pipeline.worker import DASK_CONFIG
from schemas.address import check_address
from schemas.address import split_address
from schemas.errors import EXIT_COMPLETE
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.errors import root_cause

SCHEDULER_CONFIG: dict[str, Any] = {
    **DASK_CONFIG,
    # Scheduler and workers balance by how long tasks take: half a second, Dask's guess, is wrong by three orders.
    "distributed.scheduler.unknown-task-duration": "10m",
    "distributed.scheduler.default-task-durations": {"unit": "10m"},
    # scheduler.idle-timeout stays unset: it ends a scheduler that waits for its next driver, but no node, and nodes are what costs. A
    # driver's own scheduler ends with the driver; cluster.max_hours ends Batch's nodes.
    # The pages have no password. Left out are those that show call stacks and logs, reach through to workers, or take orders.
    "distributed.scheduler.http.routes": ["distributed.http.health", "distributed.http.scheduler.prometheus", "distributed.http.statics"],
    "distributed.dashboard.link": "http://127.0.0.1:{port}/status",  # Dask would name the address of the scheduler itself
    "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin": ["localhost", "127.0.0.1"],
}
"""Read by a scheduler when it is made, in its own process."""
_WATCH_S = 5.0
_CLOSE_S = 10.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_EVERYWHERE = ("0.0.0.0", "[::]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """What to serve, and where. Raises JobError for what is not safe."""

    listen: str = "tls://0.0.0.0:8786"
    keys: str | None = None
    insecure: bool = False
    rendezvous: str | None = None
    dashboard: str | None = "127.0.0.1:8787"
    """HOST:PORT on the loopback interface, or None."""

    def __post_init__(self) -> None:
        try:
            check_address(self.listen, self.keys, self.insecure, any_port=True)
        except ValueError as error:
            raise JobError(f"--listen: {error}") from None
        if self.dashboard is not None and self.dashboard.rpartition(":")[0] not in _LOOPBACK:
            raise JobError(
                f"--dashboard: found {self.dashboard!r}, expected 127.0.0.1:PORT or none; it asks for no password and shows what runs. "
                "From elsewhere, reach it through `ssh -L 8787:127.0.0.1:8787 HOST`"
            )
        if self.keys is not None and self.rendezvous is not None:
            tls.check_apart(self.keys, [self.rendezvous])


def serve(spec: SchedulerSpec, say: Callable[[str], None]) -> int:
    """Until SIGTERM or SIGINT, or until a newer scheduler has published itself. Returns the exit code. Raises JobError."""

    async def until_signalled() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        return await _serve(spec, security, say, stop)

    security = tls.security(spec.keys)
    _allow_many_files()
    with dask.config.set(SCHEDULER_CONFIG):
        return asyncio.run(until_signalled())


class SchedulerThread:
    """A scheduler in a thread of the process that needs it, such as a driver; ends with it at the latest."""

    def __init__(self, spec: SchedulerSpec, say: Callable[[str], None], on_replaced: Callable[[], None]) -> None:
        """Returns once it listens and is published. `on_replaced` is called, from its thread, when a newer one took its place.

        Raises JobError.
        """
        self._spec, self._say, self._on_replaced = spec, say, on_replaced
        self._security = tls.security(spec.keys)
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        _allow_many_files()
        self._config = dask.config.set(SCHEDULER_CONFIG)
        self._config.__enter__()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()
        failure = self._ready.get()
        if failure is not None:
            self.close()
            raise failure

    def close(self) -> None:
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_CLOSE_S)
        self._config.__exit__(None, None, None)

    def _run(self) -> None:
        try:
            code = asyncio.run(self._live())
        except BaseException as error:  # the thread's outermost: whoever waits for it must hear
            self._ready.put(error)
            return
        if code != EXIT_COMPLETE:
            self._on_replaced()

    async def _live(self) -> int:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        return await _serve(self._spec, self._security, self._say, self._stop, lambda: self._ready.put(None))


def hush_lost_connections() -> None:
    """Dask logs a traceback of each at INFO, also after the cluster or client is closed that it belonged to. For the process's rest."""
    logging.getLogger("distributed.batched").setLevel(logging.WARNING)


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard // 2), hard))  # a worker takes several, and 1,024 are soon gone


async def _serve(
    spec: SchedulerSpec, security: Any, say: Callable[[str], None], stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None
) -> int:
    hush_lost_connections()
    scheduler = await _start(spec, security)
    try:
        mine = await asyncio.to_thread(_publish, spec, scheduler.address)
        where = f" with number {mine.number} in {spec.rendezvous}" if mine else ""
        say(f"scheduler at {scheduler.address}{where}")
        if spec.dashboard is not None:
            say(f"dashboard at http://127.0.0.1:{scheduler.http_server.port}/status, on this machine only")
        on_ready()
        waits = [asyncio.create_task(stop.wait()), asyncio.create_task(scheduler.finished())]
        if mine is not None and spec.rendezvous is not None:
            waits.append(asyncio.create_task(_replaced(spec.rendezvous, mine)))
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        newer = [task.result() for task in done if isinstance(task.result(), Rendezvous)]
        if newer:
            say(f"scheduler {newer[0].number} at {newer[0].address} took this one's place: ending")
            return EXIT_UNITS_FAILED
        return EXIT_COMPLETE
    finally:
        await scheduler.close(reason="asked to end")


async def _start(spec: SchedulerSpec, security: Any) -> Any:
    scheme, host, port = split_address(spec.listen)
    scheduler = Scheduler(
        host=f"{scheme}://{host}",
        port=port,
        protocol=scheme,
        security=security,
        dashboard=spec.dashboard is not None,
        dashboard_address=spec.dashboard or "127.0.0.1:0",  # Dask serves its health page in any case
    )
    try:
        await scheduler
    except (OSError, RuntimeError) as error:  # Dask wraps what went wrong
        raise JobError(f"--listen: cannot listen on {spec.listen}: {root_cause(error)}") from None
    own = split_address(scheduler.address)[1]
    if host in _EVERYWHERE and own in _LOOPBACK:
        await scheduler.close(reason="no address")
        raise JobError(f"--listen: {spec.listen} is everywhere, but no address was found that others reach; name this machine's own")
    return scheduler


def _publish(spec: SchedulerSpec, address: str) -> Rendezvous | None:
    if spec.rendezvous is None:
        return None
    try:
        return rendezvous.publish(spec.rendezvous, address, now=time.time())
    except OSError as error:
        raise JobError(f"--rendezvous: cannot publish in {spec.rendezvous}: {error}") from None


async def _replaced(uri: str, mine: Rendezvous) -> Rendezvous:
    """Returns once there is a newer scheduler."""
    while True:
        await asyncio.sleep(_WATCH_S)
        try:
            newer = await asyncio.to_thread(rendezvous.successor, uri, mine)
        except (OSError, JobError) as error:  # of no consequence as long as nobody took over; asked again in a moment
            print(f"the rendezvous {uri} does not answer: {error}", file=sys.stderr, flush=True)
            continue
        if newer is not None:
            return newer
