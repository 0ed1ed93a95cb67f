"""A preflight of two real nodes over TLS, one of which has a slow way to the store; and the job, which goes on without it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cluster.address import kept
from jobs.cluster.dask_nodes import by_node
from jobs.cluster.dask_nodes import check_fit
from jobs.preflight import PreflightJob
from jobs.preflight import PreflightSpec
from jobs.preflight import without_slow_nodes
from jobs.verify import verify
from pipeline import tls
from pipeline.versions import versions
from pipeline.worker import METRICS_KEY
from schemas.errors import JobError
from schemas.job import parse_job
from schemas.preflight import PILLARS
from schemas.preflight import Thresholds
from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.chaos.proxy import FaultyProxy
from tests.chaos.proxy import before
from tests.commands import Command

_SHARED = 0.2
_MEMORY = "/dev/shm"
"""No disk, so none is measured: both nodes would have this machine's, at different moments."""
"""Of the median. Both nodes share this machine's disk and cores, which are now the one's and now the other's."""


def worker(name: str, **metrics: Any) -> dict[str, Any]:
    return {"name": name, METRICS_KEY: {"versions": versions(), "model": "llama"}, "metrics": {METRICS_KEY: metrics}}


def test_a_nodes_orders_go_to_its_first_replica() -> None:
    workers = {f"tls://{name}": worker(name) for name in ("b-1", "b-0", "a-c-10", "a-c-2")}
    assert by_node(workers) == {"a-c": "tls://a-c-10", "b": "tls://b-0"}


def test_nodes_that_are_left_out_are_so_with_all_their_replicas() -> None:
    workers = {f"tls://{name}": worker(name) for name in ("b-0", "b-1", "bb-0", "a-0")}
    assert set(kept(workers, ["b", "gone"])) == {"tls://bb-0", "tls://a-0"}
    assert kept(workers, []) == workers


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({}, "no node has joined"),
        ({"tls://x": {"name": "x"}}, "not started as `tokenmill worker`: x"),
        ({"tls://a": {"name": "a-0", METRICS_KEY: {"versions": {**versions(), "tokenmill": "0.0.1"}}}}, "install the same everywhere"),
        ({"tls://a": worker("a-0", in_flight=2)}, "units are in flight on a-0"),
    ],
)
def test_a_cluster_that_is_not_fit_is_refused_with_the_reason(workers: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        check_fit(versions(), workers)


def test_a_cluster_of_idle_nodes_is_fit() -> None:
    check_fit(versions(), {"tls://a": worker("a-0", in_flight=0), "tls://b": worker("b-0")})


class Site:
    """A folder with a job, keys, a scheduler, and a node for each name; the job's output lies in a blob service."""

    def __init__(self, folder: Path, model: Path, container: str) -> None:
        self.folder, self.out = folder, f"az://{container}/out"
        self.started: list[Command] = []
        keys, place = str(folder / "keys"), str(folder / "cluster")
        tls.make_keys(keys, valid_days=1)
        self.job = {
            "model": str(model),
            "input": {"uri": str(folder / "in" / "*.parquet"), "prompt": "prompt"},
            "output": {"uri": self.out},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 400, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5}},
            "cluster": {"kind": "address", "rendezvous": place, "keys": keys},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(self.job))
        reached = ["--keys", keys, "--rendezvous", place]
        self.start("scheduler", "--listen", "tls://127.0.0.1:0", *reached, "--dashboard", "none").wait_for("scheduler at ")

    def start(self, *arguments: str, **environment: str) -> Command:
        self.started.append(Command(self.folder, *arguments, environment=environment))
        return self.started[-1]

    def node(self, name: str, store: Azurite) -> Command:
        connection = {CONNECTION_STRING: store.connection_string}
        return self.start("worker", "job.yaml", "--name", name, "--replicas", "1", **connection)

    def preflight(self, *arguments: str, pillars: Sequence[str]) -> tuple[int, dict[str, Any]]:
        """Exit code, and what it says as JSON."""
        skipped = [f"--skip={pillar}" for pillar in PILLARS if pillar not in pillars]
        command = self.start("preflight", "job.yaml", "--json", *skipped, *arguments)
        for pillar in pillars:  # patience is for each of them
            command.wait_for(f"{pillar}: ")
        code = command.end()
        assert "Traceback" not in command.log
        found: dict[str, Any] = json.loads(command.log[command.log.index("\n{") :])
        return code, found

    def close(self) -> None:
        for command in self.started:
            command.kill()


