"""An Order in, Azure Batch's requests out. Pure functions; jobs.cluster.batch_account sends them.

Two jobs for every run of ours. The driver's job is on a small pool on demand; its job-manager task is `tokenmill driver`, with
Dask's scheduler inside. The nodes' job, which the driver makes, is on the pool of ND nodes: one ordinary task a node, so that a
spot node that vanishes costs its own task alone, which Batch puts back into the queue. Pools are made by infra/, since only
Azure's resource manager can give a pool its identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from azure.batch import models

from jobs.drain import DRAIN_BEFORE
from jobs.drain import NO_DRAIN
from schemas.batch import ScheduleSpec
from schemas.batch import duration
from schemas.errors import JobError
from schemas.job import ClusterSpec

JOB_FILE = "job.json"
"""Its name in a task's working directory."""
METRICS = "metrics.json"
"""What a run came to, in the driver's working directory."""
DRIVER_TASK = "driver"
STAMP = "TOKENMILL_SUBMITTED"
"""The environment variable that tells a driver Order.stamp."""
_KEPT = timedelta(days=1)
"""A task's files on its node; what matters of them is uploaded when it ends."""
_DRIVER_RETRIES = 3
"""After the driver's process died. One that ended by itself left its exit code in storage, and ends again at once with the same."""
_NODE_RETRIES = 1
"""After a worker's process died. What Batch itself takes away (spot, a broken host) is put back into the queue and not counted. One
that found model or engine wrong does so again, minutes of an ND node later, and Batch knows no exit code after which it would not try."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """All that the requests of one run are made of."""

    cluster: ClusterSpec
    job_file: str
    """Web address of the job file; the nodes' identity may read it."""
    logs_container: str
    """Web address of the container that takes the logs."""
    logs_path: str
    """Folder in it."""
    stamp: str
    """When it was submitted. A job that was deleted and submitted again has its old id, and must not be taken for the old one."""
    drain_before: str = NO_DRAIN
    """Names the request to drain that lay in the output then. Of a younger one every start of the driver is to hear."""


def driver_job(order: Order, job_id: str) -> models.BatchJobCreateOptions:
    """The job of `tokenmill submit`. It is over when its driver is."""
    return models.BatchJobCreateOptions(
        id=job_id,
        pool_info=models.BatchPoolInfo(pool_id=order.cluster.driver_pool),
        constraints=models.BatchJobConstraints(max_wall_clock_time=_at_most(order)),
        job_manager_task=_manager(order, ["tokenmill", "driver", JOB_FILE], f"{order.logs_path}/{job_id}/{DRIVER_TASK}"),
    )


def job_schedule(order: Order, schedule_id: str, when: ScheduleSpec) -> models.BatchJobScheduleCreateOptions:
    """A driver's job at a fixed interval. One at a time: its next one waits, at most for the window."""
    command = ["tokenmill", "driver", JOB_FILE, "--schedule", schedule_id]
    return models.BatchJobScheduleCreateOptions(
        id=schedule_id,
        schedule=models.BatchJobScheduleConfiguration(
            do_not_run_until=when.first,
            do_not_run_after=when.until,
            start_window=None if when.window is None else duration(when.window),
            recurrence_interval=duration(when.every),
        ),
        job_specification=models.BatchJobSpecification(
            pool_info=models.BatchPoolInfo(pool_id=order.cluster.driver_pool),
            constraints=models.BatchJobConstraints(max_wall_clock_time=_at_most(order)),
            # The path cannot name the run's own job, which Batch names at its time: these are the latest run's. Drivers keep their own.
            job_manager_task=_manager(order, command, f"{order.logs_path}/{schedule_id}/{DRIVER_TASK}"),
        ),
    )


def nodes_job(order: Order, job_id: str) -> models.BatchJobCreateOptions:
    """The job of the nodes, without tasks yet. Were it to end when all are done from the start, it would end at once."""
    return models.BatchJobCreateOptions(
        id=job_id,
        pool_info=models.BatchPoolInfo(pool_id=order.cluster.worker_pool),
        constraints=models.BatchJobConstraints(max_wall_clock_time=_at_most(order)),
        all_tasks_complete_mode=models.BatchAllTasksCompleteMode.NO_ACTION,
    )


