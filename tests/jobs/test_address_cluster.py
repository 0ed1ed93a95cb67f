"""A job on nodes that joined a scheduler: over TLS, with whom it works and with whom it does not, and when the scheduler goes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cluster.address import Needs
from jobs.cluster.address import changes
from jobs.cluster.address import holders
from jobs.cluster.address import objections
from jobs.cluster.cluster import ReplicaState
from jobs.verify import verify
from pipeline import rendezvous
from pipeline import tls
from pipeline.versions import from_dask
from pipeline.versions import versions
from pipeline.worker import METRICS_KEY
from tests.commands import Command
from tests.commands import listening
from tests.conftest import build_tiny_model
from tests.conftest import read_output

DIGESTS = {"weights": "w", "tokenizer": "t", "chat_template": "c"}
NEEDS = Needs(versions={"tokenmill": "1.0", "distributed": "2026.8.0", "python": "3.11"}, digests=DIGESTS, engine="vllm")
OURS = dict(NEEDS.versions)


def worker(name: str, **said: Any) -> dict[str, Any]:
    """As a scheduler identifies one of ours."""
    ours = {"versions": OURS, "model": "llama", "digests": DIGESTS, "engine": "vllm", "start_s": 1.0, "pid": 1}
    return {"name": name, METRICS_KEY: {**ours, **said}}


def test_a_cluster_of_our_workers_is_fit_also_without_any() -> None:
    assert objections(NEEDS, OURS, {}) == []
    assert objections(NEEDS, OURS, {"tls://a:1": worker("a-0"), "tls://a:2": worker("a-1")}) == []


def test_somebody_elses_workers_are_named() -> None:
    found = {"tls://a:1": worker("a-0"), **{f"tls://b:{port}": {"name": f"b-{port}"} for port in range(1, 8)}}
    (problem,) = objections(NEEDS, OURS, found)
    assert problem.startswith("not started as `tokenmill worker`: worker b-1 (tls://b:1), worker b-2 (tls://b:2), ")
    assert "and 2 more" in problem
    assert "worker a-0" not in problem


@pytest.mark.parametrize("name", ["tokenmill", "distributed", "python"])
def test_other_versions_are_named_with_ours_beside_them(name: str) -> None:
    old = {**OURS, name: "0.9"}
    assert objections(NEEDS, old, {}) == [f"the scheduler has {name} 0.9, this process {OURS[name]}; install the same everywhere"]
    (problem,) = objections(NEEDS, OURS, {"tls://a:1": worker("a-0", versions=old)})
    assert problem == f"worker a-0 (tls://a:1) has {name} 0.9, this process {OURS[name]}; install the same everywhere"


@pytest.mark.parametrize("said", [*({"digests": {**DIGESTS, name: "x"}} for name in DIGESTS), {"engine": "simulated"}])
def test_a_worker_with_another_model_or_engine_is_named(said: dict[str, Any]) -> None:
    (problem,) = objections(NEEDS, OURS, {"tls://a:1": worker("a-0", **said)})
    assert problem.startswith(f"worker a-0 (tls://a:1) runs llama on engine {said.get('engine', 'vllm')}, which is not what this job asks")


def test_a_scheduler_without_our_package_is_told_from_one_with_it() -> None:
    answer = {"packages": {"python": "3.11.2.final.0", "tokenmill": None, "distributed": "2026.8.0"}}
    assert from_dask(answer) == {"tokenmill": "none", "distributed": "2026.8.0", "python": "3.11"}
    assert set(versions()) == {"tokenmill", "distributed", "python"}


def test_who_comes_and_goes_is_said() -> None:
    before = [ReplicaState(name=name, window_rows=8) for name in ("a-0", "a-1")]
    after = [ReplicaState(name=name, window_rows=8) for name in ("a-1", "b-0")]
    assert changes(before, after) == ["replica b-0 joined", "replica a-0 is gone"]
    assert changes(after, [replace(state, rows=5) for state in after]) == []


def test_a_unit_in_flight_is_found_with_the_replica_that_has_it() -> None:
    workers = {
        "tls://a:1": {"name": "a-0", "metrics": {METRICS_KEY: {"units": ["x-1", "x-2"]}}},
        "tls://b:1": {"name": "b-0", "metrics": {METRICS_KEY: {"units": ["x-3"]}}},
        "tls://c:1": {"name": "c-0", "metrics": {}},
    }
    assert holders(workers) == {"x-1": "a-0", "x-2": "a-0", "x-3": "b-0"}


_SIMULATED = {"decode_tokens_per_s": 200, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5, "lengths": "max"}
"""Twenty units of 16 rows and 4 tokens, a third of a second each."""
Start = Callable[..., Command]


class Site:
    """A folder with a job, keys, and the commands that were started for it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.out, self.place, self.keys = folder, folder / "out", folder / "cluster", folder / "keys"
        tls.make_keys(self.keys, valid_days=1)
        self.job = {
            "model": str(model),
            "input": {"uri": str(folder / "in" / "*.parquet"), "prompt": "prompt"},
            "output": {"uri": str(self.out)},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": _SIMULATED},
            "cluster": {"kind": "address", "rendezvous": str(self.place), "keys": str(self.keys)},
        }
        self.started: list[Command] = []

    def start(self, *arguments: str) -> Command:
        (self.folder / "job.yaml").write_text(yaml.safe_dump(self.job))
        self.started.append(Command(self.folder, *arguments))
        return self.started[-1]

    def scheduler(self) -> Command:
        keys, place = str(self.keys), str(self.place)
        command = self.start("scheduler", "--listen", "tls://127.0.0.1:0", "--keys", keys, "--rendezvous", place, "--dashboard", "none")
        command.wait_for("scheduler at ")
        return command

    def worker(self, name: str = "node", *arguments: str, core: int | None = None) -> Command:
        command = self.start("worker", "job.yaml", "--name", name, *arguments)
        if core is not None:
            os.sched_setaffinity(command.pid, {core})
        return command

    def has_parts(self, count: int) -> Callable[[], bool]:
        return lambda: len(list(self.out.glob("part-*.parquet"))) >= count

    def prove(self) -> None:
        verdict = verify(str(self.out))
        assert (verdict.problems, verdict.complete) == ([], True)
        assert read_output(self.out)["id"].to_pylist() == list(range(320))