@pytest.fixture
def site(tiny_model: Path, write_table: Callable[..., Path], tmp_path: Path, container: str) -> Iterator[Site]:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(320)])
    made = Site(tmp_path, tiny_model, container)
    yield made
    made.close()


@pytest.fixture
def slow_way(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """To the same store, a second and a half for each request."""
    monkeypatch.setattr("tests.chaos.proxy._SLOW_S", 1.5)
    with before(azurite) as proxy:
        proxy.harass(seed=1, rate=1.0, kinds=["slow"])
        yield proxy


@pytest.mark.chaos
@pytest.mark.azurite
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_with_a_slow_way_to_the_store_is_named_and_the_job_goes_on_without_it(
    site: Site, azurite: Azurite, slow_way: FaultyProxy, container: str
) -> None:
    nodes = [site.node("fast", azurite), site.node("slow", slow_way.service)]
    for node in nodes:
        node.wait_for("joined tls://")

    code, found = site.preflight("--seconds", "12", "--disk", _MEMORY, "--of-median", str(_SHARED), pillars=["storage"])
    assert (code, found["leave_out"]) == (1, ["slow"]), found["findings"]
    assert {finding["group"] for finding in found["findings"]} >= {"store create", "store get"}
    (evidence,) = [finding["evidence"] for finding in found["findings"] if finding["group"] == "store create"]
    assert re.fullmatch(r"store create [\d.]+ objects/s, the nodes' median [\d,.]+ objects/s", evidence)
    assert slow_way.faults["slow"] > 50
    assert azurite.names(container) == []  # all of it is deleted again

    # On one machine with both nodes nothing else may be said to be slow, only to have been measured.
    code, found = site.preflight("--seconds", "12", "--of-median", "0.001", pillars=["compute", "memory", "network"])
    assert (code, found["leave_out"]) == (0, [])
    assert [(node["name"], node["failures"]) for node in found["nodes"]] == [("fast", []), ("slow", [])]
    for node in found["nodes"]:
        measured = {measurement["group"]: measurement for measurement in node["measurements"]}
        assert set(measured) >= {"GEMM float32", "attention, prefill", "memory", "all-reduce", "node to node"}
        assert measured["all-reduce"]["detail"].startswith("bus bandwidth, 2 processes on 2 nodes")
        assert any(measurement["detail"] == "128 x 64 x 192" for measurement in node["measurements"])  # the nodes' own model

    said: list[str] = []
    job = parse_job(site.job)
    own = PreflightJob(engine=job.engine, output=job.output, cluster=job.cluster)
    spec = PreflightSpec(job=own, pillars=("storage",), seconds=12, disk=_MEMORY, thresholds=Thresholds(of_median=_SHARED))
    left = without_slow_nodes(job, said.append, spec)
    assert left.cluster.leave_out == ["slow"], said
    assert said[-1] == "preflight: 2 nodes, of which slow will be left out"

    run = site.start("run", "job.yaml", "--set", "cluster.leave_out=[slow]", "--json")
    assert run.end() == 0, run.log
    assert "node slow is left out, as cluster.leave_out says" in run.log
    verdict = verify(site.out)
    assert (verdict.problems, verdict.complete, verdict.rows_proven) == ([], True, 320)
    result = json.loads(run.log[run.log.index("\n{") :])
    assert set(result["start_s"]) == {"fast-0"}
    assert "Traceback" not in run.log + nodes[0].log + nodes[1].log
