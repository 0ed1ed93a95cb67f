"""Where a run on Azure Batch has its things, beside its output: the job file as sent, which jobs it has, how its driver ended.

Names and small objects only. Keys are elsewhere (pipeline.handover).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from pathlib import Path

from jobs.cluster.azure_batch import METRICS
from jobs.cluster.azure_batch import Order
from jobs.drain import NO_DRAIN
from jobs.status import LATEST
from pipeline import storage
from schemas import layout
from schemas.batch import check_endpoint
from schemas.errors import JobError
from schemas.job import JobSpec

_NAME_CHARACTERS = 32
_DIGEST_CHARACTERS = 16
STREAMS = ("stdout.txt", "stderr.txt")
"""Where Batch puts what a task prints."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latest:
    """The Batch jobs of an output's latest run."""

    endpoint: str
    driver_job: str
    stamp: str
    """See Order.stamp."""
    nodes_job: str | None = None
    """None until the driver has asked for nodes; that is just before it begins to speak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a driver ended by itself."""

    exit_code: int
    message: str


def job_id_of(job: JobSpec) -> str:
    """The same for the same name and output, so that a second submit meets the first. At most 41 of Batch's 64 characters."""
    name = job.name.replace(".", "-")[:_NAME_CHARACTERS]
    return f"{name}-{hashlib.sha256(storage.absolute(job.output.uri).encode()).hexdigest()[:8]}"


def folder(out_uri: str) -> str:
    return storage.join(storage.absolute(out_uri), layout.BATCH)


def rendezvous(out_uri: str) -> str:
    return storage.join(storage.absolute(out_uri), layout.RENDEZVOUS)


def job_file_data(job: JobSpec) -> bytes:
    """The job as driver and nodes read it. Names secrets at most, see schemas/storage.py."""
    return json.dumps(job.model_dump(by_alias=True, exclude_unset=True, mode="json"), indent=1).encode()


def job_file(job: JobSpec) -> str:
    """Where it lies, named by what it says: another job's file leaves that of one that runs as it is."""
    digest = hashlib.sha256(job_file_data(job)).hexdigest()[:_DIGEST_CHARACTERS]
    return storage.join(folder(job.output.uri), f"job-{digest}.json")


def stamp(now: float) -> str:
    """Of Unix seconds, for Order.stamp."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}"


def order_for(job: JobSpec, stamp: str, drain_before: str = NO_DRAIN) -> Order:
    """What the requests of a run are made of. Raises JobError."""
    out = storage.absolute(job.output.uri)
    scheme, _, rest = folder(out).partition("://")
    container, _, path = rest.partition("/")
    return Order(
        cluster=job.cluster,
        job_file=storage.web_address(job_file(job)),
        logs_container=storage.web_address(f"{scheme}://{container}"),
        logs_path=f"{path}/logs",
        stamp=stamp,
        drain_before=drain_before,
    )


def plain(batch_id: str) -> str:
    """A Batch job's id without the colon that those of schedules have."""
    return batch_id.replace(":", "-")


def logs_folder(out_uri: str, batch_id: str, task_id: str) -> str:
    return storage.join(folder(out_uri), "logs", plain(batch_id), task_id)


def keep_prints(task_folder: str, out_uri: str, batch_id: str, task_id: str) -> None:
    """Put what a task printed so far, and its metrics, beside its run's output; what cannot be stored, or is not there, stops nothing."""
    for path in (*(Path(task_folder, name) for name in STREAMS), Path(task_folder, "wd", METRICS)):
        with contextlib.suppress(OSError):
            storage.replace(storage.join(logs_folder(out_uri, batch_id, task_id), path.name), path.read_bytes())


def store_job_file(job: JobSpec) -> None:
    """Raises JobError."""
    where = job_file(job)
    try:
        storage.replace(where, job_file_data(job))
    except OSError as error:
        raise JobError(f"output.uri: cannot write {where}: {error}") from error


def store_left_out(out_uri: str, stamp: str, nodes: list[str]) -> None:
    """Which nodes a preflight found slow, for drivers of the same submit that come after this one. Raises OSError."""
    storage.replace(_left_out(out_uri, stamp), json.dumps(nodes).encode())


def read_left_out(out_uri: str, stamp: str) -> list[str] | None:
    """None where no preflight has ended. Raises OSError."""
    try:
        return [str(node) for node in json.loads(storage.read_bytes(_left_out(out_uri, stamp)))]
    except FileNotFoundError:
        return None


def _left_out(out_uri: str, stamp: str) -> str:
    return storage.join(folder(out_uri), f"preflight-{stamp or 'node'}.json")


def first_began(out_uri: str, driver_job: str, stamp: str, now: float) -> float:
    """When the first driver of a submit began, in Unix seconds: now, where this is the first one. Raises OSError."""
    where = storage.join(folder(out_uri), f"{driver_job}-{stamp}.began.json")
    try:
        storage.create_once(where, json.dumps(now).encode())
        return now
    except FileExistsError:
        return float(json.loads(storage.read_bytes(where)))


def store_latest(out_uri: str, latest: Latest) -> None:
    """For `tokenmill status`, `cancel` and `logs`; that it cannot be stored stops nothing."""
    with contextlib.suppress(OSError):
        storage.replace(storage.join(storage.absolute(out_uri), LATEST), json.dumps(asdict(latest)).encode())


def read_latest(out_uri: str) -> Latest:
    """Raises JobError."""
    where = storage.join(storage.absolute(out_uri), LATEST)
    try:
        latest = Latest(**json.loads(storage.read_bytes(where)))
        check_endpoint(str(latest.endpoint))  # whoever asks it sends a token there, and whoever may write results may write this
        return latest
    except FileNotFoundError:
        raise JobError(f"{out_uri} was not submitted to Azure Batch: there is no {where}; give the folder that the job writes to") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise JobError(f"{where} is damaged: {error}; `tokenmill submit` writes it anew") from None


def outcome_uri(out_uri: str, driver_job: str, stamp: str) -> str:
    return storage.join(folder(out_uri), f"{driver_job}-{stamp}.outcome.json")


def read_outcome(out_uri: str, driver_job: str, stamp: str) -> Outcome | None:
    """None while the driver has not ended by itself."""
    where = outcome_uri(out_uri, driver_job, stamp)
    try:
        return Outcome(**json.loads(storage.read_bytes(where)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise JobError(f"{where} is damaged: {error}; remove it") from None


def store_outcome(out_uri: str, driver_job: str, stamp: str, outcome: Outcome) -> None:
    """The first word counts."""
    with contextlib.suppress(FileExistsError):
        storage.create_once(outcome_uri(out_uri, driver_job, stamp), json.dumps(asdict(outcome)).encode())
