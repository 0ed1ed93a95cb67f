"""Runs of a schedule: a folder by date for each, with only the objects that no other run's plan has. From storage alone.

An object is its URI and its etag: rewritten it is new, and one that came late, or carries an old date, is not lost, since no
time is compared anywhere. Batch runs one job of a schedule at a time, so that plans are made one after the other.
"""

from __future__ import annotations

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime

from jobs.accept import load_plan
from jobs.plan import Taken
from jobs.plan import untaken
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec

_RECORD = re.compile(r"run-(.+)\.json")
_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRun:
    """One run of a schedule."""

    run_id: str
    """Of the Batch job that it is, so that a driver that comes back goes on with it."""
    folder: str
    """Its output, below the schedule's."""


def folder_name(now: datetime, used: set[str]) -> str:
    """A date that sorts, to the second, in UTC; a run that finds it used is the second one then."""
    name = f"{now.astimezone(UTC):%Y-%m-%dT%H%M%SZ}"
    return name if name not in used else next(found for number in range(2, 10_000) if (found := f"{name}-{number}") not in used)


def runs(base_uri: str) -> list[ScheduledRun]:
    """Every run that was begun, by date. Raises JobError."""
    place = storage.join(storage.absolute(base_uri), layout.SCHEDULED)
    try:
        names = [name for name in storage.list_names(place) if _RECORD.fullmatch(name)]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda name: ScheduledRun(**json.loads(storage.read_bytes(storage.join(place, name)))), names))
    except OSError as error:
        raise JobError(f"output.uri: cannot read the runs in {place}: {error}") from error
    except (ValueError, TypeError) as error:
        raise JobError(f"{place} holds a damaged record of a run: {error}; remove it") from None
    return sorted(found, key=lambda run: run.folder)


def begin(base_uri: str, run_id: str, now: datetime) -> ScheduledRun:
    """The run's record, made now or when it was begun first. Raises JobError."""
    known = runs(base_uri)
    mine = next((run for run in known if run.run_id == run_id), None)
    if mine is not None:
        return mine
    run = ScheduledRun(run_id=run_id, folder=folder_name(now, {each.folder for each in known}))
    where = storage.join(storage.absolute(base_uri), layout.SCHEDULED, f"run-{run_id}.json")
    with contextlib.suppress(FileExistsError):  # this driver's other start was quicker
        storage.create_once(where, json.dumps({"run_id": run.run_id, "folder": run.folder}).encode())
    return next(each for each in runs(base_uri) if each.run_id == run_id)


def taken_by_others(base_uri: str, run_id: str) -> Taken:
    """All objects in the plans of the schedule's other runs. Raises JobError."""
    others = [run for run in runs(base_uri) if run.run_id != run_id]
    with ThreadPoolExecutor(_THREADS) as pool:
        plans = list(pool.map(lambda run: load_plan(storage.join(storage.absolute(base_uri), run.folder)), others))
    return frozenset(item for plan in plans if plan is not None for item in plan.objects.items())


def job_of(job: JobSpec, run: ScheduledRun) -> JobSpec:
    """The schedule's job as this run's."""
    output = job.output.model_copy(update={"uri": storage.join(job.output.uri, run.folder)})
    return job.model_copy(update={"output": output, "schedule": None})


def anything_new(job: JobSpec, taken: Taken) -> bool:
    """Whether there is an object that no other run has. Raises JobError where the input is not there."""
    return bool(untaken(job.input, taken))
