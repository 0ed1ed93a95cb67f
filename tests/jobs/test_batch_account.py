"""What Azure Batch refuses, over real https with real tokens: the user hears the cause and the next step, with exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import batch_run
from jobs.batch_run import Outcome
from jobs.batch_run import order_for
from jobs.cli import main
from jobs.cluster import azure_batch
from jobs.cluster.azure_batch import Order
from jobs.cluster.batch_account import BatchAccount
from jobs.cluster.batch_account import BatchJobState
from jobs.cluster.batch_account import BatchSilent
from jobs.cluster.batch_advice import PoolState
from jobs.cluster.batch_advice import TaskState
from jobs.cluster.batch_advice import ended_words
from jobs.cluster.batch_advice import pool_problem
from jobs.cluster.batch_advice import resize_problems
from jobs.cluster.batch_nodes import ask_for_nodes
from jobs.cluster.batch_nodes import create_numbered
from jobs.cluster.batch_nodes import hopeless
from jobs.cluster.batch_nodes import news
from jobs.cluster.batch_nodes import why_they_wait
from jobs.submission import Submitted
from jobs.submission import check_pools
from jobs.submission import follow
from pipeline import storage
from schemas.batch import ScheduleSpec
from schemas.errors import EXIT_WRONG_JOB
from schemas.errors import JobError
from schemas.job import parse_job
from tests.azurite import Azurite
from tests.batch_http import Site
from tests.batch_http import serving
from tests.batch_service import Refused
from tests.batch_service import Service
from tests.commands import wait_until
from tests.jobs.batch_jobs import IDENTITY
from tests.jobs.batch_jobs import batch_job

pytestmark = pytest.mark.batch
_NOBODY = Azurite(host="127.0.0.1", port=9, account="acct", key="", pid=0)
"""No task runs here, so that no store is needed."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with serving(tmp_path / "batch", _NOBODY) as found:
        for name, value in {**found.environment, "AZURE_TOKEN_CREDENTIALS": "prod"}.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def service(site: Site) -> Service:
    return site.service


@pytest.fixture
def account(site: Site) -> BatchAccount:
    return BatchAccount(site.endpoint)


def an_order(endpoint: str = "https://mill.westeurope.batch.azure.com", **cluster: Any) -> Order:
    job = parse_job(batch_job(cluster={"endpoint": endpoint, **cluster}))
    storage.use(job.storage)
    return order_for(job, "20261126T160000Z")


def said(call: Callable[[], object]) -> str:
    with pytest.raises(JobError) as refusal:
        call()
    assert refusal.value.exit_code == EXIT_WRONG_JOB
    return str(refusal.value)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "AuthenticationFailed", "sign in again (az login)"),
        (403, "PermissionDenied", "give the identity the role Azure Batch Job Submitter"),
        (403, "SomethingNew", "give the identity the role Azure Batch Job Submitter"),
        (404, "AccountNotFound", "check cluster.endpoint"),
        (409, "ActiveJobAndScheduleQuotaReached", "ask for more under Quotas"),
        (400, "InvalidPropertyValue", "--dry-run"),
        (409, "JobBeingDeleted", "try again in a minute"),
    ],
)
def test_a_refusal_comes_with_its_cause_and_the_next_step(
    account: BatchAccount, service: Service, status: int, code: str, expected: str
) -> None:
    service.refuse["POST", "/jobs"] = Refused(status, code, "the service's own words")
    text = said(lambda: account.create_job(azure_batch.driver_job(an_order(), "night-1")))
    assert text.startswith(f"creating job night-1: Azure Batch said {code}: the service's own words. What to do: ")
    assert expected in text


def test_a_service_that_is_busy_or_away_is_told_from_one_that_refuses(site: Site, service: Service) -> None:
    """A driver is started again after the one, and not after the other."""
    from azure.batch import BatchClient
    from azure.identity import DefaultAzureCredential

    account = BatchAccount(site.endpoint, BatchClient(site.endpoint, DefaultAzureCredential(), retry_total=0))
    service.refuse["GET", "/pools/driver"] = Refused(503, "ServerBusy", "The server is busy.")
    with pytest.raises(BatchSilent, match="try again in a minute"):
        account.pool("driver")
    service.refuse["GET", "/pools/driver"] = Refused(403, "PermissionDenied", "no")
    with pytest.raises(JobError) as refused:
        account.pool("driver")
    assert not isinstance(refused.value, BatchSilent)


def test_nodes_that_cannot_be_asked_for_leave_no_job_behind(account: BatchAccount, service: Service) -> None:
    service.refuse["POST", "/jobs/night-1-nodes/addtaskcollection"] = Refused(400, "InvalidPropertyValue", "no")
    text = said(lambda: ask_for_nodes(account, an_order(), "night-1-nodes", rendezvous="az://results/r", keys="az://k/night-1"))
    assert text.startswith("adding 2 tasks to job night-1-nodes: ")
    assert service.jobs["night-1-nodes"].state in ("terminating", "completed")


