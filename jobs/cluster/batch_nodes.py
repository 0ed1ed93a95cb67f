"""The nodes of Azure Batch as a cluster: a scheduler in this process, a job of `tokenmill worker` tasks, and a watch over both.

Units go the way of jobs.cluster.address. What is known here beyond it is why nodes do not come, and that they must end with
the run: a forgotten ND node costs some 100 $ an hour.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.cluster import azure_batch
from jobs.cluster.address import AddressCluster
from jobs.cluster.azure_batch import Order
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import BatchJobState
from jobs.cluster.batch_advice import PoolState
from jobs.cluster.batch_advice import TaskState
from jobs.cluster.batch_advice import ended_words
from jobs.cluster.batch_advice import resize_problems
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.cluster import num_nodes
from jobs.scheduler import SchedulerSpec
from jobs.scheduler import SchedulerThread
from pipeline import handover
from pipeline.model import Model
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.job import ClusterSpec
from schemas.unit import WorkUnit

_WATCH_S = 15.0
_CLOSE_S = 5.0
_MAX_JOBS = 1000
_LOOK_S = 1.0
_STRAGGLE_S = 600.0
"""A node that comes so much later than the first one is not waited for by a preflight, and gets units unmeasured."""
_SETTLE_S = 20.0
"""A node's replicas do not come up at the same moment, and their starts would disturb what is measured."""
LISTEN = "tls://0.0.0.0:0"
"""Any free port: several drivers may share a node, and the rendezvous says which one it is."""


def create_numbered(account: BatchAccount, job_id: str, create: Callable[[str], bool]) -> tuple[str, bool]:
    """The first of `job_id`, `job_id-2`, ... that could be created, or that is there and not over; and whether it is new.

    Batch keeps the ids of jobs that are over.
    """
    for number in range(1, _MAX_JOBS):
        name = job_id if number == 1 else f"{job_id}-{number}"
        if create(name):
            return name, True
        found = account.job(name)
        if found is not None and found.state not in ("completed", "terminating", "deleting"):
            return name, False
    raise JobError(f"there are {_MAX_JOBS} jobs {job_id}-... in {account.endpoint}; delete old ones (`az batch job delete`)")


def ask_for_nodes(account: BatchAccount, order: Order, job_id: str, *, rendezvous: str, keys: str) -> str:
    """The nodes' job with all its tasks, made now or by an earlier start of this driver. Returns its id. Raises JobError."""
    name, _ = create_numbered(account, job_id, lambda name: account.create_job(azure_batch.nodes_job(order, name)))
    try:
        account.add_tasks(name, azure_batch.node_tasks(order, name, rendezvous=rendezvous, keys=keys))
        account.update_job(name, azure_batch.end_with_tasks())
    except JobError:
        with contextlib.suppress(JobError):
            account.end_job(name)
        raise
    return name


def news(before: Mapping[str, TaskState], after: Sequence[TaskState]) -> list[str]:
    """What became of node tasks since they were last looked at, for people."""
    notes = []
    for task in after:
        old = before.get(task.id)
        if task.state == "completed" and (old is None or old.state != "completed"):
            notes.append(f"{task.id} has ended: {task.failure or f'exit code {task.exit_code}'}")
        elif old is not None and old.state == "running" and task.state == "active":
            notes.append(f"{task.id} lost its node and is back in the queue")
        elif old is not None and task.retries > old.retries:
            notes.append(f"{task.id} ended with exit code {task.exit_code} and was started again ({task.retries} times by now)")
    return notes


def why_they_wait(tasks: Sequence[TaskState], pool: PoolState | None, pool_id: str) -> list[str]:
    """Why node tasks that are in the queue do not run, as far as the pool says."""
    waiting = sum(task.state == "active" for task in tasks)
    problems = [f"pool {pool_id} is gone; deploy infra/ again"] if pool is None else resize_problems(pool)
    return [f"{waiting} node tasks wait: {problem}" for problem in problems] if waiting else []


def hopeless(nodes_job: str, job: BatchJobState | None, tasks: Sequence[TaskState]) -> str | None:
    """Why no node will come any more, where that is so."""
    over = job is None or job.state in ("terminating", "completed", "deleting")
    if not over and (not tasks or any(task.state != "completed" for task in tasks)):
        return None
    why = ended_words(tasks) if tasks else "it has no tasks"
    return (
        f"job {nodes_job} is over ({job.reason or job.state if job else 'deleted'}) and units are left: {why}. "
        "`tokenmill logs OUTPUT --task node-0000` shows what a node said; then submit the job again, which goes on from here"
    )


@dataclass(slots=True)
class Gathering:
    """Which replicas have joined, until there are enough of them to measure their nodes. Times are seconds of one clock."""

    nodes: int
    """Asked for."""
    names: frozenset[str] = frozenset()
    first_at: float | None = None
    changed_at: float = 0.0

    def enough(self, replicas: Sequence[ReplicaState], now: float) -> bool:
        """Given who is there now: whether all nodes are, or no more are waited for, and nobody has just come."""
        names = frozenset(replica.name for replica in replicas)
        if names != self.names:
            self.names, self.changed_at = names, now
        if not names:
            return False
        self.first_at = now if self.first_at is None else self.first_at
        all_there = num_nodes(replicas) >= self.nodes
        return (all_there or now - self.first_at >= _STRAGGLE_S) and now - self.changed_at >= _SETTLE_S


