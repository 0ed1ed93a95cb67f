"""`tokenmill driver`: one run of a job from a machine that stays, with the scheduler inside; asks Azure Batch for nodes where told to.

Batch starts it again when its process or its machine dies; it then goes on from storage. When it ended by itself its exit code
is stored first, and a start after that ends at once with the same: Batch's retries are for deaths, not for answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from pathlib import Path

from jobs import api
from jobs import batch_run
from jobs import scheduled
from jobs.accept import Accepted
from jobs.batch_run import Latest
from jobs.batch_run import Outcome
from jobs.cluster.azure_batch import DRIVER_TASK
from jobs.cluster.azure_batch import METRICS
from jobs.cluster.azure_batch import STAMP
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import BatchSilent
from jobs.cluster.batch_nodes import BatchCluster
from jobs.cluster.cluster import Cluster
from jobs.drain import DrainWatch
from jobs.plan import Taken
from jobs.preflight import PreflightJob
from jobs.preflight import PreflightSpec
from jobs.preflight import slow_nodes
from jobs.scheduler import SchedulerSpec
from jobs.scheduler import SchedulerThread
from pipeline import storage
from schemas import layout
from schemas.errors import EXIT_COMPLETE
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.errors import TokenmillError
from schemas.job import ClusterSpec
from schemas.job import JobSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTask:
    """The task of Batch that this process is; started again it is the same one."""

    batch_id: str
    """Of its job; a schedule's jobs are called NAME:job-1."""
    stamp: str
    """Of its submit, see Order.stamp. Without one nobody starts it again, and nobody asks how it ended."""
    folder: str | None = None
    """Where Batch puts what it prints."""

    @property
    def job_id(self) -> str:
        """As names and other jobs' ids may contain it."""
        return batch_run.plain(self.batch_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverSpec:
    """One driver."""

    job: JobSpec
    task: BatchTask | None
    """None outside of Batch."""
    listen: str
    schedule: str | None = None
    """The schedule's name, where this is one of its runs."""


def batch_task(environment: Mapping[str, str]) -> BatchTask | None:
    """What Batch, and `tokenmill submit`, put into the environment of a task."""
    batch_id = environment.get("AZ_BATCH_JOB_ID")
    if not batch_id:
        return None
    return BatchTask(batch_id=batch_id, stamp=environment.get(STAMP, ""), folder=environment.get("AZ_BATCH_TASK_DIR"))


def serve(spec: DriverSpec, say: Callable[[str], None]) -> int:
    """Until the job is done, drained or given up. Returns the exit code. Raises JobError and what api.run raises."""
    kind = spec.job.cluster.kind
    if kind not in ("azure-batch", "address"):
        raise JobError(
            f"cluster.kind: found {kind}; a driver has the scheduler for nodes elsewhere: azure-batch or address. Use `tokenmill run`"
        )
    if kind == "address" and spec.job.cluster.rendezvous is None:
        raise JobError(
            "cluster: a driver of kind address has a scheduler of its own, and says where in the rendezvous: give that, and no address"
        )
    storage.use(spec.job.storage)
    job = spec.job
    taken: Taken = frozenset()
    now = datetime.now(UTC)
    if spec.schedule is not None:
        run_id = f"{spec.task.job_id}-{spec.task.stamp}" if spec.task is not None else f"{spec.schedule}-{now:%Y%m%dT%H%M%SZ}"
        run = scheduled.begin(job.output.uri, run_id, now)
        taken = scheduled.taken_by_others(job.output.uri, run.run_id)
        job = scheduled.job_of(job, run)
        say(f"run {run.run_id} of schedule {spec.schedule}: {job.output.uri}; {len(taken)} objects are other runs'")
        begun = storage.exists(storage.join(job.output.uri, layout.PLAN))
        if not begun and not scheduled.anything_new(job, taken):
            say("nothing new: every object is in an earlier run's plan")
            return EXIT_COMPLETE
    task = spec.task or BatchTask(batch_id=batch_run.job_id_of(job), stamp="")
    earlier = batch_run.read_outcome(job.output.uri, task.job_id, task.stamp) if task.stamp else None
    if earlier is not None:
        say(f"this driver has ended before, with exit code {earlier.exit_code}: {earlier.message}")
        return earlier.exit_code
    if kind == "azure-batch":
        try:
            return _run(job, taken, task, lambda accepted: _cluster(accepted, task, spec.listen))
        finally:
            if task.folder is not None:  # Batch uploads all that too, but to one place for all runs of a schedule
                batch_run.keep_prints(task.folder, job.output.uri, task.batch_id, DRIVER_TASK)
    cluster = job.cluster
    listen = SchedulerSpec(listen=spec.listen, keys=cluster.keys, insecure=cluster.insecure, rendezvous=cluster.rendezvous, dashboard=None)
    scheduler = SchedulerThread(listen, say, _end_replaced)
    try:
        return _run(job, taken, task, api.make_cluster)
    finally:
        scheduler.close()


def _run(job: JobSpec, taken: Taken, task: BatchTask, cluster_of: Callable[[Accepted], Cluster]) -> int:
    out_uri = storage.absolute(job.output.uri)
    drains = DrainWatch(out_uri)

    def ended(exit_code: int, message: str) -> None:
        if task.stamp:
            batch_run.store_outcome(out_uri, task.job_id, task.stamp, Outcome(exit_code=exit_code, message=message))

    since = batch_run.first_began(out_uri, task.job_id, task.stamp, time.time()) if task.stamp else None
    try:
        result = api.run(job, taken=taken, cluster_of=cluster_of, since=since)
    except TokenmillError as error:
        if error.exit_code != EXIT_UNITS_FAILED and not isinstance(error, BatchSilent):
            ended(error.exit_code, str(error))
        raise
    if task.stamp:
        Path(METRICS).write_text(json.dumps(result.to_dict(), indent=1))
    # A driver that was told to end because its machine goes is to go on elsewhere; one whose job was cancelled is not.
    if result.state != "drained" or drains.asked():
        ended(result.exit_code, f"{result.state}: see `tokenmill report {out_uri}`")
    return result.exit_code


def _cluster(accepted: Accepted, task: BatchTask, listen: str) -> Cluster:
    job, out_uri = accepted.job, accepted.out_uri
    endpoint = str(job.cluster.endpoint)
    batch_run.store_job_file(job)
    cluster = BatchCluster(
        account=BatchAccount(endpoint),
        order=batch_run.order_for(job, task.stamp),
        driver_job=task.job_id,
        rendezvous=batch_run.rendezvous(out_uri),
        out_uri=out_uri,
        model=accepted.model,
        kind=job.engine.kind,
        listen=listen,
        measure=(lambda nodes, say: _slow_nodes(job, task, nodes, say)) if job.cluster.preflight else None,
    )
    batch_run.store_latest(out_uri, Latest(endpoint=endpoint, driver_job=task.batch_id, stamp=task.stamp, nodes_job=cluster.nodes_job))
    return cluster


def _slow_nodes(job: JobSpec, task: BatchTask, nodes: ClusterSpec, say: Callable[[str], None]) -> list[str]:
    """Measured once for a submit: a driver that is started again finds its nodes at work. Raises JobError and OSError."""
    out_uri = storage.absolute(job.output.uri)
    known = batch_run.read_left_out(out_uri, task.stamp)
    if known is not None:
        return known
    spec = PreflightSpec(job=PreflightJob(engine=job.engine, output=job.output, cluster=nodes, storage=job.storage))
    slow = slow_nodes(spec, say)
    batch_run.store_left_out(out_uri, task.stamp, slow)
    return slow


def _end_replaced() -> None:
    print("tokenmill: a newer scheduler has the rendezvous; ending", file=sys.stderr, flush=True)
    os._exit(EXIT_UNITS_FAILED)
