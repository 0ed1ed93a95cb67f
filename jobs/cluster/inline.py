"""A cluster of one replica inside the calling process, for tests, notebooks and memory://."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from pipeline.model import Model
from pipeline.replica import Replica
from schemas.errors import EngineEvicted
from schemas.unit import WorkUnit

_MAX_UNITS = 16
_NAME = "inline-0"


class InlineCluster:
    """Runs units in threads here. The engine's environment is the caller's."""

    dashboard = None

    def __init__(self, *, model: Model, kind: str, options: dict[str, Any]) -> None:
        began = time.monotonic()
        self._replica = Replica(name=_NAME, model=model, kind=kind, options=options, spawned_at=began)
        self._start_s = time.monotonic() - began
        self._pool = ThreadPoolExecutor(_MAX_UNITS, thread_name_prefix="unit")

    def replicas(self) -> list[ReplicaState]:
        dead = self._replica.engine.dead
        if dead is not None and not isinstance(dead, EngineEvicted):
            raise dead
        engine = self._replica.engine
        counters = asdict(engine.counters())
        return [ReplicaState(name=_NAME, window_rows=engine.window_rows, ledger=engine.reading(), engine=asdict(engine.info), **counters)]

    @property
    def num_replicas(self) -> int:
        return 1

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        del attempt, on
        future = self._pool.submit(self._replica.run, out_uri, fingerprint, unit.to_dict())

        def report(finished: Future[dict[str, Any]]) -> None:
            done(finished.exception() or finished.result())

        future.add_done_callback(report)

    def notes(self) -> list[str]:
        return []

    def start_seconds(self) -> dict[str, float]:
        return {_NAME: self._start_s}

    def loading_seconds(self) -> dict[str, float]:
        return {}

    def evict(self) -> None:
        self._replica.engine.evict()

    def close(self, *, at_once: bool = False) -> None:
        self._pool.shutdown(wait=not at_once, cancel_futures=True)
        self._replica.close()
