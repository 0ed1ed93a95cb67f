"""Whole runs on a Batch service of the tests' own, over https, on Azurite: drivers, schedulers and nodes are real processes."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs import scheduled
from jobs.verify import verify
from pipeline import rendezvous
from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.batch_http import Site
from tests.batch_http import serving
from tests.batch_service import Job
from tests.batch_service import Task
from tests.commands import PATIENCE_S
from tests.commands import Command
from tests.jobs.batch_jobs import CLIENT_ID
from tests.jobs.batch_jobs import IDENTITY

pytestmark = [pytest.mark.batch, pytest.mark.azurite, pytest.mark.long]

_ROWS = 320
_ENGINE = {"decode_tokens_per_s": 100, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5, "lengths": "max"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Stores, a service with two pools, and a job file."""

    site: Site
    azurite: Azurite
    folder: Path
    inputs: str
    out: str
    keys: str
    job: dict[str, Any]

    def put(self, name: str, first: int, rows: int = _ROWS) -> None:
        """An input object of that many rows."""
        buffer = io.BytesIO()
        pq.write_table(
            pa.table({"n": list(range(first, first + rows)), "prompt": [f"row {n}" for n in range(first, first + rows)]}), buffer
        )
        with self.azurite.client() as client, client.get_blob_client(self.inputs, name) as blob:
            blob.upload_blob(buffer.getvalue(), overwrite=True)

    def run(self, *arguments: str, **environment: str) -> Command:
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(self.job))
        return Command(self.folder / "commands", *arguments, environment={**self.site.environment, **environment})

    def job_of(self, ending: str) -> Job | None:
        return next((job for name, job in self.site.service.jobs.items() if name.endswith(ending)), None)

    def task(self, ending: str, name: str) -> Task:
        job = self.job_of(ending)
        assert job is not None
        return job.tasks[name]

    def log(self, job: Job, task: str) -> str:
        folder = self.site.service.folder / job.id.replace(":", "-") / task
        return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("std*.txt")))

    def all_logs(self) -> str:
        jobs = list(self.site.service.jobs.values())
        return "\n".join(f"== {job.id}/{task}\n{self.log(job, task)[-4000:]}" for job in jobs for task in job.tasks)

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 2 * PATIENCE_S
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"waited in vain until {what}:\n{self.all_logs()}")
            time.sleep(0.1)

    def committed(self) -> int:
        return sum("/part-" in f"/{name}" for name in self.azurite.names(self.out))