@pytest.mark.parametrize(("off_s", "words"), [(-3600.0, "60 minutes ahead of"), (3600.0, "60 minutes behind")])
def test_a_clock_that_is_off_is_named_as_the_cause(account: BatchAccount, service: Service, off_s: float, words: str) -> None:
    service.clock_ahead_s = off_s
    service.refuse["GET", "/pools/driver"] = Refused(401, "AuthenticationFailed", "Server failed to authenticate the request.")
    text = said(lambda: account.pool("driver"))
    assert f"This machine's clock is {words} the service's" in text
    assert "timedatectl" in text


def test_without_a_token_the_user_is_told_to_sign_in(account: BatchAccount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDENTITY_HEADER", "wrong")
    text = said(lambda: BatchAccount(account.endpoint).pool("driver"))
    assert "no token for Azure Batch was to be had" in text
    assert "az login" in text


def test_an_account_that_does_not_answer_is_named(site: Site) -> None:
    from azure.batch import BatchClient
    from azure.identity import DefaultAzureCredential

    dead = "https://127.0.0.1:9"
    text = said(lambda: BatchAccount(dead, BatchClient(dead, DefaultAzureCredential(), retry_total=0)).pool("driver"))
    assert "127.0.0.1 does not answer" in text
    assert "Check cluster.endpoint" in text


def test_a_job_that_is_there_is_met_and_one_that_is_over_gets_a_follower(account: BatchAccount, service: Service) -> None:
    order = an_order()

    def create(name: str) -> bool:
        return account.create_job(azure_batch.nodes_job(order, name))

    assert create_numbered(account, "night-1", create) == ("night-1", True)
    assert create_numbered(account, "night-1", create) == ("night-1", False)
    service.jobs["night-1"].state = "completed"
    assert create_numbered(account, "night-1", create) == ("night-1-2", True)
    assert account.job("night-9") is None


def test_the_quota_of_active_jobs_is_no_job_that_exists(account: BatchAccount, service: Service) -> None:
    service.max_active_jobs = 0
    text = said(lambda: account.create_job(azure_batch.nodes_job(an_order(), "night-1")))
    assert "ActiveJobAndScheduleQuotaReached" in text


def test_nodes_are_asked_for_once_however_often_the_driver_starts(account: BatchAccount, service: Service) -> None:
    order = an_order(nodes=3)
    places = {"rendezvous": "az://results/r", "keys": "az://k/night-1"}
    for _ in range(2):
        assert ask_for_nodes(account, order, "night-1-nodes", **places) == "night-1-nodes"
    job = service.jobs["night-1-nodes"]
    assert (sorted(job.tasks), job.state) == (["node-0000", "node-0001", "node-0002"], "active")
    assert job.spec["onAllTasksComplete"] == "terminatejob"
    assert [task.state for task in account.tasks("night-1-nodes")] == ["active"] * 3
    account.end_job("night-1-nodes")
    account.end_job("night-1-nodes")  # over, or gone: nothing happens
    account.end_job("night-2-nodes")


def test_a_worker_that_ends_by_itself_is_started_once_more_and_no_oftener(account: BatchAccount, service: Service) -> None:
    """A model or an engine that it finds wrong, it finds wrong again, minutes of an ND node later."""
    service.add_pool("nd-h100", nodes=1, identity=IDENTITY)
    order = an_order(nodes=1)
    account.create_job(azure_batch.nodes_job(order, "night-1-nodes"))
    (task,) = azure_batch.node_tasks(order, "night-1-nodes", rendezvous="az://results/r", keys="az://k/night-1")
    task.command_line, task.resource_files, task.output_files = "sh -c 'exit 2'", [], []
    account.add_tasks("night-1-nodes", [task])
    node = service.jobs["night-1-nodes"].tasks["node-0000"]
    wait_until(lambda: node.state == "completed", "the end of its task")
    assert (node.starts, node.exit_code) == (2, 2)


def test_a_job_that_should_end_with_its_tasks_would_end_at_once_if_it_said_so_before_it_has_any(
    account: BatchAccount, service: Service
) -> None:
    """Batch's rule, and why there is a PATCH."""
    job = azure_batch.nodes_job(an_order(), "night-1")
    job.all_tasks_complete_mode = "terminatejob"
    assert account.create_job(job)
    assert service.jobs["night-1"].state in ("terminating", "completed")


def test_pools_are_looked_at_before_anything_is_sent(account: BatchAccount, service: Service, site: Site) -> None:
    job = parse_job(batch_job(cluster={"endpoint": site.endpoint}))
    assert "cluster.driver_pool: pool driver does not exist" in said(lambda: check_pools(account, job))
    service.add_pool("driver", nodes=1, identity=IDENTITY, slots=4)
    pool = service.add_pool("nd-h100", nodes=0, identity=IDENTITY)
    assert check_pools(account, job) == []
    pool.resize_errors = [{"code": "AllocationFailed", "message": "Allocation failed."}]
    (note,) = check_pools(account, job)
    assert note.startswith("pool nd-h100 (standard_nd96isr_h100_v5) has 0 of 0 nodes: AllocationFailed: ")
    pool.slots = 2
    assert "runs 2 tasks a node, expected 1" in said(lambda: check_pools(account, job))
    pool.identities = {"/subscriptions/other"}
    assert "does not have the identity" in said(lambda: check_pools(account, job))


_POOL = PoolState(
    id="nd", state="active", vm_size="nd96", autoscale=False, target_nodes=4, current_nodes=1, slots_per_node=1, containers=True,
    identities=(IDENTITY,), errors=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("AccountCoreQuotaReached", "ask for more under Quotas on the Batch account's page"),
        ("AccountSpotCoreQuotaReached", "spot cores of this series under Quotas on the subscription's page"),
        ("AllocationFailed", "spot nodes are free capacity"),
        ("AllocationTimedOut", "Batch goes on asking"),
        ("ResizeStopped", "az batch pool resize"),
        ("NotYetKnown", "see the pool's page"),
    ],
)
def test_why_nodes_do_not_come_is_explained(code: str, expected: str) -> None:
    (problem,) = resize_problems(replace(_POOL, errors=((code, "said so"),)))
    assert problem.startswith(f"pool nd (nd96) has 1 of 4 nodes: {code}: said so. What to do: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"state": "deleting"}, "is deleting, expected active"),
        ({"containers": False}, "runs no containers"),
        ({"target_nodes": 0}, "has no nodes and does not scale by itself"),
        ({"identities": ()}, "does not have the identity"),
    ],
)
def test_a_pool_on_which_tasks_would_wait_for_ever_is_refused(change: dict[str, Any], expected: str) -> None:
    assert pool_problem(_POOL, "worker_pool", "nd", IDENTITY, one_task_a_node=True) is None
    problem = pool_problem(replace(_POOL, **change), "worker_pool", "nd", IDENTITY, one_task_a_node=True)
    assert problem is not None
    assert problem.startswith("cluster.worker_pool: pool nd ")
    assert expected in problem


