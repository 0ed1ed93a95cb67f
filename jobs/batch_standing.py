"""How an output's latest run on Azure Batch stands, by what storage and Batch say; and its cancel, at any time from submit on.

Storage alone tells of a run only once its driver has stored a plan, minutes after submit, or what an earlier run said last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

from jobs import batch_run
from jobs import status as in_storage
from jobs.batch_run import Latest
from jobs.batch_run import Outcome
from jobs.cluster.azure_batch import DRIVER_TASK
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import BatchJobState
from jobs.cluster.batch_advice import TaskState
from jobs.drain import ask_to_drain
from jobs.started import not_planned
from jobs.status import Status
from jobs.status import read_status
from pipeline import storage
from schemas import layout
from schemas.errors import EXIT_DRAINED
from schemas.errors import JobError

WAITS = ("allocating", "starting", "restarting")
"""States in which a driver will speak, and does not yet."""
_LOOK_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How a run stands with Azure Batch."""

    job_id: str
    """Of its driver's job."""
    state: str
    """allocating: its driver waits for a machine. starting: it has one, and has not asked for nodes. running. restarting: Batch starts
    it again. over. elsewhere: it is on a machine of somebody's own. unknown: Batch could not be asked."""
    words: str
    """The same for people, with the reason."""


def state_of(job: BatchJobState | None, driver: TaskState | None, *, has_nodes: bool) -> str:
    """A Standing's state, by what Batch says and by whether the driver has asked for nodes."""
    if job is None or job.is_over or (driver is not None and driver.state == "completed"):
        return "over"
    if driver is None or driver.state != "running":
        return "restarting" if has_nodes or (driver is not None and driver.retries) else "allocating"
    return "running" if has_nodes else "starting"


def standing_of(out_uri: str, account: BatchAccount | None = None) -> Standing:
    """Raises JobError where nothing was submitted that writes there, and OSError where the store does not answer."""
    latest = batch_run.read_latest(out_uri)
    outcome = _outcome(out_uri, latest)
    if outcome is not None:
        return Standing(job_id=latest.driver_job, state="over", words=_end_words(latest, outcome))
    try:
        return _ask(out_uri, latest, account or BatchAccount(latest.endpoint))
    except JobError as error:
        words = f"Azure Batch could not be asked how job {latest.driver_job} stands. {error}"
        return Standing(job_id=latest.driver_job, state="unknown", words=words)


def _ask(out_uri: str, latest: Latest, account: BatchAccount) -> Standing:
    job_id = latest.driver_job
    if _is_elsewhere(latest):
        words = f"its driver is not on Azure Batch{_nodes_words(latest, account)}"
        return Standing(job_id=job_id, state="elsewhere", words=words)
    job = account.job(job_id)
    tasks = account.tasks(job_id) if job is not None else []
    driver = next((task for task in tasks if task.id == DRIVER_TASK), None)
    state = state_of(job, driver, has_nodes=latest.nodes_job is not None)
    words = {
        "allocating": f"job {job_id} is allocating: its driver waits for a machine",
        "starting": f"job {job_id} is starting: its driver has a machine, and has not asked for nodes yet",
        "restarting": f"job {job_id} is restarting: its driver is lost, and Batch starts it again",
        "running": f"job {job_id} is running{_nodes_words(latest, account) if state == 'running' else ''}",
        "over": silent_end(job_id, driver, out_uri),
    }[state]
    return Standing(job_id=job_id, state=state, words=words)


def _nodes_words(latest: Latest, account: BatchAccount) -> str:
    job = account.job(latest.nodes_job) if latest.nodes_job is not None else None
    if job is None or job.is_over:
        return "; its nodes have ended"
    tasks = account.tasks(job.id)
    return f"; of its {len(tasks)} nodes {sum(task.state == 'running' for task in tasks)} run (job {job.id})"


def _is_elsewhere(latest: Latest) -> bool:
    """Whether somebody started `tokenmill driver`, and no submit."""
    return not latest.stamp


def _end_words(latest: Latest, outcome: Outcome) -> str:
    """Of a job that is over, by its driver's own word."""
    return f"job {latest.driver_job} is over (exit code {outcome.exit_code}): {outcome.message}"


def silent_end(job_id: str, driver: TaskState | None, out_uri: str) -> str:
    """Of a job that is over without its driver's own word, in words."""
    how = "never started" if driver is None else driver.failure or f"ended with exit code {driver.exit_code}"
    return f"job {job_id} is over and its driver said nothing: it {how}; see `tokenmill logs {out_uri}`"