@pytest.fixture
def place(azurite: Azurite, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv(CONNECTION_STRING, azurite.connection_string)
    inputs, out, keys = (azurite.new_container(name) for name in ("inputs", "out", "keys"))
    with serving(tmp_path / "batch", azurite) as site:
        site.service.add_pool("driver", nodes=1, identity=IDENTITY, slots=4)
        site.service.add_pool("nd", nodes=2, identity=IDENTITY)
        job = {
            "name": "night",
            "model": str(tiny_model),
            "input": {"uri": f"az://{inputs}/*.parquet", "prompt": "prompt"},
            "output": {"uri": f"az://{out}/run"},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": _ENGINE},
            "cluster": {
                "kind": "azure-batch", "endpoint": site.endpoint, "driver_pool": "driver", "worker_pool": "nd", "nodes": 2,
                "image": "mill.azurecr.io/tokenmill:1.0", "identity": IDENTITY, "client_id": CLIENT_ID, "keys": f"az://{keys}",
                "scratch": str(tmp_path / "scratch"),
            },
        }  # fmt: skip
        yield Place(site=site, azurite=azurite, folder=tmp_path, inputs=inputs, out=out, keys=keys, job=job)


def proven(out_uri: str, rows: int) -> None:
    verdict = verify(out_uri)
    assert (verdict.problems, verdict.complete, verdict.rows_proven) == ([], True, rows)


def at_work(place: Place) -> Command:
    """A submitted job of which two units are committed."""
    place.put("a.parquet", 0)
    command = place.run("submit", "../job.yaml")
    assert command.end() == 0, command.log
    place.wait_for("two units are committed", lambda: place.committed() >= 2)
    return command


def test_a_submitted_job_runs_on_two_nodes_to_its_end_and_leaves_nothing_behind(place: Place) -> None:
    place.put("a.parquet", 0)
    command = place.run("submit", "../job.yaml", "--wait")
    assert command.end() == 0, command.log
    assert "job night-" in command.log
    proven(f"az://{place.out}/run", _ROWS)
    place.wait_for("both jobs are over", lambda: all(job.state == "completed" for job in place.site.service.jobs.values()))
    nodes = place.job_of("-nodes")
    assert nodes is not None
    assert (len(place.site.service.jobs), nodes.reason) == (2, "tokenmill")
    assert place.azurite.names(place.keys) == []  # taken away
    with place.azurite.client() as client, client.get_container_client(place.out) as container:
        assert not any(b"PRIVATE KEY" in container.download_blob(name).readall() for name in place.azurite.names(place.out))
    logs = [name for name in place.azurite.names(place.out) if "/batch/logs/" in name]
    place.wait_for(
        "metrics and logs are uploaded", lambda: any(name.endswith("driver/metrics.json") for name in place.azurite.names(place.out))
    )
    said = place.run("logs", f"az://{place.out}/run")
    assert said.end() == 0, said.log
    assert "scheduler at tls://" in said.log
    assert "== stdout.txt of driver" in said.log, logs
    again = place.run("submit", "../job.yaml", "--wait")  # complete: finds that, and needs no nodes
    assert again.end() == 0, again.log
    proven(f"az://{place.out}/run", _ROWS)
    assert len(place.site.service.jobs) == 3


def test_a_taken_node_and_a_killed_driver_come_back_and_no_row_is_lost(place: Place) -> None:
    place.job["engine"]["options"] = {**_ENGINE, "decode_tokens_per_s": 25}  # some 25 s on two nodes
    command = at_work(place)
    # A spot node vanishes: its task goes back into the queue, and runs again once there is a machine.
    taken = place.task("-nodes", "node-0000")
    place.site.service.preempt(taken)
    assert (taken.state, taken.retries) == ("active", 0)
    place.site.service.restore()
    place.wait_for("the node's task runs again", lambda: taken.state == "running" and taken.starts == 2)
    # The driver's process is killed, and the scheduler inside with it: Batch starts it again.
    driver = place.task("night-" + command.log.split("job night-")[1].split()[0], "driver")
    before = place.committed()
    assert driver.running is not None
    driver.running.vanish()
    place.wait_for("the driver is over", lambda: driver.state == "completed")
    assert (driver.exit_code, driver.starts, driver.retries) == (0, 2, 1)
    assert before < 20  # there was something left to do
    proven(f"az://{place.out}/run", _ROWS)
    entry = rendezvous.look_up(f"az://{place.out}/run/_tokenmill/rendezvous")
    assert entry is not None
    assert entry.number == 2  # the second scheduler's, which replaced the first one's
    assert place.job_of("-nodes-2") is None  # the same nodes went on, and the one that stayed kept its engine
    assert place.task("-nodes", "node-0001").starts == 1
    said = place.run("logs", f"az://{place.out}/run", "--task", "node-0001")
    assert said.end() == 0, said.log
    assert said.log.count("is ready after") == 1
    assert said.log.count("joined tls://") == 2


def test_a_replica_on_both_nodes_comes_back_when_one_of_them_is_taken(place: Place) -> None:
    place.job["engine"]["options"] = {**_ENGINE, "decode_tokens_per_s": 50, "nnodes": 2}
    command = at_work(place)
    taken = place.task("-nodes", "node-0000")
    place.site.service.preempt(taken)
    place.site.service.restore()
    driver = place.task("night-" + command.log.split("job night-")[1].split()[0], "driver")
    place.wait_for("the driver is over", lambda: driver.state == "completed")
    assert driver.exit_code == 0
    proven(f"az://{place.out}/run", _ROWS)
    seats = {name.split("/")[-1] for name in place.azurite.names(place.out) if "/groups-" in name}
    assert seats >= {f"{group:08d}-{rank}.json" for group in (1, 2) for rank in (0, 1)}


def test_a_cancelled_job_drains_is_not_started_again_and_goes_on_when_submitted_again(place: Place) -> None:
    place.job["engine"]["options"] = {**_ENGINE, "decode_tokens_per_s": 12}
    place.put("a.parquet", 0)
    command = place.run("submit", "../job.yaml", "--wait")
    place.wait_for("a unit is committed", lambda: place.committed() >= 1)
    twice = place.run("submit", "../job.yaml")
    assert twice.end() == 2
    assert "is running already and writes to" in twice.log
    cancel = place.run("cancel", f"az://{place.out}/run")
    assert cancel.end() == 0, cancel.log
    assert command.end() == 130, command.log
    driver = place.task("night-" + command.log.split("job night-")[1].split()[0], "driver")
    place.wait_for("Batch has done with the driver", lambda: driver.state == "completed")
    assert (driver.exit_code, driver.retries) == (130, 3)  # Batch tries again what is not 0; each time it ended at once
    assert place.committed() < 20
    place.job["engine"]["options"] = _ENGINE
    again = place.run("submit", "../job.yaml", "--wait")
    assert again.end() == 0, place.all_logs()
    proven(f"az://{place.out}/run", _ROWS)


def test_a_job_that_is_cancelled_while_its_driver_waits_for_a_machine_is_never_begun(place: Place) -> None:
    """Also by somebody who has the store and no way to ask Batch."""
    (machine,) = place.site.service.pools["driver"].nodes
    machine.state = "preempted"
    place.put("a.parquet", 0, 40)
    command = place.run("submit", "../job.yaml")
    assert command.end() == 0, command.log
    status = place.run("status", f"az://{place.out}/run")
    assert status.end() == 0, status.log
    assert "is allocating: its driver waits for a machine" in status.log
    cancel = place.run("cancel", f"az://{place.out}/run", IDENTITY_HEADER="wrong", AZURE_TOKEN_CREDENTIALS="prod")
    assert cancel.end() == 0, cancel.log
    assert "Azure Batch could not be asked" in cancel.log
    place.site.service.restore()
    driver = place.task("night-" + command.log.split("job night-")[1].split()[0], "driver")
    place.wait_for("Batch has done with the driver", lambda: driver.state == "completed")
    assert (driver.exit_code, place.job_of("-nodes"), place.committed()) == (130, None, 0)
    again = place.run("submit", "../job.yaml", "--wait")
    assert again.end() == 0, place.all_logs()
    proven(f"az://{place.out}/run", 40)


def test_each_run_of_a_schedule_takes_only_what_no_run_before_it_took(place: Place) -> None:
    service = place.site.service
    place.job["schedule"] = {"every": "1d"}
    place.job["engine"]["options"] = {**_ENGINE, "decode_tokens_per_s": 1e5}
    place.put("a.parquet", 0, 40)
    created = place.run("schedule", "create", "../job.yaml")
    assert created.end() == 0, created.log
    assert "one run at a time, at a fixed interval in UTC" in created.log

    def over(number: int) -> bool:
        job = place.job_of(f":job-{number}")
        return job is not None and job.state == "completed"

    place.wait_for("the first run is over", lambda: over(1))
    (first,) = scheduled.runs(f"az://{place.out}/run")
    proven(f"az://{place.out}/run/{first.folder}", 40)
    place.put("b.parquet", 1000, 30)  # new
    place.put("a.parquet", 500, 20)  # the same name, written again: another etag
    service.advance(timedelta(days=1))
    place.wait_for("the second run is over", lambda: over(2))
    service.advance(timedelta(days=1))
    place.wait_for("the third run is over", lambda: over(3))
    shown = place.run("schedule", "show", "../job.yaml")
    assert shown.end() == 0, shown.log
    lines = shown.log.splitlines()
    assert [" complete, 40 of 40 rows" in lines[1], " complete, 50 of 50 rows" in lines[2], "nothing was new" in lines[3]] == [True] * 3, (
        shown.log
    )
    proven(f"az://{place.out}/run/{lines[2].split(': ')[0]}", 50)
    said = place.run("logs", f"az://{place.out}/run/{first.folder}")
    assert said.end() == 0, said.log
    assert "complete: 40 of 40 rows" in said.log
    for folder in (first.folder, lines[2].split(": ")[0]):
        kept = [name for name in place.azurite.names(place.out) if name.startswith(f"run/{folder}/")]
        assert any(name.endswith("/driver/metrics.json") for name in kept), kept
    for verb, state in (("pause", "disabled"), ("resume", "active")):
        done = place.run("schedule", verb, "../job.yaml")
        assert done.end() == 0, done.log
        assert [each.state for each in service.schedules.values()] == [state]
    listed = place.run("schedule", "list", "../job.yaml")
    assert listed.end() == 0, listed.log
    assert "night-" in listed.log
    deleted = place.run("schedule", "delete", "../job.yaml")
    assert deleted.end() == 0, deleted.log
    assert (service.schedules, json.dumps(sorted(service.jobs))) == (
        {},
        json.dumps([name for name in sorted(service.jobs) if "-nodes" in name]),
    )
