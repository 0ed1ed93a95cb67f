"""Nodes of Azure Batch that are measured before their first unit: when there are enough of them, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import batch_run
from jobs.cluster.azure_batch import DRIVER_TASK
from jobs.cluster.azure_batch import STAMP
from jobs.cluster.batch_nodes import Gathering
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import node_of
from pipeline.commit import read_report
from schemas.errors import JobError
from schemas.job import parse_job
from tests.commands import Command
from tests.jobs.batch_jobs import batch_job
from tests.jobs.test_batch_end_to_end import Place
from tests.jobs.test_batch_end_to_end import place
from tests.jobs.test_batch_end_to_end import proven

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.batch

BOTH = ("node-0000-0", "node-0001-0")


def submitted(place: Place) -> Command:
    """A job of 64 rows that measures its nodes first."""
    place.job["cluster"]["preflight"] = True
    place.put("a.parquet", 0, 64)
    return place.run("submit", "../job.yaml", "--wait")


def workers(place: Place) -> set[str]:
    """Whose parts there are."""
    parts = [name for name in place.azurite.names(place.out) if "/part-" in name]
    return {read_report(f"az://{place.out}/{part}").worker for part in parts}


def states(*names: str, nodes: int = 1) -> list[ReplicaState]:
    return [ReplicaState(name=name, window_rows=8, engine={"options": {"nnodes": nodes}}) for name in names]


def test_all_are_there_when_each_replica_brings_the_nodes_that_it_spans() -> None:
    gathering = Gathering(nodes=4)
    assert not gathering.enough(states(*BOTH, nodes=2), 10.0)
    assert gathering.enough(states(*BOTH, nodes=2), 30.0)


def test_nodes_are_measured_when_all_are_there_and_nobody_has_just_come() -> None:
    gathering = Gathering(nodes=2)
    assert not gathering.enough([], 0.0)
    assert not gathering.enough(states(*BOTH[:1]), 10.0)
    assert not gathering.enough(states(*BOTH), 100.0)
    assert not gathering.enough(states(*BOTH, "node-0001-1"), 115.0)  # a further replica of a node: its start would disturb
    assert not gathering.enough(states(*BOTH, "node-0001-1"), 134.0)
    assert gathering.enough(states(*BOTH, "node-0001-1"), 135.0)


def test_a_node_that_does_not_come_is_not_waited_for_for_ever() -> None:
    gathering = Gathering(nodes=2)
    assert not gathering.enough(states(*BOTH[:1]), 10.0)
    assert not gathering.enough(states(*BOTH[:1]), 609.0)
    assert gathering.enough(states(*BOTH[:1]), 610.0)
    assert not gathering.enough([], 700.0)  # a spot node that went again


def test_a_driver_that_comes_after_another_knows_what_was_measured_for_its_submit(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert batch_run.read_left_out(out, "s1") is None
    batch_run.store_left_out(out, "s1", ["node-0001"])
    assert batch_run.read_left_out(out, "s1") == ["node-0001"]
    assert batch_run.read_left_out(out, "s2") is None


def test_only_jobs_on_azure_batch_have_nodes_that_a_run_waits_for() -> None:
    data = batch_job()
    assert parse_job({**data, "cluster": {**data["cluster"], "preflight": True}}).cluster.preflight
    with pytest.raises(JobError, match="preflight: only kind: azure-batch takes it"):
        parse_job({**data, "cluster": {"kind": "local", "preflight": True}})


@pytest.mark.azurite
@pytest.mark.long
def test_a_slow_node_gets_no_unit_and_is_given_back_and_the_job_goes_on(place: Place) -> None:
    """Found slow before: by an earlier driver of this submit."""
    command = submitted(place)
    place.wait_for("the driver is asked for", lambda: bool(place.site.service.jobs))
    (driver,) = [job for job in place.site.service.jobs.values() if not job.id.endswith("-nodes")]
    settings = driver.tasks[DRIVER_TASK].spec["environmentSettings"]
    (stamp,) = [each["value"] for each in settings if each["name"] == STAMP]
    out = f"az://{place.out}/run"
    batch_run.store_left_out(out, stamp, ["node-0001"])
    assert command.end() == 0, command.log + place.all_logs()
    proven(out, 64)
    assert workers(place) == {"node-0000-0"}
    assert place.task("-nodes", "node-0001").unwanted


@pytest.mark.azurite
@pytest.mark.long
def test_a_submitted_job_measures_its_nodes_before_their_first_unit(place: Place) -> None:
    command = submitted(place)
    assert command.end() == 0, command.log + place.all_logs()
    out = f"az://{place.out}/run"
    proven(out, 64)
    log = place.all_logs()
    assert "preflight: 2 nodes" in log
    (name,) = [name for name in place.azurite.names(place.out) if "/batch/preflight-" in name]
    with place.azurite.client() as client, client.get_blob_client(place.out, name) as blob:
        left_out = json.loads(blob.download_blob().readall())
    assert not {worker for worker in workers(place) if node_of(worker) in left_out}
