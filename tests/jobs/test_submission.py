"""Submits and schedules, refused and not, on Azurite and the tests' own Batch service, none of whose tasks has a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs import batch_run
from jobs import batch_standing
from jobs.cluster.azure_batch import DRIVER_TASK
from jobs.cluster.batch_account import BatchAccount
from jobs.drain import DRAIN_BEFORE
from jobs.drain import NO_DRAIN
from jobs.drain import DrainWatch
from jobs.drain import ask_to_drain
from jobs.drain import drain_request
from jobs.schedule import create
from jobs.submission import submit
from pipeline import storage
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from tests import batch_nodes
from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.batch_http import Site
from tests.batch_http import serving
from tests.jobs.batch_jobs import IDENTITY
from tests.jobs.batch_jobs import batch_job

pytestmark = [pytest.mark.batch, pytest.mark.azurite]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A service and a store."""

    site: Site
    azurite: Azurite
    out: str
    account: BatchAccount

    def job(self, **sections: Any) -> JobSpec:
        return parse_job(batch_job(output={"uri": self.out}, storage=None, cluster={"endpoint": self.site.endpoint}, **sections))

    def driver(self, job_id: str) -> dict[str, Any]:
        """Its task, as it was sent."""
        return self.site.service.jobs[job_id.lower()].tasks[DRIVER_TASK].spec

    def job_file(self, task: dict[str, Any]) -> bytes:
        """What a task gets whenever it is started."""
        (file,) = task["resourceFiles"]
        container, name = batch_nodes.blob_of(file["httpUrl"], self.azurite)
        return storage.read_bytes(f"az://{container}/{name}")


@pytest.fixture
def place(azurite: Azurite, container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving(tmp_path / "batch", azurite) as site:
        for name, value in {**site.environment, "AZURE_TOKEN_CREDENTIALS": "prod"}.items():
            monkeypatch.setenv(name, value)
        site.service.add_pool("driver", nodes=0, identity=IDENTITY, slots=4)
        site.service.add_pool("nd-h100", nodes=0, identity=IDENTITY)
        assert site.environment[CONNECTION_STRING] == azurite.connection_string
        yield Place(site=site, azurite=azurite, out=f"az://{container}/night", account=BatchAccount(site.endpoint))


def test_a_submit_that_is_refused_leaves_the_running_jobs_file_as_it_was(place: Place) -> None:
    submitted = submit(place.job(), place.account)
    before = place.job_file(place.driver(submitted.job_id))
    assert before == batch_run.job_file_data(place.job())
    with pytest.raises(JobError, match="is running already"):
        submit(place.job(sampling={"max_tokens": 7}), place.account)
    assert place.job_file(place.driver(submitted.job_id)) == before


def test_a_schedule_that_is_refused_leaves_the_file_of_the_one_that_is_there_as_it_was(place: Place) -> None:
    job = place.job(schedule={"every": "1d"})
    create(job, place.account)
    (schedule,) = place.site.service.schedules.values()
    task = schedule.spec["jobSpecification"]["jobManagerTask"]
    with pytest.raises(JobError, match="schedule delete"):
        create(place.job(schedule={"every": "2d"}), place.account)
    assert place.job_file(task) == batch_run.job_file_data(job)


def test_a_driver_hears_cancels_since_its_submit_and_none_of_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(job_id: str) -> str:
        return next(str(each["value"]) for each in place.driver(job_id)["environmentSettings"] if each["name"] == DRAIN_BEFORE)

    first = submit(place.job(), place.account)
    assert told(first.job_id) == NO_DRAIN
    assert batch_standing.cancel(place.out, place.account) == [f"job {first.job_id} is ended: its driver had not begun"]
    second = submit(place.job(), place.account)
    assert second.job_id == f"{first.job_id}-2"
    monkeypatch.setenv(DRAIN_BEFORE, told(second.job_id))
    assert told(second.job_id) == drain_request(place.out)
    assert not DrainWatch(place.out).asked()
    ask_to_drain(place.out)
    assert DrainWatch(place.out).asked()  # although it begins only now
