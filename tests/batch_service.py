"""A small Azure Batch for tests: pools, jobs, tasks and schedules. Really runs the tasks; tests.batch_http serves it.

It refuses what the documented rules refuse (REST 2025-06-01), with the codes of Microsoft's "Batch status and error codes".
What it does not know: autoscale formulas, images, networks, quotas of cores; a test says what became of a pool's resize.
"""

from __future__ import annotations

import re
import secrets
import threading
from dataclasses import dataclass
from dataclasses import field
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from pathlib import Path
from typing import Any

import isodate

from tests import batch_nodes
from tests.azurite import Azurite
from tests.batch_nodes import Node
from tests.batch_nodes import Running
from tests.batch_nodes import TaskFailed

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TURN_S = 0.05
_MINUTE = timedelta(minutes=1)
_NOT_IN_A_MANAGER = ("multiInstanceSettings", "dependsOn", "exitConditions")


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(slots=True, eq=False)
class Pool:
    """A pool, as infra/ would have made it."""

    id: str
    nodes: list[Node]
    identities: set[str]
    slots: int = 1
    containers: bool = True
    resize_errors: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        machine = {"containerConfiguration": {"type": "dockerCompatible"}} if self.containers else {}
        return {
            "id": self.id, "state": "active", "allocationState": "steady", "vmSize": "standard_nd96isr_h100_v5", "enableAutoScale": True,
            "currentDedicatedNodes": len(self.nodes), "targetDedicatedNodes": len(self.nodes), "currentLowPriorityNodes": 0,
            "taskSlotsPerNode": self.slots, "virtualMachineConfiguration": {"nodeAgentSKUId": "batch.node.ubuntu 22.04", **machine},
            "resizeErrors": self.resize_errors,
            "identity": {"type": "UserAssigned", "userAssignedIdentities": [{"resourceId": each} for each in sorted(self.identities)]},
        }  # fmt: skip


@dataclass(slots=True, eq=False)
class Task:
    """A task and where it is."""

    spec: dict[str, Any]
    state: str = "active"
    exit_code: int | None = None
    failure: dict[str, str] | None = None
    retries: int = 0
    starts: int = 0
    node: Node | None = None
    running: Running | None = None
    unwanted: bool = False
    """Asked to end."""

    def body(self) -> dict[str, Any]:
        info: dict[str, Any] = {"retryCount": self.retries, "requeueCount": 0}
        if self.exit_code is not None:
            info["exitCode"] = self.exit_code
        if self.failure is not None:
            info["failureInfo"] = self.failure
        if self.state == "completed":
            info["result"] = "failure" if self.failure or self.exit_code else "success"
        where = {"nodeInfo": {"nodeId": self.node.id}} if self.node is not None else {}
        return {**self.spec, "state": self.state, "executionInfo": info, **where}


@dataclass(slots=True, eq=False)
class Job:
    """A job and its tasks."""

    spec: dict[str, Any]
    state: str = "active"
    reason: str | None = None
    tasks: dict[str, Task] = field(default_factory=dict)
    schedule: str | None = None

    @property
    def id(self) -> str:
        return str(self.spec["id"])

    def body(self) -> dict[str, Any]:
        info = {"startTime": "2026-11-26T00:00:00Z", "poolId": self.spec["poolInfo"]["poolId"]}
        return {**self.spec, "state": self.state, "executionInfo": {**info, **({"terminateReason": self.reason} if self.reason else {})}}


@dataclass(slots=True, eq=False)
class Schedule:
    """A schedule; time is the test's (Service.now)."""

    spec: dict[str, Any]
    next_run: datetime
    state: str = "active"
    count: int = 0
    recent: str | None = None

    def body(self) -> dict[str, Any]:
        recent = {"recentJob": {"id": self.recent}} if self.recent else {}
        return {**self.spec, "state": self.state, "executionInfo": {"nextRunTime": self.next_run.isoformat(), **recent}}