def node_tasks(order: Order, job_id: str, *, rendezvous: str, keys: str) -> list[models.BatchTaskCreateOptions]:
    """One `tokenmill worker` a node, named after its task: put back into the queue it has its name again, wherever it runs."""
    return [
        models.BatchTaskCreateOptions(
            id=task_id,
            command_line=_command(["tokenmill", "worker", JOB_FILE, "--rendezvous", rendezvous, "--keys", keys, "--name", task_id]),
            container_settings=_container(order, "--ipc host --ulimit memlock=-1 --ulimit nofile=1048576:1048576"),
            user_identity=_user(),
            environment_settings=_environment(order),
            resource_files=[_job_file(order)],
            output_files=[_logs(order, f"{order.logs_path}/{job_id}/{task_id}", "../std*.txt")],
            constraints=_constraints(order, _NODE_RETRIES),
            required_slots=1,
        )
        for task_id in (f"node-{number:04d}" for number in range(order.cluster.nodes or 0))
    ]


def end_with_tasks() -> models.BatchJobUpdateOptions:
    """Once its tasks are there: the nodes' job is over when they all are."""
    return models.BatchJobUpdateOptions(all_tasks_complete_mode=models.BatchAllTasksCompleteMode.TERMINATE_JOB)


def _manager(order: Order, command: list[str], logs: str) -> models.BatchJobManagerTask:
    own = {STAMP: order.stamp, DRAIN_BEFORE: order.drain_before}
    environment = [*_environment(order), *(models.EnvironmentSetting(name=name, value=value) for name, value in own.items())]
    return models.BatchJobManagerTask(
        id=DRIVER_TASK,
        command_line=_command(command),
        container_settings=_container(order, ""),
        user_identity=_user(),
        environment_settings=environment,
        resource_files=[_job_file(order)],
        output_files=[_logs(order, logs, "../std*.txt"), _logs(order, logs, METRICS.replace(".", "*."))],
        constraints=_constraints(order, _DRIVER_RETRIES),
        required_slots=1,
        kill_job_on_completion=True,  # nothing else is in its job; a schedule's next run waits for that
        run_exclusive=False,  # several drivers share a node
        allow_low_priority_node=False,
    )


def _at_most(order: Order) -> timedelta:
    return timedelta(hours=order.cluster.max_hours)


def _constraints(order: Order, retries: int) -> models.BatchTaskConstraints:
    return models.BatchTaskConstraints(max_wall_clock_time=_at_most(order), retention_time=_KEPT, max_task_retry_count=retries)


def _command(words: list[str]) -> str:
    """Batch runs no shell, and splits at blanks."""
    odd = [word for word in words if not word or any(character in word for character in " \t\n\"'\\$`")]
    if odd:
        raise JobError(f"{odd[0]!r} would be torn apart in a task's command line; use names without blanks, quotes and $")
    return " ".join(words)


def _user() -> models.UserIdentity:
    auto = models.AutoUserSpecification(scope=models.AutoUserScope.POOL, elevation_level=models.ElevationLevel.NON_ADMIN)
    return models.UserIdentity(auto_user=auto)


def _container(order: Order, more: str) -> models.BatchTaskContainerSettings:
    scratch = order.cluster.scratch
    # The host's network: Dask's peers reach a container under its machine's address. GPUs are passed by Batch itself.
    options = ["--network host", f"--volume {scratch}:{scratch}", more]
    return models.BatchTaskContainerSettings(
        image_name=str(order.cluster.image),
        container_run_options=" ".join(filter(None, options)),
        working_directory=models.ContainerWorkingDirectory.TASK_WORKING_DIRECTORY,
    )


def _environment(order: Order) -> list[models.EnvironmentSetting]:
    values = {
        "AZURE_CLIENT_ID": str(order.cluster.client_id),
        "AZURE_TOKEN_CREDENTIALS": "prod",  # a node has an identity and nobody's sign-in
        "PYTHONUNBUFFERED": "1",
        "TOKENMILL_CACHE": f"{order.cluster.scratch}/cache",
    }
    return [models.EnvironmentSetting(name=name, value=value) for name, value in values.items()]


def _identity(order: Order) -> models.BatchNodeIdentityReference:
    return models.BatchNodeIdentityReference(resource_id=order.cluster.identity)


def _job_file(order: Order) -> models.ResourceFile:
    return models.ResourceFile(http_url=order.job_file, file_path=JOB_FILE, identity_reference=_identity(order))


def _logs(order: Order, path: str, pattern: str) -> models.OutputFile:
    """Into a folder. The pattern has a wildcard, so that a file that a task did not come to write is no failure."""
    container = models.OutputFileBlobContainerDestination(
        path=path, container_url=order.logs_container, identity_reference=_identity(order)
    )
    return models.OutputFile(
        file_pattern=pattern,
        destination=models.OutputFileDestination(container=container),
        upload_options=models.OutputFileUploadConfiguration(upload_condition=models.OutputFileUploadCondition.TASK_COMPLETION),
    )
