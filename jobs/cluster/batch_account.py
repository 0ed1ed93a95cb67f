"""One Azure Batch account, asked through its SDK in short calls; every refusal comes out with its cause and the next step.

Knows nothing of runs: what is sent is made in jobs.cluster.azure_batch.
"""

from __future__ import annotations

import email.utils
import io
import json
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from azure.batch import BatchClient
from azure.batch import models
from azure.core.credentials import AccessToken
from azure.core.exceptions import AzureError
from azure.core.exceptions import ClientAuthenticationError
from azure.core.exceptions import HttpResponseError
from azure.core.exceptions import ResourceExistsError
from azure.core.exceptions import ResourceNotFoundError
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import DefaultAzureCredential
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from jobs.cluster.batch_advice import PoolState
from jobs.cluster.batch_advice import TaskState
from jobs.cluster.batch_advice import explain
from schemas.errors import JobError

_BUSY = (408, 429, 500, 502, 503, 504)
_NODES_AT_ONCE = 100
"""Tasks that one request may add."""
_TRIES_AGAIN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchJobState:
    """One job, as the service describes it."""

    id: str
    state: str
    reason: str | None
    """Why it is over."""

    @property
    def is_over(self) -> bool:
        return self.state in ("completed", "terminating", "deleting")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleState:
    """One schedule, as the service describes it. Times in ISO 8601, UTC."""

    id: str
    state: str
    every: str
    next_run: str | None
    recent_job: str | None
    job_file: str


class BatchSilent(JobError):
    """The service, or the way to it, did not answer: the same request may go well later."""


