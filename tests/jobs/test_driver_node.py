"""`tokenmill driver` outside of Azure, its scheduler that is replaced, and a worker on a Batch node that Azure takes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import api
from jobs.driver_node import BatchTask
from jobs.driver_node import _run
from jobs.driver_node import batch_task
from jobs.scheduler import SchedulerSpec
from jobs.scheduler import SchedulerThread
from jobs.verify import verify
from pipeline import rendezvous
from pipeline import tls
from pipeline.eviction import ENVIRONMENT_VARIABLE
from schemas.errors import JobError
from schemas.job import parse_job
from tests.commands import Command
from tests.pipeline.test_eviction import Service
from tests.pipeline.test_eviction import service as service


def test_a_task_of_batch_is_known_by_its_environment() -> None:
    assert batch_task({}) is None
    found = batch_task({"AZ_BATCH_JOB_ID": "night-1:job-7", "TOKENMILL_SUBMITTED": "20261126T160000Z"})
    assert found == BatchTask(batch_id="night-1:job-7", stamp="20261126T160000Z")
    assert found is not None
    assert found.job_id == "night-1-job-7"


def test_a_driver_that_batch_starts_again_counts_from_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def died(*_: Any, since: float, **__: Any) -> None:
        counted.append(since)
        raise OSError("the machine went away")

    monkeypatch.setattr(api, "run", died)
    job = parse_job({"model": "m", "input": {"uri": "in", "prompt": "p"}, "output": {"uri": str(tmp_path / "out")}})
    for stamp in ("first", "first", "second"):
        with pytest.raises(OSError, match="went away"):
            _run(job, frozenset(), BatchTask(batch_id="night", stamp=stamp), api.make_cluster)
    assert counted[0] == counted[1] < counted[2]


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path, write_table: Callable[..., Path]) -> dict[str, Any]:
    """A job of kind address, with its rendezvous and keys."""
    tls.make_keys(tmp_path / "keys", valid_days=1)
    write_table([{"prompt": f"row {number}"} for number in range(64)])
    job: dict[str, Any] = {
        "model": str(tiny_model),
        "input": {"uri": str(tmp_path / "in" / "*.parquet"), "prompt": "prompt"},
        "output": {"uri": str(tmp_path / "out")},
        "sampling": {"max_tokens": 4},
        "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1e4}},
        "cluster": {"kind": "address", "rendezvous": str(tmp_path / "place"), "keys": str(tmp_path / "keys")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return job


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def make(*arguments: str, environment: dict[str, str] | None = None) -> Command:
        started.append(Command(tmp_path, *arguments, environment=environment))
        return started[-1]

    yield make
    for command in started:
        command.kill()


@pytest.mark.chaos
def test_outside_of_azure_a_driver_is_scheduler_and_run_in_one(site: dict[str, Any], start: Callable[..., Command], tmp_path: Path) -> None:
    as_batch = {"AZ_BATCH_JOB_ID": "night-1", "TOKENMILL_SUBMITTED": "20261126T160000Z"}
    driver = start("driver", "job.yaml", "--listen", "tls://127.0.0.1:0", environment=as_batch)
    worker = start("worker", "job.yaml", "--replicas", "1")
    assert driver.end() == 0, driver.log
    assert "scheduler at tls://127.0.0.1:" in driver.log
    worker.send(signal.SIGTERM)
    assert worker.end() == 0, worker.log
    assert verify(str(tmp_path / "out")).complete
    again = start("driver", "job.yaml", environment=as_batch)  # the same task of Batch, started again
    assert again.end() == 0, again.log
    assert "this driver has ended before, with exit code 0" in again.log


@pytest.mark.chaos
def test_a_scheduler_in_a_thread_says_when_a_newer_one_took_its_place(tmp_path: Path) -> None:
    keys, place, said = str(tls.make_keys(tmp_path / "keys", valid_days=1).folder), str(tmp_path / "place"), []
    replaced = threading.Event()
    spec = SchedulerSpec(listen="tls://127.0.0.1:0", keys=keys, rendezvous=place, dashboard=None)
    thread = SchedulerThread(spec, said.append, replaced.set)
    try:
        mine = rendezvous.look_up(place)
        assert mine is not None
        assert mine.number == 1
        assert not replaced.is_set()
        rendezvous.publish(place, "tls://10.0.0.9:8786", now=0.0)
        assert replaced.wait(60)
    finally:
        thread.close()
    assert said[-1] == "scheduler 2 at tls://10.0.0.9:8786 took this one's place: ending"


@pytest.mark.chaos
def test_a_driver_whose_place_was_taken_ends_at_once_and_leaves_the_job_to_the_newer_one(
    site: dict[str, Any], start: Callable[..., Command], tmp_path: Path
) -> None:
    driver = start("driver", "job.yaml", "--listen", "tls://127.0.0.1:0")
    driver.wait_for("waiting for workers")
    rendezvous.publish(str(tmp_path / "place"), "tls://10.0.0.9:8786", now=0.0)
    assert driver.end() == 1
    assert "a newer scheduler has the rendezvous; ending" in driver.log
    assert not (tmp_path / "out" / "_tokenmill" / "batch").exists()  # it did not say how the job ended


@pytest.mark.chaos
def test_a_scheduler_that_cannot_publish_itself_is_told_to_whoever_wants_one(tmp_path: Path) -> None:
    keys = str(tls.make_keys(tmp_path / "keys", valid_days=1).folder)
    (tmp_path / "place").write_text("a file")
    spec = SchedulerSpec(listen="tls://127.0.0.1:0", keys=keys, rendezvous=str(tmp_path / "place"), dashboard=None)
    with pytest.raises(JobError, match="cannot publish in"):
        SchedulerThread(spec, print, print)


@pytest.mark.chaos
def test_on_a_node_of_batch_a_worker_waits_for_its_end_after_azures_notice(
    site: dict[str, Any], start: Callable[..., Command], service: Service
) -> None:
    """Ending by itself, its task would count as done, and nobody would run it again."""
    notice = {ENVIRONMENT_VARIABLE: f"http://127.0.0.1:{service.server_port}", "AZ_BATCH_TASK_ID": "node-0000"}
    worker = start("worker", "job.yaml", "--replicas", "1", environment=notice)
    worker.wait_for("waiting for Azure to take the machine, so that Batch runs this task elsewhere")
    assert "was evicted and handed its units back" in worker.log or "leaving" in worker.log
    assert worker.family()
