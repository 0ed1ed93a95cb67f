"""Every request to Azure Batch, whole, as the real SDK builds it, against files in tests/golden/batch.

`TOKENMILL_GOLDEN=write pytest ...` writes them anew; look at the difference then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import batch_run
from jobs.cli import main
from jobs.cluster.azure_batch import node_tasks
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import recorded
from jobs.schedule import create
from jobs.schedule import requests_of as schedule_requests
from jobs.submission import requests_of
from jobs.submission import submit
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from tests.jobs.batch_jobs import batch_job

pytestmark = pytest.mark.batch
_GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "batch"
_NOW = 1_796_000_000.0
_ENDPOINT = "https://mill.westeurope.batch.azure.com"


def check(name: str, found: Any) -> None:
    path = _GOLDEN / f"{name}.json"
    text = json.dumps(found, indent=1) + "\n"
    if os.environ.get("TOKENMILL_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_what_submit_and_its_driver_send() -> None:
    check("submit", requests_of(parse_job(batch_job()), _NOW))


def test_what_schedule_create_sends() -> None:
    when = {"every": "1d", "first": "2026-12-01T02:30:00Z", "until": "2027-12-01T00:00:00Z", "window": "2h"}
    check("schedule", schedule_requests(parse_job(batch_job(schedule=when)), _NOW))


def look_at_a_schedule(account: BatchAccount) -> None:
    """The recorder's answer is empty, and so none of ours."""
    with pytest.raises(JobError, match="is a schedule, but none that"):
        account.schedule("night-1")


_CALLS: dict[str, Callable[[BatchAccount], Any]] = {
    "end_job": lambda account: account.end_job("night-1-nodes"),
    "end_task": lambda account: account.end_task("night-1-nodes", "node-0003"),
    "pause_schedule": lambda account: account.pause_schedule("night-1"),
    "resume_schedule": lambda account: account.resume_schedule("night-1"),
    "delete_schedule": lambda account: account.delete_schedule("night-1"),
    "looks": lambda account: [
        account.pool("nd-h100"),
        account.job("night-1"),
        account.tasks("night-1"),
        account.schedules(),
        look_at_a_schedule(account),
        account.schedule_jobs("night-1"),
        account.read_file("night-1", "driver", "stdout.txt"),
    ],
}


@pytest.mark.parametrize("name", _CALLS)
def test_what_short_orders_send(name: str) -> None:
    requests = recorded(_ENDPOINT, _CALLS[name])
    check(
        name, requests if name == "looks" else requests[:1]
    )  # of the others the SDK looks afterwards whether it has happened, as often as there is time


def test_a_thousand_nodes_go_in_hundreds() -> None:
    job = parse_job(batch_job(cluster={"nodes": 1000}))
    sent = requests_of(job, _NOW)["sent_by_driver"]
    counts = [len(request["body"]["value"]) for request in sent if "addtaskcollection" in request["url"]]
    assert counts == [100] * 10
    ids = [task["id"] for request in sent if "addtaskcollection" in request["url"] for task in request["body"]["value"]]
    assert (ids[0], ids[-1], len(set(ids))) == ("node-0000", "node-0999", 1000)


def test_no_key_and_no_signature_is_in_any_request() -> None:
    text = (_GOLDEN / "submit.json").read_text() + (_GOLDEN / "schedule.json").read_text()
    assert not any(word in text for word in ("sig=", "AccountKey", "BEGIN", "node.key", "password", "Authorization"))


def test_every_task_has_the_identity_and_none_is_a_multi_instance_one() -> None:
    sent = requests_of(parse_job(batch_job()), _NOW)
    manager = sent["sent_by_submit"][0]["body"]["jobManagerTask"]
    for task in [manager, *sent["sent_by_driver"][1]["body"]["value"]]:
        files = [*task["resourceFiles"], *(each["destination"]["container"] for each in task["outputFiles"])]
        assert all("identityReference" in file for file in files)
        assert "multiInstanceSettings" not in task
        assert len(task["resourceFiles"]) == 1  # the job file


def test_a_name_that_a_command_line_would_tear_apart_is_refused() -> None:
    job = parse_job(batch_job(output={"uri": "abfss://results@millstore.dfs.core.windows.net/night"}))
    order = batch_run.order_for(job, "now")
    with pytest.raises(JobError, match="torn apart"):
        node_tasks(order, "j", rendezvous="az://results/two words", keys="az://k")


@pytest.mark.parametrize("ask", [submit, create, lambda job: requests_of(job, _NOW), lambda job: schedule_requests(job, _NOW)])
def test_an_output_that_a_drivers_command_line_would_tear_apart_is_refused_before_anything_is_stored(ask: Callable[[JobSpec], Any]) -> None:
    """Found by the driver, it would fail every night."""
    job = parse_job(batch_job(output={"uri": "az://results/two words"}, schedule={"every": "1d"}))
    with pytest.raises(JobError, match="torn apart"):  # without a store or a service in reach
        ask(job)


def test_dry_run_prints_the_requests_and_sends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(batch_job()))
    done = CliRunner().invoke(main, ["submit", str(path), "--dry-run"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert [list(said), len(said["sent_by_submit"]), len(said["sent_by_driver"])] == [["stored", "sent_by_submit", "sent_by_driver"], 1, 3]


def test_submit_stores_the_earlier_outputs_that_its_flags_name(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(batch_job()))
    done = CliRunner().invoke(main, ["submit", str(path), "--dry-run", "--reuse", "az://results/last", "--reuse", "az://results/older"])
    assert done.exit_code == 0, done.output
    ((_, stored),) = json.loads(done.stdout)["stored"].items()
    assert stored["reuse"] == ["az://results/last", "az://results/older"]
    refused = CliRunner().invoke(main, ["submit", str(path), "--dry-run", "--reuse", "last"])  # no node reaches it
    assert (refused.exit_code, "reuse" in refused.output) == (2, True)


def test_the_wrong_kind_is_refused_with_the_right_command(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: m\ninput: {uri: a, prompt: b}\noutput: {uri: c}\n")
    for command, said in (("submit", "`tokenmill run` runs this job"), ("driver", "Use `tokenmill run`")):
        refused = CliRunner().invoke(main, [command, str(path)])
        assert refused.exit_code == 2
        assert said in refused.output
    path.write_text(json.dumps(batch_job()))
    refused = CliRunner().invoke(main, ["schedule", "create", str(path)])
    assert refused.exit_code == 2
    assert "the job file has no such section" in refused.output
