"""A job onto Azure Batch: checked, its file stored, its driver's job created; then followed, and its logs read. Nothing runs here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from jobs import batch_run
from jobs.batch_run import Latest
from jobs.batch_standing import silent_end
from jobs.cluster import azure_batch
from jobs.cluster.azure_batch import DRIVER_TASK
from jobs.cluster.azure_batch import Order
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import BatchSilent
from jobs.cluster.batch_account import recorded
from jobs.cluster.batch_advice import pool_problem
from jobs.cluster.batch_advice import resize_problems
from jobs.cluster.batch_nodes import create_numbered
from jobs.drain import drain_request
from jobs.progress import seconds_words
from jobs.status import read_status
from pipeline import handover
from pipeline import storage
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.job import JobSpec

_FOLLOW_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A job that Batch has."""

    job_id: str
    stamp: str
    out_uri: str
    notes: tuple[str, ...]
    """What the user should hear of the pools."""


def submit(job: JobSpec, account: BatchAccount | None = None) -> Submitted:
    """Put the job's driver onto Batch; the driver asks for nodes. Raises JobError, also where this output's job is running."""
    check_kind(job)
    storage.use(job.storage)
    out_uri = storage.absolute(job.output.uri)
    account = account or BatchAccount(str(job.cluster.endpoint))
    order = batch_run.order_for(job, batch_run.stamp(time.time()))
    wanted = batch_run.job_id_of(job)
    nodes_tasks(order, job, wanted)  # what the driver could not ask for is refused here
    notes = check_pools(account, job)
    batch_run.store_job_file(job)
    order = replace(order, drain_before=_drain_request(out_uri))
    job_id, created = create_numbered(account, wanted, lambda name: account.create_job(azure_batch.driver_job(order, name)))
    if not created:
        raise JobError(
            f"job {job_id} is running already and writes to {out_uri}: follow it with `tokenmill status {out_uri}`, "
            f"or drain it with `tokenmill cancel {out_uri}` and submit again then"
        )
    batch_run.store_latest(out_uri, Latest(endpoint=account.endpoint, driver_job=job_id, stamp=order.stamp))
    return Submitted(job_id=job_id, stamp=order.stamp, out_uri=out_uri, notes=tuple(notes))


def check_kind(job: JobSpec) -> None:
    """Raises JobError."""
    if job.cluster.kind != "azure-batch":
        raise JobError(f"cluster.kind: found {job.cluster.kind}, expected azure-batch; `tokenmill run` runs this job")


def check_pools(account: BatchAccount, job: JobSpec) -> list[str]:
    """What may delay the nodes. Raises JobError for what would leave tasks waiting for ever."""
    cluster, notes = job.cluster, []
    for field, pool_id, alone in (("driver_pool", cluster.driver_pool, False), ("worker_pool", cluster.worker_pool, True)):
        pool = account.pool(str(pool_id))
        problem = pool_problem(pool, field, str(pool_id), str(cluster.identity), one_task_a_node=alone)
        if problem is not None:
            raise JobError(problem)
        assert pool is not None
        notes += resize_problems(pool)
    return notes


def requests_of(job: JobSpec, now: float) -> dict[str, Any]:
    """What `submit` stores and sends, and what the driver sends for its nodes then; nothing is sent."""
    check_kind(job)
    storage.use(job.storage)
    order, job_id = batch_run.order_for(job, batch_run.stamp(now)), batch_run.job_id_of(job)
    nodes_id = f"{job_id}-nodes"

    def by_driver(account: BatchAccount) -> None:
        account.create_job(azure_batch.nodes_job(order, nodes_id))
        account.add_tasks(nodes_id, nodes_tasks(order, job, job_id))
        account.update_job(nodes_id, azure_batch.end_with_tasks())

    endpoint = str(job.cluster.endpoint)
    return {
        "stored": {order.job_file: json.loads(batch_run.job_file_data(job))},
        "sent_by_submit": recorded(endpoint, lambda account: _ignore(account.create_job(azure_batch.driver_job(order, job_id)))),
        "sent_by_driver": recorded(endpoint, by_driver),
    }