def test_what_becomes_of_node_tasks_is_told_once() -> None:
    task = TaskState(id="node-0000", state="running", exit_code=None, failure=None, retries=0, requeues=0, node="n")
    before = {"node-0000": task}
    assert news(before, [task]) == []
    assert news(before, [replace(task, state="active")]) == ["node-0000 lost its node and is back in the queue"]
    assert news(before, [replace(task, retries=1, exit_code=75)]) == [
        "node-0000 ended with exit code 75 and was started again (1 times by now)"
    ]
    ended = replace(task, state="completed", exit_code=2)
    assert news(before, [ended]) == ["node-0000 has ended: exit code 2"]
    assert news({"node-0000": ended}, [ended]) == []
    assert ended_words([ended] * 7) == "; ".join(["node-0000: exit code 2"] * 5) + " and 2 more"


def test_nodes_that_do_not_come_are_explained_while_their_tasks_wait() -> None:
    task = TaskState(id="node-0000", state="active", exit_code=None, failure=None, retries=0, requeues=0, node=None)
    pool = replace(_POOL, errors=(("AllocationFailed", "no spot capacity"),))
    (note,) = why_they_wait([task, task], pool, "nd")
    assert note.startswith("2 node tasks wait: pool nd (nd96) has 1 of 4 nodes: AllocationFailed: no spot capacity. What to do: ")
    assert why_they_wait([replace(task, state="running")], pool, "nd") == []
    assert why_they_wait([task], None, "nd") == ["1 node tasks wait: pool nd is gone; deploy infra/ again"]


def test_a_driver_gives_up_only_when_no_node_is_left() -> None:
    task = TaskState(id="node-0000", state="completed", exit_code=2, failure=None, retries=5, requeues=0, node="n")
    active = BatchJobState(id="j", state="active", reason=None)
    assert hopeless("j", active, [task, replace(task, state="active")]) is None
    assert hopeless("j", active, []) is None  # its tasks are being added
    assert "is over (active) and units are left: node-0000: exit code 2. " in str(hopeless("j", active, [task]))
    assert "(AllTasksCompleted)" in str(hopeless("j", BatchJobState(id="j", state="completed", reason="AllTasksCompleted"), [task]))
    assert "(deleted)" in str(hopeless("j", None, []))