class BatchAccount:
    """One account. Whatever the service refuses is a JobError with the cause and the next step; where it may be otherwise in a
    moment, a BatchSilent."""

    def __init__(self, endpoint: str, client: BatchClient | None = None) -> None:
        self.endpoint = endpoint
        self._client = client or BatchClient(endpoint, DefaultAzureCredential(), retry_total=_TRIES_AGAIN)

    def pool(self, pool_id: str) -> PoolState | None:
        """None where there is no such pool."""
        try:
            with self._asking(f"looking at pool {pool_id}", keep=(ResourceNotFoundError,)):
                found = self._client.get_pool(pool_id)
        except ResourceNotFoundError:
            return None
        errors = [(str(error.code), str(error.message)) for error in found.resize_errors or []]
        formula = found.auto_scale_run.error if found.auto_scale_run is not None else None
        if formula is not None:
            errors.append((str(formula.code), f"autoscale formula: {formula.message}"))
        machine = found.virtual_machine_configuration
        return PoolState(
            id=pool_id,
            state=str(_word(found.state)),
            vm_size=found.vm_size,
            autoscale=bool(found.enable_auto_scale),
            target_nodes=(found.target_dedicated_nodes or 0) + (found.target_low_priority_nodes or 0),
            current_nodes=(found.current_dedicated_nodes or 0) + (found.current_low_priority_nodes or 0),
            slots_per_node=found.task_slots_per_node or 1,
            containers=machine is not None and machine.container_configuration is not None,
            identities=tuple(each.resource_id for each in found.identity.user_assigned_identities or []) if found.identity else (),
            errors=tuple(errors),
        )

    def create_job(self, options: models.BatchJobCreateOptions) -> bool:
        """False where there is one of this id."""
        try:
            with self._asking(f"creating job {options.id}", keep=(ResourceExistsError,)):
                self._client.create_job(options)
        except ResourceExistsError as error:
            if _code(error) != "JobExists":  # quotas are told with the same status
                raise self._explained(error, f"creating job {options.id}") from None
            return False
        return True

    def job(self, job_id: str) -> BatchJobState | None:
        """None where there is no such job."""
        try:
            with self._asking(f"looking at job {job_id}", keep=(ResourceNotFoundError,)):
                found = self._client.get_job(job_id)
        except ResourceNotFoundError:
            return None
        info = found.execution_info
        return BatchJobState(id=job_id, state=str(_word(found.state)), reason=info.termination_reason if info is not None else None)

    def add_tasks(self, job_id: str, tasks: list[models.BatchTaskCreateOptions]) -> None:
        """Those that are there already stay as they are."""
        doing = f"adding {len(tasks)} tasks to job {job_id}"
        for start in range(0, len(tasks), _NODES_AT_ONCE):
            with self._asking(doing):
                group = models.BatchTaskGroup(task_values=tasks[start : start + _NODES_AT_ONCE])
                result = self._client.create_task_collection(job_id, group)
            for each in result.result_values or []:
                if each.error is not None and each.error.code != "TaskExists":
                    said = each.error.message.value if each.error.message is not None else ""
                    raise JobError(
                        explain(doing=f"{doing}: {each.task_id}", code=str(each.error.code), message=str(said), status=None, skew_s=None)
                    )

    def update_job(self, job_id: str, options: models.BatchJobUpdateOptions) -> None:
        with self._asking(f"updating job {job_id}"):
            self._client.update_job(job_id, options)

    def tasks(self, job_id: str) -> list[TaskState]:
        with self._asking(f"listing the tasks of job {job_id}"):
            return [_task(found) for found in self._client.list_tasks(job_id)]

    def end_job(self, job_id: str) -> None:
        """Its running tasks are ended. Nothing happens where it is over, or gone. Returns before it has happened."""
        with self._asking(f"ending job {job_id}", keep=(ResourceNotFoundError, ResourceExistsError)), _unless_gone():
            # The model is not public, and without any azure-batch 15.1 fails before it sends a thing.
            self._client.begin_terminate_job(job_id, {"terminateReason": "tokenmill"})  # type: ignore[arg-type]

    def end_task(self, job_id: str, task_id: str) -> None:
        """Nothing happens where it is over, or gone."""
        with self._asking(f"ending {task_id} in job {job_id}", keep=(ResourceNotFoundError, ResourceExistsError)), _unless_gone():
            self._client.terminate_task(job_id, task_id)

    def read_file(self, job_id: str, task_id: str, name: str) -> str | None:
        """A task's file while it lies on its node; None where it does not."""
        try:
            with self._asking(f"reading {name} of {task_id} in job {job_id}", keep=(ResourceNotFoundError, ResourceExistsError)):
                return b"".join(self._client.download_task_file(job_id, task_id, name)).decode(errors="replace")
        except (ResourceNotFoundError, ResourceExistsError):  # the second where the node is gone
            return None

    def create_schedule(self, options: models.BatchJobScheduleCreateOptions) -> None:
        with self._asking(f"creating schedule {options.id}"):
            self._client.create_job_schedule(options)

    def schedules(self) -> list[ScheduleState]:
        """Those of ours: their job manager is `tokenmill driver`."""
        with self._asking("listing schedules"):
            found = [_schedule(each) for each in self._client.list_job_schedules()]
        return [each for each in found if each is not None]

    def schedule(self, schedule_id: str) -> ScheduleState:
        with self._asking(f"looking at schedule {schedule_id}"):
            found = _schedule(self._client.get_job_schedule(schedule_id))
        if found is None:
            raise JobError(f"{schedule_id} is a schedule, but none that `tokenmill schedule create` made")
        return found

    def schedule_jobs(self, schedule_id: str) -> list[BatchJobState]:
        with self._asking(f"listing the jobs of schedule {schedule_id}"):
            return [
                BatchJobState(id=str(job.id), state=str(_word(job.state)), reason=None)
                for job in self._client.list_jobs_from_schedule(schedule_id)
            ]

    def pause_schedule(self, schedule_id: str) -> None:
        """A run that is under way goes on."""
        with self._asking(f"pausing schedule {schedule_id}"):
            self._client.disable_job_schedule(schedule_id)

    def resume_schedule(self, schedule_id: str) -> None:
        with self._asking(f"resuming schedule {schedule_id}"):
            self._client.enable_job_schedule(schedule_id)

    def delete_schedule(self, schedule_id: str) -> None:
        """And all its jobs. Outputs stay."""
        with self._asking(f"deleting schedule {schedule_id}"):
            self._client.begin_delete_job_schedule(schedule_id)

    @contextmanager
    def _asking(self, doing: str, keep: tuple[type[AzureError], ...] = ()) -> Iterator[None]:
        """What the SDK raises, as a JobError; those to `keep` the caller deals with."""
        try:
            yield
        except keep:
            raise
        except AzureError as error:
            raise self._explained(error, doing) from None

    def _explained(self, error: AzureError, doing: str) -> JobError:
        if isinstance(error, ClientAuthenticationError) and getattr(error, "model", None) is None:  # azure-identity's own
            advice = "sign in (az login), or on a node check cluster.identity and cluster.client_id"
            return JobError(f"{doing}: no token for Azure Batch was to be had: {_short(error)}. What to do: {advice}")
        if not isinstance(error, HttpResponseError) or error.response is None:
            host = urlsplit(self.endpoint).hostname
            return JobError(
                f"{doing}: {host} does not answer: {_short(error)}. Check cluster.endpoint and this machine's network and proxy"
            )
        skew_s = _skew(getattr(error.response, "headers", {}).get("Date"), time.time())
        said = _message(error)
        code = _code(error) or ("AuthenticationFailed" if isinstance(error, ClientAuthenticationError) else "")
        kind = BatchSilent if error.status_code in _BUSY else JobError
        return kind(explain(doing=doing, code=code, message=said, status=error.status_code, skew_s=skew_s))


@contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except (ResourceNotFoundError, ResourceExistsError):  # 409: it is over, or being ended
        return


def _word(value: Any) -> Any:
    """The SDK's enumerations as the service writes them."""
    return getattr(value, "value", value)


def _task(found: models.BatchTask) -> TaskState:
    info, node = found.execution_info, found.node_info
    failure = info.failure_info if info is not None else None
    return TaskState(
        id=str(found.id),
        state=str(_word(found.state)),
        exit_code=info.exit_code if info is not None else None,
        failure=f"{failure.code}: {failure.message}" if failure is not None and failure.code != "FailureExitCode" else None,
        retries=info.retry_count if info is not None else 0,
        requeues=info.requeue_count if info is not None else 0,
        node=node.node_id if node is not None else None,
    )


def _schedule(found: models.BatchJobSchedule) -> ScheduleState | None:
    manager = found.job_specification.job_manager_task if found.job_specification is not None else None
    if manager is None or not manager.command_line.startswith("tokenmill driver "):
        return None
    info, interval = found.execution_info, found.schedule.recurrence_interval if found.schedule is not None else None
    return ScheduleState(
        id=str(found.id),
        state=str(_word(found.state)),
        every=str(interval),
        next_run=info.next_run_time.isoformat() if info is not None and info.next_run_time is not None else None,
        recent_job=info.recent_job.id if info is not None and info.recent_job is not None else None,
        job_file=next((str(file.http_url) for file in manager.resource_files or []), ""),
    )


def _code(error: HttpResponseError) -> str:
    return str(getattr(error.model, "code", "") or "")


def _message(error: HttpResponseError) -> str:
    """The service's own sentence, and the values that it names, on one line."""
    model = error.model
    text = str(getattr(getattr(model, "message", None), "value", "") or error.reason or "no reason given")
    details = [f"{each.key}: {each.value}" for each in getattr(model, "error_values", None) or []]
    lines = [line for line in text.splitlines() if not line.startswith(("RequestId:", "Time:"))]
    return " ".join([*lines, *details])[:500]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _skew(date: str | None, now: float) -> float | None:
    """Seconds by which this machine's clock is ahead of the answer's."""
    try:
        return now - email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return None


def recorded(endpoint: str, calls: Callable[[BatchAccount], None]) -> list[dict[str, Any]]:
    """The requests that the SDK would send for these calls, whole but for who signs them. Nothing leaves this process."""
    recorder = _Recorder()
    session = requests.Session()
    session.mount("https://", recorder)
    transport = RequestsTransport(session=session, session_owner=False)
    calls(BatchAccount(endpoint, BatchClient(endpoint, _NoCredential(), transport=transport, retry_total=0)))
    return recorder.requests


class _NoCredential:
    """For requests that are never sent."""

    def get_token(self, *scopes: str, **_: Any) -> AccessToken:
        return AccessToken("none", int(time.time()) + 3600)


_WENT_WELL = {"addtaskcollection": 200, "terminate": 202, "disable": 204, "enable": 204}
"""How the service says so, by the last word of the address."""
_BY_METHOD = {"POST": 201, "DELETE": 202}
"""And otherwise by the method."""


class _Recorder(HTTPAdapter):
    """Answers every request as if it had gone well."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[dict[str, Any]] = []

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        body = json.loads(request.body) if isinstance(request.body, str | bytes) else None
        kind = {"content-type": request.headers["Content-Type"]} if "Content-Type" in request.headers else {}
        self.requests.append({"method": request.method, "url": request.url, **kind, **({"body": body} if body is not None else {})})
        path = urlsplit(str(request.url)).path
        status = _WENT_WELL.get(path.rpartition("/")[2], _BY_METHOD.get(str(request.method), 200))
        status = 204 if "/tasks/" in path and status == 202 else status  # a task is ended at once, a job in its own time
        answer = b"" if status == 204 else json.dumps({"value": []}).encode()
        return self.build_response(
            request,
            HTTPResponse(
                body=io.BytesIO(answer),
                headers={"Content-Type": "application/json"},
                status=status,
                preload_content=False,
            ),
        )
