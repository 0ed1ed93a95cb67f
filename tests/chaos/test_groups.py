"""Replicas that span nodes: every node is a `tokenmill worker` of its own; one of a group is killed, asked to leave, or comes late."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.accept import load_record
from jobs.runs import read_runs
from tests.commands import Command
from tests.jobs.test_address_cluster import Site
from tests.jobs.test_address_cluster import replica_pids

pytestmark = pytest.mark.chaos


@pytest.fixture
def site(tiny_model: Path, write_table: Callable[..., Path], tmp_path: Path) -> Iterator[Site]:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(320)])
    made = Site(tmp_path, tiny_model)
    made.job["engine"]["options"] = {**made.job["engine"]["options"], "nnodes": 2}  # type: ignore[index,dict-item]
    yield made
    for command in made.started:
        command.kill()


def leader_of(nodes: list[Command]) -> Command:
    """The one whose replica joined the cluster."""
    (found,) = [node for node in nodes if "joined tls://" in node.log]
    return found


def gathered(site: Site, *names: str, cores: Sequence[int | None] = (None, None)) -> tuple[Command, Command]:
    """A group's leader and its other node, at work; each with a core to itself where `cores` says which."""
    nodes = [site.worker(name, core=core) for name, core in zip(names, cores, strict=True)]
    for node in nodes:
        node.wait_for(" is ready after ")
    nodes[0].wait_for("a member", lambda: any("joined tls://" in node.log for node in nodes))
    leader = leader_of(nodes)
    return leader, next(node for node in nodes if node is not leader)


@pytest.mark.long
def test_nodes_in_pairs_are_replicas_and_each_node_is_paid_for(site: Site) -> None:
    site.scheduler()
    nodes = [site.worker(name) for name in ("one", "two", "three", "four")]
    nodes[0].wait_for("two members", lambda: sum("joined tls://" in node.log for node in nodes) == 2)
    run = site.start("run", "job.yaml", "--json")
    assert run.end() == 0, run.log
    site.prove()
    result = json.loads(run.log[run.log.index("\n{") :])
    assert len(result["start_s"]) == 2
    assert sum("part of a replica on 2 nodes" in node.log for node in nodes) == 4
    assert sum(bool(re.search(r"part 1 of 2 of the replica \w+-0", node.log)) for node in nodes) == 2
    record = load_record(str(site.out))
    assert record is not None
    ((account,), _) = read_runs(str(site.out), record.fingerprint)
    assert account.node_s is not None
    assert account.node_s > 3 * account.elapsed_s  # of four nodes; two would be half of it


@pytest.mark.long
def test_a_single_node_says_whom_it_waits_for_and_works_when_the_other_comes(site: Site) -> None:
    site.scheduler()
    first = site.worker("one")
    first.wait_for("waiting for nodes: 1 of 2 of group 1 are there")
    run = site.start("run", "job.yaml")
    run.wait_for("waiting for workers")
    site.worker("two")
    assert run.end() == 0, run.log
    site.prove()
    first.send(signal.SIGTERM)
    assert first.end() == 0, first.log


@pytest.mark.parametrize("lost", [pytest.param("leader", marks=pytest.mark.long), "other"])
def test_when_a_node_is_killed_the_other_meets_the_next_one_that_comes_and_no_row_is_lost(site: Site, lost: str) -> None:
    site.scheduler()
    leader, other = gathered(site, "one", "two")
    run = site.start("run", "job.yaml")
    run.wait_for("its first part", site.has_parts(1))
    dead, left = (leader, other) if lost == "leader" else (other, leader)
    dead.kill()
    left.wait_for("waiting for nodes: 1 of 2 of group 2 are there")
    site.worker("three")
    assert run.end() == 0, run.log
    site.prove()


def test_a_node_that_is_asked_to_leave_has_its_replica_save_what_is_finished_first(site: Site) -> None:
    site.scheduler()
    leader, other = gathered(site, "one", "two")
    (pid,) = replica_pids(leader)
    run = site.start("run", "job.yaml")
    run.wait_for("its first part", site.has_parts(1))
    other.send(signal.SIGTERM)
    assert other.end() == 0, other.log
    assert "was evicted and handed its units back" in other.log
    leader.wait_for("waiting for nodes: 1 of 2 of group 2 are there")
    assert replica_pids(leader) != {pid}
    assert list((site.out / "_tokenmill" / "segments").rglob("*.parquet"))
    site.worker("three")
    assert run.end() == 0, run.log
    site.prove()


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("lost", ["leader", "other"])
def test_a_node_that_goes_while_the_engine_starts_is_noticed_at_once(site: Site, lost: str, how: signal.Signals) -> None:
    site.job["engine"]["options"]["start_s"] = 600  # type: ignore[index]
    nodes = [site.worker(name) for name in ("one", "two")]
    leads, follows = re.compile(r"part 0 of 2 of a replica"), re.compile(r"part 1 of 2 of the replica")
    nodes[0].wait_for("a group", lambda: all(any(seat.search(node.log) for node in nodes) for seat in (leads, follows)))
    dead = next(node for node in nodes if (leads if lost == "leader" else follows).search(node.log))
    (left,) = [node for node in nodes if node is not dead]
    if how == signal.SIGKILL:
        dead.kill()
    else:
        dead.send(how)
        assert dead.end() == 0, dead.log
    left.wait_for("waiting for nodes: 1 of 2 of group 2 are there")
    left.send(signal.SIGTERM)
    assert left.end() == 0, left.log


@pytest.mark.long
def test_a_leader_that_is_asked_to_leave_hands_its_units_back_and_the_other_node_waits_for_the_next(site: Site) -> None:
    site.scheduler()
    leader, other = gathered(site, "one", "two")
    run = site.start("run", "job.yaml")
    run.wait_for("its first part", site.has_parts(1))
    leader.send(signal.SIGTERM)
    assert leader.end() == 0, leader.log
    other.wait_for("waiting for nodes: 1 of 2 of group 2 are there")
    site.worker("three")
    assert run.end() == 0, run.log
    site.prove()


def test_a_replica_that_spans_nodes_needs_a_place_where_they_meet(site: Site) -> None:
    site.job["cluster"] = {"kind": "local"}
    run = site.start("run", "job.yaml")
    assert run.end() == 2, run.log
    assert "engine.options.nnodes: found 2, but one replica may span 1 here: nodes meet in the rendezvous of a cluster" in run.log
    site.job["cluster"] = {"kind": "address", "rendezvous": str(site.place), "keys": str(site.keys)}
    node = site.worker("one", "--replicas", "2")
    assert node.end() == 2, node.log
    assert "--replicas: found 2, expected 1: this node is one part of a replica that spans 2 nodes" in node.log
