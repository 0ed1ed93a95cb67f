"""The schedule of a job on Azure Batch: made, shown, paused, resumed, deleted. Its runs' folders are jobs.scheduled's."""

from __future__ import annotations

import json
import time
from typing import Any

from jobs import batch_run
from jobs import scheduled
from jobs.cluster import azure_batch
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import ScheduleState
from jobs.cluster.batch_account import recorded
from jobs.status import read_status
from jobs.submission import check_kind
from jobs.submission import check_pools
from jobs.submission import nodes_tasks
from pipeline import storage
from schemas.batch import ScheduleSpec
from schemas.errors import JobError
from schemas.job import JobSpec


def schedule_id(job: JobSpec) -> str:
    """The job's name; so one output has one schedule of a name, and a second one is refused by Batch."""
    return batch_run.job_id_of(job)


def create(job: JobSpec, account: BatchAccount | None = None) -> list[str]:
    """Returns what to tell the user. Raises JobError."""
    when = _when(job)
    storage.use(job.storage)
    name, order = schedule_id(job), batch_run.order_for(job, batch_run.stamp(time.time()))
    nodes_tasks(order, job, name)  # what its runs' drivers could not ask for is refused here
    account = account or BatchAccount(str(job.cluster.endpoint))
    notes = check_pools(account, job)
    batch_run.store_job_file(job)
    account.create_schedule(azure_batch.job_schedule(order, name, when))
    first = "now" if when.first is None else f"{when.first:%Y-%m-%d %H:%M %Z}"
    return [
        *notes,
        f"schedule {name}: every {when.every} from {first}, each run in a folder of its own below {storage.absolute(job.output.uri)}",
        "one run at a time, at a fixed interval in UTC: there is no calendar, and summer time is not followed",
    ]


def requests_of(job: JobSpec, now: float) -> dict[str, Any]:
    """What `create` stores and sends; nothing is sent."""
    when = _when(job)
    storage.use(job.storage)
    order, name = batch_run.order_for(job, batch_run.stamp(now)), schedule_id(job)
    nodes_tasks(order, job, name)
    return {
        "stored": {order.job_file: json.loads(batch_run.job_file_data(job))},
        "sent_by_schedule_create": recorded(
            str(job.cluster.endpoint), lambda account: account.create_schedule(azure_batch.job_schedule(order, name, when))
        ),
    }


def list_all(job: JobSpec) -> list[ScheduleState]:
    """All schedules of ours in the job's account."""
    check_kind(job)
    return BatchAccount(str(job.cluster.endpoint)).schedules()


def show(job: JobSpec, account: BatchAccount | None = None) -> list[str]:
    """The schedule and each run of it, for people. Raises JobError."""
    check_kind(job)
    storage.use(job.storage)
    account = account or BatchAccount(str(job.cluster.endpoint))
    found = account.schedule(schedule_id(job))
    lines = [f"{found.id}: {found.state}, every {found.every}, next {found.next_run or '-'}, latest job {found.recent_job or '-'}"]
    for run in scheduled.runs(job.output.uri):
        out_uri = storage.join(storage.absolute(job.output.uri), run.folder)
        try:
            status = read_status(out_uri)
            lines.append(f"{run.folder}: {status.state}, {status.rows_done:,} of {status.rows:,} rows (job {run.run_id})")
        except JobError:
            lines.append(f"{run.folder}: nothing was new, or it has not begun (job {run.run_id})")
    return lines


def pause(job: JobSpec) -> str:
    """Raises JobError, as all of these."""
    check_kind(job)
    BatchAccount(str(job.cluster.endpoint)).pause_schedule(schedule_id(job))
    return f"{schedule_id(job)} is paused; a run that is under way goes on. `tokenmill schedule resume` starts it again"


def resume(job: JobSpec) -> str:
    check_kind(job)
    BatchAccount(str(job.cluster.endpoint)).resume_schedule(schedule_id(job))
    return f"{schedule_id(job)} runs again"


def delete(job: JobSpec) -> str:
    check_kind(job)
    BatchAccount(str(job.cluster.endpoint)).delete_schedule(schedule_id(job))
    return f"{schedule_id(job)} is deleted with its jobs; outputs stay, and a new schedule of this job goes on from them"


def _when(job: JobSpec) -> ScheduleSpec:
    check_kind(job)
    if job.schedule is None:
        raise JobError("schedule: the job file has no such section; give it one, as in schedule: {every: 1d, first: 2026-12-01T02:30:00Z}")
    return job.schedule
