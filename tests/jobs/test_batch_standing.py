"""How a run on Batch stands, and its cancel, at any time from submit on: what storage alone does not know yet, or any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import batch_run
from jobs.accept import accept
from jobs.accept import store
from jobs.batch_run import Latest
from jobs.batch_run import Outcome
from jobs.batch_standing import state_of
from jobs.batch_standing import wait_for_driver
from jobs.cli import main
from jobs.cluster import azure_batch
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import BatchJobState
from jobs.cluster.batch_advice import TaskState
from jobs.driver import Progress
from jobs.progress import Speed
from jobs.status import write_status
from pipeline import storage
from schemas import layout
from schemas.job import JobSpec
from tests.batch_http import Site
from tests.batch_service import Service
from tests.jobs.test_batch_account import account as account
from tests.jobs.test_batch_account import an_order
from tests.jobs.test_batch_account import service as service
from tests.jobs.test_batch_account import site as site

pytestmark = pytest.mark.batch
_CANCELLED = Outcome(exit_code=130, message="drained: cancelled before its driver began")


def say(out: str, endpoint: str, nodes_job: str | None = None) -> None:
    batch_run.store_latest(out, Latest(endpoint=endpoint, driver_job="night-1", stamp="s", nodes_job=nodes_job))


@pytest.fixture
def out(site: Site, account: BatchAccount, tmp_path: Path) -> str:
    """The output of a job that was just submitted: no plan, and no machine for its driver."""
    account.create_job(azure_batch.driver_job(an_order(site.endpoint), "night-1"))
    storage.use(None)
    say(str(tmp_path / "out"), site.endpoint)
    return str(tmp_path / "out")


@pytest.fixture
def begun(out: str, make_job: Callable[..., JobSpec], write_table: Callable[..., Path]) -> str:
    """The same, where an earlier run was drained."""
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(40)])
    store(accept(make_job(name="tickets")))
    speaks(out, "drained")
    return out


def speaks(out: str, state: str) -> None:
    write_status(out, Progress(state=state, total_units=3, total_rows=40, done_before=0, rows_before=0), Speed())  # type: ignore[arg-type]


def tokenmill(*words: str) -> str:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.output


def drain_is_asked(out: str) -> bool:
    return Path(out, layout.DRAIN).exists()


def test_from_submit_on_status_says_how_the_job_stands(out: str, service: Service) -> None:
    head = f"night-1: starting\nno plan is stored in {out} yet\n"
    assert tokenmill("status", out) == f"{head}job night-1 is allocating: its driver waits for a machine\n"
    service.jobs["night-1"].tasks["driver"].state = "running"
    assert tokenmill("status", out) == f"{head}job night-1 is starting: its driver has a machine, and has not asked for nodes yet\n"
    said = json.loads(tokenmill("status", out, "--json"))
    assert (said["state"], said["batch"]["state"], said["batch"]["job_id"]) == ("starting", "starting", "night-1")


def test_a_job_that_is_cancelled_before_its_driver_began_is_ended(out: str, service: Service) -> None:
    assert tokenmill("cancel", out) == "job night-1 is ended: its driver had not begun\n"
    assert service.jobs["night-1"].state in ("terminating", "completed")
    assert drain_is_asked(out)  # by a driver that was just about to begin
    assert batch_run.read_outcome(out, "night-1", "s") == _CANCELLED  # so a later one ends at once
    over = "job night-1 is over (exit code 130): drained: cancelled before its driver began\n"
    assert tokenmill("status", out).endswith(over)
    assert tokenmill("cancel", out) == f"nothing to cancel: {over}"


def test_without_a_sign_in_both_say_what_is_known_and_why_not_more(out: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDENTITY_HEADER", "wrong")
    said = tokenmill("status", out)
    assert said.startswith("night-1: starting\n")
    assert "Azure Batch could not be asked how job night-1 stands. looking at job night-1: no token for Azure Batch was to be had" in said
    said = tokenmill("cancel", out)
    assert said.startswith("asked to drain: a driver that is at work, or starts later, heeds that\n")
    assert "Azure Batch could not be asked about job night-1. looking at job night-1: no token for Azure Batch was to be had" in said
    assert (drain_is_asked(out), batch_run.read_outcome(out, "night-1", "s")) == (True, _CANCELLED)
    assert service.jobs["night-1"].state == "active"


def test_what_an_earlier_run_said_last_is_not_taken_for_the_word_of_one_that_waits(begun: str, service: Service) -> None:
    lines = tokenmill("status", begun).splitlines()
    assert lines[0].startswith("tickets (")
    assert lines[0].endswith("): starting")
    assert lines[1:] == [
        f"0 of 40 rows and 0 of 3 units are committed in {begun}",
        "job night-1 is allocating: its driver waits for a machine",
    ]
    assert tokenmill("cancel", begun) == "job night-1 is ended: its driver had not begun\n"


def test_while_batch_starts_a_driver_again_a_cancel_waits_for_it_in_storage(
    begun: str, service: Service, site: Site, account: BatchAccount
) -> None:
    account.create_job(azure_batch.nodes_job(an_order(site.endpoint), "night-1-nodes"))
    storage.use(None)
    say(begun, site.endpoint, "night-1-nodes")
    service.jobs["night-1"].tasks["driver"].retries = 1
    assert tokenmill("status", begun).endswith("job night-1 is restarting: its driver is lost, and Batch starts it again\n")
    assert tokenmill("cancel", begun) == "asked to drain; `tokenmill status` shows when it has\n"
    assert (drain_is_asked(begun), batch_run.read_outcome(begun, "night-1", "s")) == (True, None)
    assert [job.state for job in service.jobs.values()] == ["active", "active"]  # the nodes finish what is in flight


def test_nodes_of_a_driver_that_will_not_come_back_are_ended(begun: str, service: Service, site: Site, account: BatchAccount) -> None:
    order = an_order(site.endpoint)
    account.create_job(azure_batch.nodes_job(order, "night-1-nodes"))
    account.add_tasks("night-1-nodes", azure_batch.node_tasks(order, "night-1-nodes", rendezvous="az://results/r", keys="az://k/night-1"))
    storage.use(None)
    say(begun, site.endpoint, "night-1-nodes")
    driver = service.jobs["night-1"].tasks["driver"]
    driver.state = "running"
    assert tokenmill("status", begun).endswith("job night-1 is running; of its 2 nodes 0 run (job night-1-nodes)\n")
    driver.state, driver.exit_code = "completed", 137
    service.jobs["night-1"].state = "completed"
    assert "job night-1 is over and its driver said nothing: it ended with exit code 137; " in tokenmill("status", begun)
    assert tokenmill("cancel", begun) == "nothing to cancel: the job is drained\njob night-1-nodes of its nodes is ended\n"
    assert service.jobs["night-1-nodes"].state in ("terminating", "completed")


def test_a_driver_that_somebody_started_by_hand_drains_and_ends_its_nodes_itself(begun: str, service: Service, site: Site) -> None:
    BatchAccount(site.endpoint).create_job(azure_batch.nodes_job(an_order(site.endpoint), "night-9-nodes"))
    storage.use(None)
    batch_run.store_latest(begun, Latest(endpoint=site.endpoint, driver_job="night-9", stamp="", nodes_job="night-9-nodes"))
    speaks(begun, "running")
    assert tokenmill("status", begun).endswith("its driver is not on Azure Batch; of its 0 nodes 0 run (job night-9-nodes)\n")
    assert tokenmill("cancel", begun) == "asked to drain; `tokenmill status` shows when it has\n"
    assert (drain_is_asked(begun), service.jobs["night-9-nodes"].state) == (True, "active")


def test_a_run_on_another_cluster_is_cancelled_whatever_ran_on_batch_before(begun: str) -> None:
    batch_run.store_outcome(begun, "night-1", "s", Outcome(exit_code=130, message="drained"))
    assert tokenmill("cancel", begun) == "nothing to cancel: the job is drained\n"
    speaks(begun, "running")
    assert tokenmill("cancel", begun) == "asked to drain; `tokenmill status` shows when it has\n"
    assert drain_is_asked(begun)


def test_a_damaged_record_of_the_submit_keeps_nobody_from_cancelling(begun: str) -> None:
    speaks(begun, "running")
    Path(begun, layout.BATCH, "latest.json").write_text("{}")
    said = tokenmill("cancel", begun).splitlines()
    assert said[0] == "asked to drain; `tokenmill status` shows when it has"
    assert "latest.json is damaged" in said[1]
    assert drain_is_asked(begun)


def test_whoever_watches_hears_each_change_until_the_driver_speaks(out: str, service: Service, site: Site) -> None:
    heard: list[str] = []

    def hear(line: str) -> None:
        heard.append(line)
        service.jobs["night-1"].tasks["driver"].state = "running"
        if len(heard) == 2:
            say(out, site.endpoint, "night-1-nodes")

    wait_for_driver(out, hear, wait_s=0)
    assert [line.split(":")[0] for line in heard] == ["job night-1 is allocating", "job night-1 is starting"]


def test_whoever_watches_hears_the_end_of_a_driver_that_never_spoke(out: str) -> None:
    batch_run.store_outcome(out, "night-1", "s", Outcome(exit_code=2, message="model: there is no folder /m"))
    heard: list[str] = []
    wait_for_driver(out, heard.append)
    assert heard == ["job night-1 is over (exit code 2): model: there is no folder /m"]


@pytest.mark.parametrize(
    ("job", "task", "retries", "has_nodes", "expected"),
    [
        (None, None, 0, True, "over"),
        ("terminating", "running", 0, True, "over"),
        ("active", "completed", 0, True, "over"),
        ("active", None, 0, False, "allocating"),
        ("active", "active", 0, False, "allocating"),
        ("active", "active", 1, False, "restarting"),
        ("active", "preparing", 0, True, "restarting"),
        ("active", "running", 0, False, "starting"),
        ("active", "running", 1, True, "running"),
    ],
)
def test_a_runs_state_follows_from_job_and_task(job: str | None, task: str | None, retries: int, has_nodes: bool, expected: str) -> None:
    found = None if job is None else BatchJobState(id="night-1", state=job, reason=None)
    driver = None
    if task is not None:
        driver = TaskState(id="driver", state=task, exit_code=None, failure=None, retries=retries, requeues=0, node=None)
    assert state_of(found, driver, has_nodes=has_nodes) == expected
