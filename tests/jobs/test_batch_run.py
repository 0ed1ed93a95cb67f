"""Names and small objects of a run on Azure Batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import batch_run
from jobs.batch_run import Latest
from jobs.batch_run import Outcome
from pipeline import storage
from schemas.errors import JobError
from schemas.job import parse_job
from tests.jobs.batch_jobs import batch_job

pytestmark = pytest.mark.batch


def test_a_jobs_id_follows_from_name_and_output_and_fits_batch_with_all_that_is_added() -> None:
    job = parse_job(batch_job(name="a" * 30 + "." + "b" * 30))
    found = batch_run.job_id_of(job)
    assert found == batch_run.job_id_of(job)
    assert found.startswith("a" * 30 + "-b-")
    assert len(f"{found}-job-99999-nodes-99") <= 64  # what a schedule and a driver make of it
    assert batch_run.job_id_of(parse_job(batch_job())) != batch_run.job_id_of(parse_job(batch_job(output={"uri": "az://results/day"})))


def test_the_job_file_reads_back_as_the_job_and_holds_no_more_than_was_said() -> None:
    job = parse_job(batch_job())
    data = json.loads(batch_run.job_file_data(job))
    assert data == batch_job()
    assert parse_job(data) == job


def test_the_orders_addresses_are_the_accounts_own() -> None:
    job = parse_job(batch_job())
    storage.use(job.storage)
    order = batch_run.order_for(job, "now")
    name = batch_run.job_file(job).rpartition("/")[2]
    assert order.job_file == f"https://millstore.blob.core.windows.net/results/night/_tokenmill/batch/{name}"
    assert (order.logs_container, order.logs_path) == ("https://millstore.blob.core.windows.net/results", "night/_tokenmill/batch/logs")


def test_a_submits_later_drivers_know_when_its_first_one_began(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert [batch_run.first_began(out, "night", "s1", now) for now in (100.0, 160.5)] == [100.0, 100.0]
    assert batch_run.first_began(out, "night", "s2", 170.0) == 170.0


def test_jobs_that_say_different_things_have_different_files() -> None:
    job, changed = parse_job(batch_job()), parse_job(batch_job(sampling={"max_tokens": 7}))
    assert batch_run.job_id_of(job) == batch_run.job_id_of(changed)
    assert batch_run.job_file(job) == batch_run.job_file(parse_job(batch_job()))
    assert batch_run.job_file(job) != batch_run.job_file(changed)


def test_how_a_driver_ended_is_its_first_word_and_one_submits_alone(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert batch_run.read_outcome(out, "night-1", "s1") is None
    batch_run.store_outcome(out, "night-1", "s1", Outcome(exit_code=130, message="drained"))
    batch_run.store_outcome(out, "night-1", "s1", Outcome(exit_code=0, message="complete"))
    assert batch_run.read_outcome(out, "night-1", "s1") == Outcome(exit_code=130, message="drained")
    assert batch_run.read_outcome(out, "night-1", "s2") is None  # the same id, deleted and submitted again
    Path(batch_run.outcome_uri(out, "night-1", "s1")).write_text("{}")
    with pytest.raises(JobError, match="is damaged"):
        batch_run.read_outcome(out, "night-1", "s1")


def test_logs_know_which_jobs_were_the_latest(tmp_path: Path) -> None:
    out = str(tmp_path)
    with pytest.raises(JobError, match="was not submitted to Azure Batch"):
        batch_run.read_latest(out)
    latest = Latest(endpoint="https://mill.westeurope.batch.azure.com", driver_job="night-1:job-7", stamp="s")
    batch_run.store_latest(out, latest)
    assert batch_run.read_latest(out) == latest
    (tmp_path / "wd").mkdir()
    for name in ("stdout.txt", "wd/metrics.json"):
        (tmp_path / name).write_text("hello")
    batch_run.keep_prints(str(tmp_path), out, latest.driver_job, "driver")
    assert storage.list_names(batch_run.logs_folder(out, latest.driver_job, "driver")) == {"stdout.txt": 5, "metrics.json": 5}


def test_a_token_goes_to_no_host_that_an_output_names_and_batch_does_not_have(tmp_path: Path) -> None:
    batch_run.store_latest(str(tmp_path), Latest(endpoint="https://mill.example.com", driver_job="night-1", stamp="s"))
    with pytest.raises(JobError, match=r"latest\.json is damaged"):
        batch_run.read_latest(str(tmp_path))