@pytest.fixture
def site(tiny_model: Path, write_table: Callable[..., Path], tmp_path: Path) -> Iterator[Site]:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(320)])
    made = Site(tmp_path, tiny_model)
    yield made
    for command in made.started:
        command.kill()


def replica_pids(command: Command) -> set[int]:
    return {process.pid for process in command.family() if any("pipeline.worker" in word for word in process.cmdline())}


@pytest.mark.chaos
def test_two_nodes_run_a_job_over_tls_and_hand_back_when_they_are_asked_to_leave(site: Site) -> None:
    site.scheduler()
    nodes = [site.worker("one"), site.worker("two", "--replicas", "2")]
    for node in nodes:
        node.wait_for("joined tls://")
    run = site.start("run", "job.yaml", "--json")
    run.wait_for("its first part", site.has_parts(1))
    assert run.end() == 0, run.log
    for said in ("connected to the scheduler at tls://127.0.0.1:", "replica one-0 joined", "replica two-1 joined"):
        assert said in run.log
    site.prove()
    result = json.loads(run.log[run.log.index("\n{") :])
    assert set(result["start_s"]) == {"one-0", "two-0", "two-1"}
    nodes[0].send(signal.SIGTERM)
    nodes[1].send(signal.SIGINT)
    assert [node.end() for node in nodes] == [0, 0], nodes[0].log + nodes[1].log
    assert "replica one-0 was evicted and handed its units back" in nodes[0].log
    assert "Traceback" not in nodes[0].log + nodes[1].log


@pytest.mark.chaos
def test_the_driver_says_what_it_waits_for(site: Site) -> None:
    run = site.start("run", "job.yaml")
    run.wait_for(f"waiting for a scheduler: start `tokenmill scheduler --rendezvous {site.place}`")
    site.scheduler()
    run.wait_for("waiting for workers: start `tokenmill worker` on each node")
    node = site.worker()
    assert run.end() == 0, run.log
    site.prove()
    assert "Traceback" not in run.log + node.log


@pytest.mark.chaos
def test_a_worker_may_come_before_its_scheduler_and_keeps_its_engine_over_the_next(site: Site) -> None:
    node = site.worker()
    node.wait_for(f"none has published itself in {site.place}")
    first = site.scheduler()
    node.wait_for("joined tls://")
    (pid,) = replica_pids(node)
    run = site.start("run", "job.yaml")
    run.wait_for("its first parts", site.has_parts(2))
    first.kill()
    run.wait_for("lost the scheduler at ")
    site.scheduler()
    assert run.end() == 0, run.log
    assert len(re.findall("joined tls://", node.log)) == 2, node.log
    assert replica_pids(node) == {pid}
    site.prove()


