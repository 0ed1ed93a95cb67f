"""A cluster on this machine: a Dask scheduler in this process, replica processes beside it, and a supervisor over them."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from pipeline import rendezvous
from pipeline.model import Model
from pipeline.profile import ReplicaPlan
from pipeline.segments import record_death
from pipeline.supervisor import ReplicaSpec
from pipeline.supervisor import Supervisor
from pipeline.supervisor import engines_at_once
from pipeline.worker import WorkerConfig
from schemas.job import ClusterSpec
from schemas.unit import WorkUnit

if TYPE_CHECKING:
    from distributed import Client


class LocalCluster:
    """Replicas as child processes. They end with this process, however it ends."""

    def __init__(
        self, *, plan: ReplicaPlan, model: Model, kind: str, units_at_once: int, silence_s: float, spec: ClusterSpec | None = None
    ) -> None:
        """With `spec`, metrics are served as it says."""
        spec = spec or ClusterSpec()
        folder = tempfile.mkdtemp(prefix="tokenmill-")
        specs = [
            ReplicaSpec(
                config=WorkerConfig(
                    rendezvous=folder,
                    insecure=True,  # loopback
                    name=f"local-{index}",
                    model=asdict(model),
                    kind=kind,
                    options=plan.options,
                    num_threads=units_at_once,
                    folder=folder,
                    metrics_port=spec.metrics_port_of(index),
                    metrics_host=spec.metrics_host,
                ),
                environment=plan.environment_of(index),
            )
            for index in range(plan.replicas)
        ]
        at_once = engines_at_once(kind, plan.replicas)
        self._supervisor = Supervisor(specs, max_loading=at_once, silence_s=silence_s, on_death=record_death)
        try:
            self._start_scheduler(folder)
        except BaseException:
            self._supervisor.close(at_once=True)
            raise

    def _start_scheduler(self, folder: str) -> None:
        """While the engines load: they look for its address in the folder when they are ready."""
        import dask  # a second
        from distributed import Client
        from distributed import LocalCluster as DaskCluster

        from jobs.cluster.dask_units import DaskUnits
        from jobs.scheduler import SCHEDULER_CONFIG
        from jobs.scheduler import hush_lost_connections

        self._config = dask.config.set(SCHEDULER_CONFIG)
        self._config.__enter__()
        hush_lost_connections()
        self._dask = DaskCluster(
            n_workers=0, processes=True, host="127.0.0.1", protocol="tcp://", dashboard_address="127.0.0.1:0", silence_logs=50
        )
        self._client = Client(self._dask, set_as_default=False)
        self._units = DaskUnits(self._client)
        rendezvous.publish(folder, self._dask.scheduler_address, now=time.time())

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
        from jobs.cluster.dask_units import addresses_of
        from jobs.cluster.dask_units import replica_states

        workers = self._client.sync(self._client.scheduler.identity, n_workers=-1)["workers"]
        self._units.allow(addresses_of(workers))
        states = replica_states(workers)
        if not states:
            self._supervisor.raise_if_hopeless()
            if self._supervisor.ended:
                self._units.lose_all("every replica has left")  # the scheduler would wait for another one for ever
        return states

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        self._units.submit(out_uri, fingerprint, unit, attempt, done, on)

    def notes(self) -> list[str]:
        return self._supervisor.notes()

    def start_seconds(self) -> dict[str, float]:
        return self._supervisor.start_seconds()

    def loading_seconds(self) -> dict[str, float]:
        return self._supervisor.loading_seconds()

    def given_up(self) -> dict[str, str]:
        """Why, by the names of replicas that will not come up, or not again."""
        return self._supervisor.given_up()

    def evict(self) -> None:
        self._supervisor.evict()

    def close(self, *, at_once: bool = False) -> None:
        self._supervisor.close(at_once=at_once)
        with contextlib.suppress(Exception):  # whatever Dask says at its end, the units are committed or not
            self._client.close(timeout=2)
            self._dask.close(timeout=5)
        self._config.__exit__(None, None, None)