class Service:
    """All state, behind one lock. A thread runs tasks until `close`."""

    def __init__(self, folder: Path, azurite: Azurite, environment: dict[str, str]) -> None:
        self.folder, self.azurite, self.environment = folder, azurite, environment
        self.pools: dict[str, Pool] = {}
        self.jobs: dict[str, Job] = {}
        self.schedules: dict[str, Schedule] = {}
        self.token = secrets.token_hex(16)
        self.requests: list[tuple[str, str]] = []
        self.refuse: dict[tuple[str, str], Refused] = {}
        """By method and path: what to answer instead."""
        self.clock_ahead_s = 0.0
        self.max_active_jobs = 100
        self.now = datetime.now(UTC)
        self.lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batch-service", daemon=True)
        self._thread.start()

    def add_pool(self, name: str, *, nodes: int, identity: str, slots: int = 1) -> Pool:
        made = [Node(id=f"tvmps_{name}_{index}", slots=slots) for index in range(nodes)]
        pool = self.pools[name] = Pool(id=name, nodes=made, identities={identity}, slots=slots)
        return pool

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        for job in self.jobs.values():
            for task in job.tasks.values():
                if task.running is not None:
                    task.running.vanish()

    def preempt(self, task: Task) -> None:
        """Its node is taken away: whatever runs there is gone, and goes back into the queue."""
        with self.lock:
            assert task.node is not None
            node = task.node
            node.state = "preempted"
            for job in self.jobs.values():
                for each in job.tasks.values():
                    if each.node is node and each.running is not None:
                        each.running.vanish()
                        node.tasks.remove(each.running)
                        each.running, each.node, each.state = None, None, "active"  # not counted as a retry

    def restore(self) -> None:
        """Azure has machines again."""
        with self.lock:
            for pool in self.pools.values():
                for node in pool.nodes:
                    node.state = "idle"

    def advance(self, by: timedelta) -> None:
        """Let time pass for the schedules."""
        with self.lock:
            self.now += by
            for name, schedule in self.schedules.items():
                self._fire(name, schedule)

    def _fire(self, name: str, schedule: Schedule) -> None:
        when = schedule.spec["schedule"]
        if schedule.state != "active" or self.now < schedule.next_run:
            return
        if when.get("doNotRunAfter") and self.now > datetime.fromisoformat(when["doNotRunAfter"]):
            schedule.state = "completed"
            return
        busy = any(job.schedule == name and job.state != "completed" for job in self.jobs.values())
        window = isodate.parse_duration(when["startWindow"]) if when.get("startWindow") else timedelta()
        interval = isodate.parse_duration(when["recurrenceInterval"])
        if busy and self.now <= schedule.next_run + window:
            return  # it waits, within its window
        while schedule.next_run <= self.now:
            schedule.next_run += interval
        if not busy:
            schedule.count += 1
            schedule.recent = f"{name}:job-{schedule.count}"
            self._new_job({"id": schedule.recent, **schedule.spec["jobSpecification"]}, schedule=name)

    # what tasks do

    def _run(self) -> None:
        while not self._ended.wait(_TURN_S):
            with self.lock:
                for job in list(self.jobs.values()):
                    self._turn(job)

    def _turn(self, job: Job) -> None:
        for task in job.tasks.values():
            code = task.running.poll() if task.running is not None else None
            if task.running is not None and code is not None:
                self._take_end(job, task, code)
            elif task.state == "active" and job.state == "active":
                self._start(job, task)
            elif (job.state == "terminating" or task.unwanted) and task.running is not None:
                task.running.ask_to_end()
        manager = job.tasks.get(job.spec.get("jobManagerTask", {}).get("id", ""))
        if job.state == "active" and manager is not None and manager.state == "completed" and manager.spec.get("killJobOnCompletion", True):
            self._terminate(job, "JobManagerTaskCompleted")
        ended = all(task.state == "completed" for task in job.tasks.values())
        if job.state == "active" and ended and job.spec.get("onAllTasksComplete") == "terminatejob":
            self._terminate(job, "AllTasksCompleted")
        if job.state == "terminating" and not any(task.running for task in job.tasks.values()):
            job.state = "completed"

    def _start(self, job: Job, task: Task) -> None:
        pool = self.pools.get(job.spec["poolInfo"]["poolId"])
        node = next((each for each in pool.nodes if each.has_room), None) if pool is not None else None
        if pool is None or node is None:
            return
        task.starts += 1
        folder = self.folder / job.id.replace(":", "-") / task.spec["id"]
        variables = {
            "AZ_BATCH_JOB_ID": job.id, "AZ_BATCH_TASK_ID": task.spec["id"], "AZ_BATCH_POOL_ID": pool.id, "AZ_BATCH_NODE_ID": node.id,
            "AZ_BATCH_TASK_DIR": str(folder), "AZ_BATCH_TASK_WORKING_DIR": str(folder / "wd"),
        }  # fmt: skip
        try:
            task.running = batch_nodes.start(task.spec, folder, {**self.environment, **variables}, pool.identities, self.azurite)
        except TaskFailed as error:
            task.state, task.failure = "completed", {"category": "usererror", "code": error.args[0], "message": error.args[1]}
            return
        task.node, task.state = node, "running"
        node.tasks.append(task.running)

    def _take_end(self, job: Job, task: Task, code: int) -> None:
        running, node = task.running, task.node
        assert running is not None
        assert node is not None
        node.tasks.remove(running)
        task.running, task.exit_code = None, code if code >= 0 else 128 - code
        pool = self.pools[job.spec["poolInfo"]["poolId"]]
        batch_nodes.upload(task.spec, running.folder, task.exit_code, pool.identities, self.azurite)
        limit = task.spec.get("constraints", {}).get("maxTaskRetryCount", 0)
        if task.exit_code and job.state == "active" and not task.unwanted and (limit == -1 or task.retries < limit):
            task.retries += 1
            task.state = "active"
            return
        task.state = "completed"
        if task.exit_code:
            task.failure = {"category": "usererror", "code": "FailureExitCode", "message": "The task exited with an exit code of failure"}

    def _terminate(self, job: Job, reason: str) -> None:
        job.state, job.reason = "terminating", reason

    # what requests do

    def _new_job(self, spec: dict[str, Any], schedule: str | None = None) -> Job:
        job = self.jobs[spec["id"].lower()] = Job(spec=spec, schedule=schedule)
        manager = spec.get("jobManagerTask")
        if manager is not None:
            job.tasks[manager["id"]] = Task(spec=manager)
        elif spec.get("onAllTasksComplete") == "terminatejob":
            self._terminate(job, "AllTasksCompleted")  # without tasks all of them are complete
        return job

    def create_job(self, spec: dict[str, Any]) -> None:
        check_id(spec)
        check_job(spec, self.pools)
        if spec["id"].lower() in self.jobs:
            raise Refused(409, "JobExists", "The specified job already exists.")
        active = [job for job in self.jobs.values() if job.state == "active"] + list(self.schedules)
        if len(active) >= self.max_active_jobs:
            raise Refused(
                409, "ActiveJobAndScheduleQuotaReached", "The active job and job schedule quota for the account has been reached."
            )
        self._new_job(spec)

    def job(self, name: str) -> Job:
        found = self.jobs.get(name.lower())
        if found is None:
            raise Refused(404, "JobNotFound", "The specified job does not exist.")
        return found

    def add_tasks(self, name: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        job = self.job(name)
        if job.state != "active":
            raise Refused(409, "JobCompleted", "The specified job is already in a completed state.")
        if len(tasks) > 100:
            raise Refused(400, "InvalidRequestBody", "A collection has at most 100 tasks.")
        results = []
        for spec in tasks:
            try:
                check_id(spec)
                check_task(spec, self.pools.get(job.spec["poolInfo"]["poolId"]))
                if spec["id"] in job.tasks:
                    raise Refused(409, "TaskExists", "The specified task already exists.")
            except Refused as error:
                said = {"code": error.code, "message": {"lang": "en-us", "value": error.message}}
                results.append({"status": "clienterror", "taskId": spec["id"], "error": said})
                continue
            job.tasks[spec["id"]] = Task(spec=spec)
            results.append({"status": "success", "taskId": spec["id"]})
        return results

    def terminate_job(self, name: str, reason: str) -> None:
        job = self.job(name)
        if job.state != "active":
            raise Refused(409, "JobCompleted", "The specified job is already in a completed state.")
        self._terminate(job, reason)

    def terminate_task(self, name: str, task_id: str) -> None:
        task = self.job(name).tasks.get(task_id)
        if task is None:
            raise Refused(404, "TaskNotFound", "The specified task does not exist.")
        if task.state == "completed":
            raise Refused(409, "TaskCompleted", "The task has already completed.")
        task.unwanted = True
        if task.running is None:
            task.state = "completed"

    def create_schedule(self, spec: dict[str, Any]) -> None:
        check_id(spec)
        if "jobManagerTask" not in spec["jobSpecification"]:
            raise Refused(400, "InvalidPropertyValue", "A job schedule's jobs need a job manager task to have any tasks.")
        check_job(spec["jobSpecification"], self.pools)
        for name in ("recurrenceInterval", "startWindow"):
            text = spec["schedule"].get(name)
            if text is not None and isodate.parse_duration(text) < _MINUTE:
                raise Refused(400, "InvalidPropertyValue", f"{name} must be at least one minute.")
        if spec["id"].lower() in self.schedules:
            raise Refused(409, "JobScheduleExists", "The specified job schedule already exists.")
        first = spec["schedule"].get("doNotRunUntil")
        self.schedules[spec["id"].lower()] = Schedule(spec=spec, next_run=datetime.fromisoformat(first) if first else self.now)
        self.advance(timedelta())

    def schedule(self, name: str) -> Schedule:
        found = self.schedules.get(name.lower())
        if found is None:
            raise Refused(404, "JobScheduleNotFound", "The specified job schedule does not exist.")
        return found

    def delete_schedule(self, name: str) -> None:
        self.schedule(name)
        del self.schedules[name.lower()]
        for key, job in list(self.jobs.items()):
            if job.schedule == name.lower() or job.schedule == name:
                for task in job.tasks.values():
                    if task.running is not None:
                        task.running.vanish()
                del self.jobs[key]


def check_id(spec: dict[str, Any]) -> None:
    if not _ID.fullmatch(spec.get("id", "")):
        raise Refused(400, "InvalidPropertyValue", f"id {spec.get('id')!r}: letters, digits, hyphens and underscores, at most 64.")


def check_job(spec: dict[str, Any], pools: dict[str, Pool]) -> None:
    """A pool that does not exist is no reason: its tasks then wait."""
    if "poolInfo" not in spec:
        raise Refused(400, "MissingRequiredProperty", "poolInfo")
    manager = spec.get("jobManagerTask")
    if manager is not None:
        check_id(manager)
        wrong = [name for name in _NOT_IN_A_MANAGER if name in manager]
        if wrong:
            raise Refused(400, "UnsupportedProperty", f"A job manager task has no {wrong[0]}.")
        check_task(manager, pools.get(spec["poolInfo"]["poolId"]))


def check_task(spec: dict[str, Any], pool: Pool | None) -> None:
    if not spec.get("commandLine"):
        raise Refused(400, "MissingRequiredProperty", "commandLine")
    if pool is not None and pool.containers != ("containerSettings" in spec):
        raise Refused(
            400, "InvalidPropertyValue", "containerSettings must be set where the pool has a containerConfiguration, and only there."
        )
    if pool is not None and spec.get("requiredSlots", 1) > pool.slots:
        raise Refused(400, "InvalidPropertyValue", "requiredSlots is greater than the pool's taskSlotsPerNode.")
    for file in spec.get("resourceFiles", []):
        if sum(name in file for name in ("httpUrl", "storageContainerUrl", "autoStorageContainerName")) != 1:
            raise Refused(
                400, "InvalidPropertyValue", "A resource file has exactly one of httpUrl, storageContainerUrl, autoStorageContainerName."
            )
    if spec.get("constraints", {}).get("maxTaskRetryCount", 0) < -1:
        raise Refused(400, "InvalidPropertyValue", "maxTaskRetryCount")