Measure = Callable[[ClusterSpec, Callable[[str], None]], list[str]]
"""Given the nodes as a cluster of kind address, and who is told: names of slow ones. Raises JobError and OSError."""


class BatchCluster:
    """Made by the driver. Ends its nodes' job in `close`, whatever the run came to; not where a newer driver took over."""

    dashboard = None

    def __init__(
        self, *, account: BatchAccount, order: Order, driver_job: str, rendezvous: str, out_uri: str, model: Model, kind: str, listen: str,
        measure: Measure | None = None,
    ) -> None:  # fmt: skip
        """With `measure`, nodes get units once they were measured, and slow ones none. Raises JobError."""
        self._account, self._pool_id = account, str(order.cluster.worker_pool)
        self._keys = handover.place(str(order.cluster.keys), driver_job)
        self._notes: list[str] = []
        self._refusal: JobError | None = None
        self._tasks: dict[str, TaskState] = {}
        self._told: set[str] = set()
        self._lock, self._closing = threading.Lock(), threading.Event()
        folder = handover.make_or_fetch(self._keys)
        spec = SchedulerSpec(listen=listen, keys=folder, rendezvous=rendezvous, dashboard=None)
        self._scheduler = SchedulerThread(spec, self._note, _end_replaced)
        try:
            self.nodes_job = ask_for_nodes(account, order, f"{driver_job}-nodes", rendezvous=rendezvous, keys=self._keys)
            self._note(f"asked for {order.cluster.nodes} nodes of pool {self._pool_id}: job {self.nodes_job}")
            address = ClusterSpec(kind="address", rendezvous=rendezvous, keys=folder)
            self._inner = AddressCluster(spec=address, out_uri=out_uri, model=model, kind=kind)
        except BaseException:
            self._scheduler.close()
            handover.take_away(self._keys)
            raise
        self._thread = threading.Thread(target=self._watch, name="batch", daemon=True)
        self._thread.start()
        self._measuring = measure is not None
        if measure is not None:
            gathering = Gathering(nodes=order.cluster.nodes or 1)
            threading.Thread(target=self._measure, args=(measure, address, gathering), name="preflight", daemon=True).start()

    def replicas(self) -> list[ReplicaState]:
        """Raises JobError once no node is left and none will come."""
        if self._refusal is not None:
            raise self._refusal
        return [] if self._measuring else self._inner.replicas()

    @property
    def num_replicas(self) -> int:
        return self._inner.num_replicas

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        self._inner.submit(out_uri, fingerprint, unit, attempt, done, on)

    def notes(self) -> list[str]:
        with self._lock:
            notes, self._notes = self._notes, []
        return notes + self._inner.notes()

    def start_seconds(self) -> dict[str, float]:
        return self._inner.start_seconds()

    def loading_seconds(self) -> dict[str, float]:
        return self._inner.loading_seconds()

    def evict(self) -> None:
        self._inner.evict()

    def close(self, *, at_once: bool = False) -> None:
        """Ends the nodes' job, takes the keys away, and lets go."""
        self._closing.set()
        with contextlib.suppress(JobError):  # it also ends with its tasks, and after cluster.max_hours
            self._account.end_job(self.nodes_job)
        handover.take_away(self._keys)
        self._inner.close(at_once=at_once)
        self._scheduler.close()
        self._thread.join(_CLOSE_S)

    def _watch(self) -> None:
        while not self._closing.wait(_WATCH_S):
            try:
                self._look()
            except JobError as error:  # the service does not answer now; units go on without it
                self._note_once(f"the nodes cannot be looked at: {error}")

    def _look(self) -> None:
        tasks = self._account.tasks(self.nodes_job)
        for note in news(self._tasks, tasks):
            self._note(note)
        self._tasks = {task.id: task for task in tasks}
        if any(task.state == "active" for task in tasks):
            for problem in why_they_wait(tasks, self._account.pool(self._pool_id), self._pool_id):
                self._note_once(problem)
        reason = hopeless(self.nodes_job, self._account.job(self.nodes_job), tasks)
        if reason is not None:
            self._refusal = JobError(reason)

    def _measure(self, measure: Measure, nodes: ClusterSpec, gathering: Gathering) -> None:
        try:
            while not gathering.enough(self._inner.replicas(), time.monotonic()):
                if self._closing.wait(_LOOK_S):
                    return
            slow = measure(nodes, self._note)
            self._inner.leave_out(slow)
            for name in slow:  # nodes are named after their tasks; one that idles costs as much as one at work
                self._account.end_task(self.nodes_job, name)
        except JobError as error:
            self._refusal = error
        except OSError as error:
            self._note(f"preflight: the nodes were not measured, and all get units: {error}")
        self._measuring = False

    def _note_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._note(text)

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)


def _end_replaced() -> None:
    """A newer driver has the rendezvous, the nodes and the keys: this one must touch nothing any more, and has nothing to save."""
    print("tokenmill: a newer driver of this job took over; ending", file=sys.stderr, flush=True)
    os._exit(EXIT_UNITS_FAILED)