def nodes_tasks(order: Order, job: JobSpec, job_id: str) -> list[Any]:
    """What the driver of a job of this id asks for. Raises JobError where Batch could not run that."""
    rendezvous, keys = batch_run.rendezvous(job.output.uri), handover.place(str(job.cluster.keys), job_id)
    return azure_batch.node_tasks(order, f"{job_id}-nodes", rendezvous=rendezvous, keys=keys)


def _drain_request(out_uri: str) -> str:
    try:
        return drain_request(out_uri)
    except OSError as error:
        raise JobError(f"output.uri: cannot read in {out_uri}: {error}") from error


def _ignore(_: object) -> None:
    return


def follow(submitted: Submitted, account: BatchAccount, say: Callable[[str], None], *, wait_s: float = _FOLLOW_S) -> int:
    """Until the driver has ended; says how it stands when that changes. Returns its exit code. Raises JobError."""
    said = ""
    while True:
        try:
            line, exit_code = _look(submitted, account)
        except (BatchSilent, OSError) as error:  # which says nothing of the job
            line, exit_code = f"no news at the moment: {error}", None
        if line != said:
            said = line
            say(line)
        if exit_code is not None:
            return exit_code
        time.sleep(wait_s)


def _look(submitted: Submitted, account: BatchAccount) -> tuple[str, int | None]:
    """How the job stands, in a line, and its driver's exit code once it has ended."""
    standing = _standing(submitted, account)
    outcome = batch_run.read_outcome(submitted.out_uri, submitted.job_id, submitted.stamp)  # after it: it ends between two looks
    if outcome is not None:
        return outcome.message, outcome.exit_code
    if standing is not None:
        return standing, None
    driver = next((task for task in account.tasks(submitted.job_id) if task.id == DRIVER_TASK), None)
    return silent_end(submitted.job_id, driver, submitted.out_uri), EXIT_UNITS_FAILED


def _standing(submitted: Submitted, account: BatchAccount) -> str | None:
    """How the job stands, in a line; None once Batch says that it is over."""
    job = account.job(submitted.job_id)
    if job is None or job.is_over:
        return None
    try:
        status = read_status(submitted.out_uri)
    except JobError:
        return f"job {submitted.job_id} is {job.state}; its driver has not begun"
    eta = status.said.get("eta_s")
    words = "" if eta is None else f", ETA {seconds_words(eta)}"
    replicas = len(status.said.get("replicas", []))
    return f"{status.state}: {status.rows_done:,} of {status.rows:,} rows, {replicas} replicas{words}"


def logs(out_uri: str, task_id: str, job_id: str | None = None) -> list[tuple[str, str]]:
    """What a task printed, by stream: from its node while it runs, from storage once it has ended. Raises JobError."""
    latest = batch_run.read_latest(out_uri)
    job_id = job_id or (latest.driver_job if task_id == DRIVER_TASK else latest.nodes_job)
    if job_id is None:
        raise JobError(f"job {latest.driver_job} has not asked for nodes yet; see `tokenmill logs {out_uri}`")
    stored = _stored(out_uri, job_id, task_id)
    if stored:
        return stored
    account = BatchAccount(latest.endpoint)
    live = [(name, text) for name in batch_run.STREAMS if (text := account.read_file(job_id, task_id, name)) is not None]
    if not live:
        known = ", ".join(task.id for task in account.tasks(job_id)[:20]) or "none"
        raise JobError(f"{task_id} in job {job_id} has printed nothing yet, or is none of its tasks ({known})")
    return live


def _stored(out_uri: str, job_id: str, task_id: str) -> list[tuple[str, str]]:
    place = batch_run.logs_folder(out_uri, job_id, task_id)
    names = storage.list_names(place)
    return [(name, storage.read_bytes(storage.join(place, name)).decode(errors="replace")) for name in batch_run.STREAMS if name in names]
