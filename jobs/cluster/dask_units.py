"""Units over a Dask client, the same for every cluster whose replicas are Dask workers. Knows neither who started them nor why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import uuid
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import dask
from distributed import Client
from distributed import Future
from distributed.client import AllExit
from distributed.scheduler import KilledWorker
from distributed.utils import silence_logging_cmgr

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.scheduler import hush_lost_connections
from pipeline.worker import DASK_CONFIG
from pipeline.worker import registration
from pipeline.worker import replica_metrics
from pipeline.worker import run_unit_task
from schemas.errors import ReplicaLost
from schemas.ledger import Reading
from schemas.unit import WorkUnit

_COUNTERS = frozenset(field.name for field in fields(ReplicaState)) - {"name", "ledger", "engine"}
_FETCH_S = 20.0
"""For a result of under a KiB to come from its replica. All results of a process come through one thread of Dask's."""


def quiet_client() -> contextlib.ExitStack:
    """Dask's settings for a process that is a cluster's client, until they are closed.

    Without Dask's log: it has a traceback of every lost connection, and what that means, clusters say in notes.
    """
    settings = contextlib.ExitStack()
    settings.enter_context(dask.config.set(DASK_CONFIG))
    settings.enter_context(silence_logging_cmgr(logging.CRITICAL))
    hush_lost_connections()
    return settings


def addresses_of(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Where each worker is, by its name."""
    return {str(info["name"]): address for address, info in workers.items()}


def replica_states(workers: Mapping[str, Mapping[str, Any]]) -> list[ReplicaState]:
    """Those ready, by name, out of what a scheduler knows of its workers."""
    states = []
    for info in workers.values():
        metrics = replica_metrics(info)
        counters = {key: value for key, value in metrics.items() if key in _COUNTERS}
        if counters:
            ledger = Reading(**metrics["ledger"]) if "ledger" in metrics else None
            engine = (registration(info) or {}).get("engine_info", {})
            states.append(ReplicaState(name=str(info["name"]), ledger=ledger, engine=engine, **counters))
    return sorted(states, key=lambda state: state.name)


class DaskUnits:
    """Units in flight over one client. Each is answered once, also where the client goes away under it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        client.loop.asyncio_loop.set_exception_handler(_quiet)
        self._flying: dict[str, tuple[int, Callable[[Result], None]]] = {}
        self._allowed: dict[str, str] = {}
        self._bound: dict[str, tuple[frozenset[str], Future]] = {}
        self._lock = threading.Lock()
        self._lost: str | None = None

    def has(self, index: int) -> bool:
        """Whether a unit is in flight from here."""
        with self._lock:
            return any(flying == index for flying, _ in self._flying.values())

    def allow(self, replicas: Mapping[str, str]) -> None:
        """From now on units go to these replicas alone, addresses by name. Those bound to others that are gone come back as lost.

        Dask would keep a task for ever whose workers are all gone, also one that may run elsewhere: a task that reaches a
        scheduler at a moment without workers waits for the very address that it was meant for, whoever joins later.
        """
        self._allowed = dict(replicas)
        present = frozenset(replicas.values())
        with self._lock:
            stuck = {key: future for key, (addresses, future) in self._bound.items() if not addresses & present}
        for key, future in stuck.items():
            self._answer(key, ReplicaLost("every replica that might have run the unit went away"))
            with contextlib.suppress(Exception):  # of a client that is closed
                future.cancel()

    @property
    def num_flying(self) -> int:
        return len(self._flying)

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        """See jobs.cluster.cluster."""
        # A key that a scheduler saw before, with another run of the unit, would give that run's result, or confuse it.
        key = f"unit-{fingerprint[:8]}-{unit.index:08d}-a{attempt}-{uuid.uuid4().hex[:12]}"
        with self._lock:
            lost = self._lost
            if lost is None:
                self._flying[key] = (unit.index, done)
        if lost is not None:
            done(ReplicaLost(lost))
            return
        # Dask knows no preference among a few, so it is one of them or all.
        bound = frozenset([self._allowed[on]] if on in self._allowed else self._allowed.values())
        if not bound:
            self._answer(key, ReplicaLost("no replica is there that may run the unit"))
            return
        where: dict[str, Any] = {"workers": sorted(bound), "allow_other_workers": False}
        try:
            future = self._client.submit(run_unit_task, out_uri, fingerprint, unit.to_dict(), key=key, retries=0, pure=False, **where)
        except Exception as error:  # a client that closes at this moment says so in many ways
            self._answer(key, ReplicaLost(f"the unit could not be sent: {type(error).__name__}: {error}"))
            return
        with self._lock:
            if key in self._flying:
                self._bound[key] = (bound, future)
        future.add_done_callback(self._report)

    def lose_all(self, reason: str) -> None:
        """The client is of no use any more: answer for it."""
        with self._lock:
            self._lost = reason
            keys = list(self._flying)
        for key in keys:
            self._answer(key, ReplicaLost(reason))

    def _report(self, future: Future) -> None:
        result = _result(future)
        with contextlib.suppress(Exception):  # of a client that is closed
            future.release()
        self._answer(future.key, result)

    def _answer(self, key: str, result: Result) -> None:
        with self._lock:
            _, done = self._flying.pop(key, (None, None))
            self._bound.pop(key, None)
        if done is not None:
            done(result)


def _quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Say nothing of the tasks that Dask leaves behind where a fetch ran out of time and its key was forgotten: they end in AllExit."""
    if not isinstance(context.get("exception"), AllExit):
        loop.default_exception_handler(context)


def _result(future: Future) -> Result:
    """What the unit's task returned or raised; that a replica or the way to it went away is said in our own terms."""
    if future.status == "error":
        error = future.exception(timeout=_FETCH_S)
        if isinstance(error, KilledWorker):
            return ReplicaLost(f"replica {error.last_worker.name} went away")
        return error if isinstance(error, BaseException) else ReplicaLost(f"the scheduler says {error!r}")
    if future.status != "finished":
        return ReplicaLost("the scheduler went away, or forgot the unit")
    try:
        result: Result = json.loads(future.result(timeout=_FETCH_S))
    except Exception as error:  # the task went well, so it is the way here
        return ReplicaLost(f"the unit's result did not arrive: {type(error).__name__}: {error}")
    return result