def test_the_command_says_what_is_wrong_and_ends_with_2(service: Service, site: Site, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(batch_job(cluster={"endpoint": site.endpoint})))
    refused = CliRunner().invoke(main, ["submit", str(path)])
    assert (refused.exit_code, refused.output) == (
        2,
        "tokenmill: cluster.driver_pool: pool driver does not exist in this account; deploy infra/, or correct the name\n",
    )
    service.refuse["GET", "/pools/driver"] = Refused(403, "PermissionDenied", "no")
    refused = CliRunner().invoke(main, ["submit", str(path)])
    assert refused.exit_code == 2
    assert "Azure Batch Job Submitter" in refused.output
    elsewhere = CliRunner().invoke(main, ["run", str(path)])
    assert elsewhere.exit_code == 2
    assert "is run by `tokenmill submit`" in elsewhere.output
    assert [path for method, path in service.requests if method != "GET"] == []


def test_whoever_follows_a_job_hears_each_change_once_and_gets_the_drivers_exit_code(site: Site, service: Service, tmp_path: Path) -> None:
    from azure.batch import BatchClient
    from azure.identity import DefaultAzureCredential

    account = BatchAccount(site.endpoint, BatchClient(site.endpoint, DefaultAzureCredential(), retry_total=0))
    account.create_job(azure_batch.driver_job(an_order(), "night-1"))
    storage.use(None)
    submitted = Submitted(job_id="night-1", stamp="s", out_uri=str(tmp_path / "out"), notes=())
    busy, heard = Refused(503, "ServerBusy", "The server is busy."), []

    def say(line: str) -> None:
        heard.append(line)
        if len(heard) == 1:
            service.refuse["GET", "/jobs/night-1"] = busy
        elif len(heard) == 2:
            service.refuse.clear()
        elif len(heard) == 3:
            batch_run.store_outcome(submitted.out_uri, "night-1", "s", Outcome(exit_code=3, message="limit"))

    assert follow(submitted, account, say, wait_s=0) == 3
    active = "job night-1 is active; its driver has not begun"
    assert [heard[0], heard[2], heard[3]] == [active, active, "limit"]
    assert heard[1].startswith("no news at the moment: ")


def test_a_driver_that_was_ended_from_outside_is_told_from_one_that_ended_by_itself(
    account: BatchAccount, service: Service, tmp_path: Path
) -> None:
    account.create_job(azure_batch.driver_job(an_order(), "night-1"))
    storage.use(None)
    job = service.jobs["night-1"]
    job.state, job.tasks["driver"].state, job.tasks["driver"].exit_code = "completed", "completed", 137
    submitted, heard = Submitted(job_id="night-1", stamp="s", out_uri=str(tmp_path / "out"), notes=()), []
    assert follow(submitted, account, heard.append, wait_s=0) == 1
    assert "its driver said nothing: it ended with exit code 137; see `tokenmill logs" in heard[0]


def test_a_schedule_is_made_once_paused_resumed_and_deleted(account: BatchAccount, service: Service) -> None:
    when = ScheduleSpec(every="1d", window="2h")
    options = azure_batch.job_schedule(an_order(), "night-1", when)
    account.create_schedule(options)
    assert "`tokenmill schedule delete` it first" in said(lambda: account.create_schedule(options))
    (found,) = account.schedules()
    assert (found.id, found.state, found.every, found.recent_job) == ("night-1", "active", "1 day, 0:00:00", "night-1:job-1")
    service.advance(timedelta(hours=23))
    assert [job.id for job in account.schedule_jobs("night-1")] == ["night-1:job-1"]
    account.pause_schedule("night-1")
    assert account.schedule("night-1").state == "disabled"
    account.resume_schedule("night-1")
    account.delete_schedule("night-1")
    assert "`tokenmill schedule list`" in said(lambda: account.schedule("night-1"))


def test_a_run_that_takes_longer_than_the_interval_delays_the_next_one_within_the_window_alone(
    account: BatchAccount, service: Service
) -> None:
    account.create_schedule(azure_batch.job_schedule(an_order(), "night-1", ScheduleSpec(every="1d", window="2h")))
    service.advance(timedelta(days=1, hours=1))  # the first run is still active
    assert len(service.jobs) == 1
    service.jobs["night-1:job-1"].state = "completed"
    service.advance(timedelta(minutes=30))
    assert sorted(service.jobs) == ["night-1:job-1", "night-1:job-2"]
    service.advance(timedelta(days=1, hours=2))  # beyond the window: that occurrence is lost
    service.jobs["night-1:job-2"].state = "completed"
    service.advance(timedelta(hours=1))
    assert len(service.jobs) == 2