def status_of(out_uri: str, account: BatchAccount | None = None) -> tuple[Status, Standing]:
    """As read_status, from submit on; what an earlier run said last is not taken for this one's. Raises as standing_of does."""
    out_uri = storage.absolute(out_uri)
    standing = standing_of(out_uri, account)
    if not _has_plan(out_uri):
        state = "interrupted" if standing.state == "over" else "starting"
        return replace(not_planned(standing.job_id, out_uri), state=state), standing
    found = read_status(out_uri)
    if standing.state in ("allocating", "starting"):
        found = replace(found, state="starting", said={}, age_s=None)
    elif standing.state == "restarting":
        found = replace(found, state="starting")
    return found, standing


def wait_for_driver(out_uri: str, say: Callable[[str], None], *, wait_s: float = _LOOK_S) -> None:
    """Until the driver of the latest run speaks, or none will; says how it stands when that changes. Raises as standing_of does."""
    said = ""
    while True:
        standing = standing_of(out_uri)
        if standing.state not in (*WAITS, "unknown") or (standing.state == "unknown" and not said):
            if standing.state != "running":
                say(standing.words)
            elif said:
                time.sleep(wait_s)  # it has just asked for nodes, and speaks in a moment
            return
        if standing.words != said:
            said = standing.words
            say(said)
        time.sleep(wait_s)


def cancel(out_uri: str, account: BatchAccount | None = None) -> list[str]:
    """Ask the latest run to drain, whether or not its driver has begun; what it has not begun, Batch ends. Returns what to tell.

    Raises as standing_of does; that Batch cannot be asked is told.
    """
    out_uri = storage.absolute(out_uri)
    try:
        latest = batch_run.read_latest(out_uri)
    except JobError as error:
        return [in_storage.cancel_words(in_storage.cancel(out_uri)), str(error)]
    outcome = _outcome(out_uri, latest)
    if outcome is not None:  # whoever is at work there now is not on Batch
        return [_in_storage(out_uri, f"nothing to cancel: {_end_words(latest, outcome)}")]
    ask_to_drain(out_uri)  # first: a driver that starts, or comes back, whatever happens now, hears it
    try:
        return _end(out_uri, latest, account or BatchAccount(latest.endpoint))
    except JobError as error:
        _keep_from_beginning(out_uri, latest)
        return [
            "asked to drain: a driver that is at work, or starts later, heeds that",
            f"Azure Batch could not be asked about job {latest.driver_job}. {error}",
        ]


def _end(out_uri: str, latest: Latest, account: BatchAccount) -> list[str]:
    if _is_elsewhere(latest):
        return [_in_storage(out_uri, in_storage.cancel_words("starting"))]
    job = account.job(latest.driver_job)
    if job is None or job.is_over:
        told = [_in_storage(out_uri, f"nothing to cancel: job {latest.driver_job} is over")]
        nodes = account.job(latest.nodes_job) if latest.nodes_job is not None else None
        if nodes is not None and not nodes.is_over:  # its driver had no time to
            account.end_job(nodes.id)
            told.append(f"job {nodes.id} of its nodes is ended")
        return told
    if latest.nodes_job is not None:
        return [in_storage.cancel_words("running")]
    _keep_from_beginning(out_uri, latest)
    account.end_job(latest.driver_job)
    return [f"job {latest.driver_job} is ended: its driver had not begun"]


def _keep_from_beginning(out_uri: str, latest: Latest) -> None:
    """A driver that finds a word of how it ended ends at once."""
    if latest.nodes_job is None:
        outcome = Outcome(exit_code=EXIT_DRAINED, message="drained: cancelled before its driver began")
        batch_run.store_outcome(out_uri, batch_run.plain(latest.driver_job), latest.stamp, outcome)


def _in_storage(out_uri: str, without_plan: str) -> str:
    """The cancel of whatever is at work there, by storage alone."""
    return in_storage.cancel_words(in_storage.cancel(out_uri)) if _has_plan(out_uri) else without_plan


def _outcome(out_uri: str, latest: Latest) -> Outcome | None:
    return batch_run.read_outcome(out_uri, batch_run.plain(latest.driver_job), latest.stamp)


def _has_plan(out_uri: str) -> bool:
    return storage.exists(storage.join(out_uri, layout.PLAN))