@pytest.mark.chaos
def test_a_scheduler_that_ends_and_comes_back_at_the_same_address_is_joined_again(site: Site) -> None:
    first = site.scheduler()
    entry = rendezvous.look_up(str(site.place))
    assert entry is not None
    site.job["cluster"] = {"kind": "address", "address": entry.address, "keys": str(site.keys)}
    node = site.worker()
    node.wait_for("joined tls://")
    (pid,) = replica_pids(node)
    run = site.start("run", "job.yaml")
    run.wait_for("its first parts", site.has_parts(2))
    first.send(signal.SIGTERM)
    assert first.end() == 0
    site.start("scheduler", "--listen", entry.address, "--keys", str(site.keys), "--dashboard", "none").wait_for("scheduler at ")
    assert run.end() == 0, run.log
    assert replica_pids(node) == {pid}
    site.prove()


@pytest.mark.chaos
def test_a_node_that_is_left_out_gets_no_unit_also_when_another_one_dies_with_units_in_flight(site: Site) -> None:
    site.scheduler()
    nodes = [site.worker(name) for name in ("one", "two", "left-out")]
    for node in nodes:
        node.wait_for("joined tls://")
    run = site.start("run", "job.yaml", "--set", "cluster.leave_out=[left-out]")
    run.wait_for("its first part", site.has_parts(1))
    nodes[0].kill()
    assert run.end() == 0, run.log
    site.prove()
    assert "node left-out is left out, as cluster.leave_out says" in run.log
    done_by = set(pq.read_table(site.out / "_tokenmill" / "manifest.parquet")["worker"].to_pylist())
    assert {"two-0"} <= done_by <= {"one-0", "two-0"}


_FOREIGN = """
import asyncio, sys
from distributed import Worker
from pipeline.tls import security

async def live():
    worker = await Worker(sys.argv[1], name="stranger", security=security(sys.argv[2]), host="127.0.0.1", nthreads=1)
    await worker.finished()

asyncio.run(live())
"""


@pytest.mark.chaos
def test_a_cluster_with_a_stranger_in_it_is_refused(site: Site) -> None:
    site.scheduler()
    entry = rendezvous.look_up(str(site.place))
    assert entry is not None
    stranger = subprocess.Popen(
        [sys.executable, "-c", _FOREIGN, entry.address, str(site.keys)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert stranger.stderr is not None
        for line in stranger.stderr:
            if "Registered to" in line:
                break
        run = site.start("run", "job.yaml")
        assert run.end() == 2, run.log
        assert (
            "tokenmill: this cluster cannot run the job:\n  not started as `tokenmill worker`: worker stranger (tls://127.0.0.1:" in run.log
        )
        assert "Traceback" not in run.log
    finally:
        stranger.kill()
        stranger.communicate()


@pytest.mark.chaos
def test_a_cluster_with_another_model_is_refused(site: Site, tmp_path: Path) -> None:
    site.scheduler()
    other = build_tiny_model(tmp_path / "other", template=False)
    site.worker("node", "--model", str(other)).wait_for("joined tls://")
    run = site.start("run", "job.yaml")
    assert run.end() == 2, run.log
    assert f"runs {other} on engine simulated, which is not what this job asks for" in run.log


@pytest.mark.chaos
def test_keys_of_another_cluster_get_nobody_in(site: Site, tmp_path: Path) -> None:
    site.scheduler()
    tls.make_keys(tmp_path / "other", valid_days=1)
    site.job["cluster"]["keys"] = str(tmp_path / "other")  # type: ignore[index]
    run = site.start("run", "job.yaml")
    assert run.end() == 2, run.log
    assert f"has keys of another cluster than {tmp_path / 'other'}: SSLCertVerificationError" in run.log
    site.job["cluster"] = {"kind": "address", "rendezvous": str(site.place), "insecure": True}
    run = site.start("run", "job.yaml")
    assert run.end() == 2, run.log
    assert "with insecure: true (--insecure); give keys instead" in run.log


@pytest.mark.chaos
def test_keys_inside_the_output_are_refused(site: Site) -> None:
    tls.make_keys(site.out / "keys", valid_days=1)
    site.job["cluster"]["keys"] = str(site.out / "keys")  # type: ignore[index]
    run = site.start("run", "job.yaml")
    assert run.end() == 2
    assert "lie in one another; whoever reads results there could run code on every node" in run.log


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["address", "local"])
def test_nothing_of_ours_listens_beyond_this_machine_unless_asked(site: Site, kind: str) -> None:
    site.job["engine"] = {"kind": "simulated", "options": {**_SIMULATED, "decode_tokens_per_s": 20}}  # there is time to look
    if kind == "address":
        site.scheduler()
        site.worker().wait_for("joined tls://")
    else:
        site.job["cluster"] = {"kind": "local", "replicas": 2}
    run = site.start("run", "job.yaml")
    run.wait_for("its first part", site.has_parts(1))
    family = [process for command in site.started for process in command.family()]
    assert len(replica_pids(run) if kind == "local" else family) >= 2
    assert listening(family) == {"127.0.0.1"}
