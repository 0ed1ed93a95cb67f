"""A cluster on this machine: a Dask scheduler in this process, replica processes beside it, and a supervisor over them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import fields
from typing import Any

import dask
from distributed import Client
from distributed import Future
from distributed import LocalCluster as DaskCluster
from distributed.scheduler import KilledWorker

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from pipeline.model import Model
from pipeline.profile import ReplicaPlan
from pipeline.segments import record_death
from pipeline.supervisor import ReplicaSpec
from pipeline.supervisor import Supervisor
from pipeline.worker import DASK_CONFIG
from pipeline.worker import WorkerConfig
from pipeline.worker import replica_metrics
from pipeline.worker import run_unit_task
from schemas.errors import ReplicaLost
from schemas.unit import WorkUnit


class LocalCluster:
    """Replicas as child processes. They end with this process, however it ends."""

    def __init__(self, *, plan: ReplicaPlan, model: Model, kind: str, units_at_once: int, silence_s: float) -> None:
        self._config = dask.config.set(DASK_CONFIG)
        self._config.__enter__()
        self._dask = DaskCluster(
            n_workers=0, processes=True, host="127.0.0.1", protocol="tcp://", dashboard_address="127.0.0.1:0", silence_logs=50
        )
        self._client = Client(self._dask, set_as_default=False)
        self._nonce = uuid.uuid4().hex[:6]
        folder = tempfile.mkdtemp(prefix="tokenmill-")
        specs = [
            ReplicaSpec(
                config=WorkerConfig(
                    scheduler=self._dask.scheduler_address,
                    name=f"local-{index}",
                    model=asdict(model),
                    kind=kind,
                    options=plan.options,
                    num_threads=units_at_once,
                    folder=folder,
                ),
                environment=plan.environment_of(index),
            )
            for index in range(plan.replicas)
        ]
        # Two engines that load at the same time on two cores are both late; one at a time starts work sooner.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        max_loading = max(1, cores // 2) if kind == "vllm" else plan.replicas
        self._supervisor = Supervisor(specs, max_loading=max_loading, silence_s=silence_s, on_death=record_death)

    @property
    def dashboard(self) -> str | None:
        return str(self._dask.dashboard_link) if importlib.util.find_spec("bokeh") else None

    @property
    def num_replicas(self) -> int:
        """Ready or not."""
        return self._supervisor.num_replicas

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
            self._supervisor.raise_if_hopeless()
        return sorted(states, key=lambda state: state.name)

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        key = f"unit-{fingerprint[:8]}-{unit.index:08d}-{self._nonce}a{attempt}-{uuid.uuid4().hex[:6]}"
        where: dict[str, Any] = {"workers": [on], "allow_other_workers": True} if on else {}
        future = self._client.submit(run_unit_task, out_uri, fingerprint, unit.to_dict(), key=key, retries=0, pure=False, **where)

        def report(finished: Future) -> None:
            done(_result(finished))

        future.add_done_callback(report)

    def notes(self) -> list[str]:
        return self._supervisor.notes()

    def start_seconds(self) -> dict[str, float]:
        return self._supervisor.start_seconds()

    def evict(self) -> None:
        self._supervisor.evict()

    def close(self, *, at_once: bool = False) -> None:
        self._supervisor.close(at_once=at_once)
        with contextlib.suppress(Exception):  # whatever Dask says at its end, the units are committed or not
            self._client.close(timeout=2)
            self._dask.close(timeout=5)
        self._config.__exit__(None, None, None)


def _result(finished: Future) -> Result:
    """What a unit's task returned or raised; that its worker, or the scheduler, went away is said in our own terms."""
    try:
        result: Result = finished.result()
    except KilledWorker as error:
        return ReplicaLost(f"replica {error.last_worker.name} went away")
    except BaseException as error:  # carried to the driver, which decides
        if type(error).__name__ in ("CancelledError", "FutureCancelledError"):
            return ReplicaLost("the scheduler went away or forgot it")
        return error
    finally:
        finished.release()
    return result
