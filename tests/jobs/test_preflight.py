"""Preflight as a whole, over nodes that answer what a test says; and once for real, on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from jobs import preflight as subject
from jobs.cli import main
from jobs.preflight import PreflightJob
from jobs.preflight import PreflightSpec
from jobs.preflight import parse_preflight
from jobs.preflight import precisions_of
from jobs.preflight import preflight
from jobs.preflight import profile_of
from jobs.preflight import sentence
from jobs.preflight import width_of
from jobs.preflight import without_slow_nodes
from jobs.preflight import world_of
from jobs.preflight_table import figures
from jobs.preflight_table import machines
from pipeline.hardware import find_profile
from pipeline.shape import known_shape
from schemas.errors import JobError
from schemas.job import ClusterSpec
from schemas.job import EngineSpec
from schemas.job import JobSpec
from schemas.preflight import AzureNode
from schemas.preflight import NodeFacts
from schemas.preflight import Order
from tests.jobs.batch_jobs import batch_job

CLUSTER = ClusterSpec(kind="address", address="tcp://10.0.0.4:8786", insecure=True)


def facts(**values: Any) -> NodeFacts:
    defaults: dict[str, Any] = {
        "architecture": "x86_64", "core_ids": (0, 1), "num_cores": 2, "load": 0.5, "cpu_name": "a CPU", "cpu_flags": (), "gpus": (),
        "gpu_name": "", "free_port": 4711,
    }  # fmt: skip
    return NodeFacts(**{**defaults, **values})


class Scripted:
    """Nodes that answer at once; `speeds` are theirs, and what `broken` says of a node and a pillar it answers instead."""

    def __init__(self, speeds: Mapping[str, float], broken: Mapping[tuple[str, str], str] | None = None, **given: Any) -> None:
        self._speeds, self._broken, self._facts = speeds, broken or {}, facts(**given)
        self.orders: list[tuple[str, Order]] = []

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def names(self) -> list[str]:
        return list(self._speeds)

    @property
    def models(self) -> dict[str, str | None]:
        return dict.fromkeys(self._speeds, "/models/llama")

    def host(self, name: str) -> str:
        return f"10.0.0.{self.names.index(name)}"

    def ask(self, what: str, orders: Mapping[str, dict[str, Any]], limit_s: float) -> dict[str, dict[str, Any] | str]:
        return {name: self._answer(what, name, order) for name, order in orders.items()}

    def _answer(self, what: str, name: str, data: dict[str, Any]) -> dict[str, Any] | str:
        if what == "facts":
            return self._broken.get((name, "facts")) or self._facts.model_dump(mode="json")
        order = Order.model_validate(data)
        self.orders.append((name, order))
        if (name, order.pillar) in self._broken:
            return self._broken[name, order.pillar]
        common = {"pillar": order.pillar, "group": order.pillar, "unit": "GB/s", "value": 10 * self._speeds[name]}
        common["rate"] = order.pillar if order.pillar == "memory" else None
        return {"measurements": [{**common, "name": f"{order.pillar} of {device}", "device": device} for device in order.devices]}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    """Every cluster is this one."""

    def use(*args: Any, **given: Any) -> Scripted:
        nodes = Scripted(*args, **given)
        monkeypatch.setattr(subject, "_nodes", lambda _: nodes)
        return nodes

    return use


def test_every_node_is_asked_for_every_pillar_and_the_slow_one_is_named(cluster: Callable[..., Scripted]) -> None:
    nodes = cluster({"a": 1.0, "b": 0.3, "c": 1.1})
    said: list[str] = []
    found = preflight(PreflightSpec(job=PreflightJob(cluster=CLUSTER), seconds=20), said.append)
    assert [(name, order.pillar) for name, order in nodes.orders] == [
        (name, pillar) for pillar in ("compute", "memory", "network", "storage") for name in "abc"
    ]
    assert sum(order.seconds for name, order in nodes.orders if name == "a") == pytest.approx(20)
    assert said[0] == "compute: 10 s on 3 nodes"
    assert (found.leave_out, found.exit_code) == (["b"], 1)
    assert sentence(found.findings[0]).startswith("node b: slow in compute, 30% of the nodes' median: compute of cpu 3 GB/s, the nodes'")
    shown = json.loads(json.dumps(found.to_dict()))
    assert (shown["leave_out"], len(shown["nodes"]), len(shown["findings"])) == (["b"], 3, 4)


def test_a_node_that_dies_in_a_pillar_is_reported_and_the_others_are_judged(cluster: Callable[..., Scripted]) -> None:
    cluster({"a": 1.0, "b": 1.0, "c": 1.0}, {("b", "memory"): "KilledWorker: b-0", ("c", "facts"): "the node gave no answer within 60 s"})
    found = preflight(PreflightSpec(job=PreflightJob(cluster=CLUSTER)), lambda _: None)
    by_name = {report.name: report for report in found.nodes}
    assert [(failure.pillar, failure.reason) for failure in by_name["b"].failures] == [("memory", "KilledWorker: b-0")]
    assert by_name["c"].facts is None
    assert (found.leave_out, found.exit_code, found.findings) == (["b", "c"], 1, [])


def test_only_the_pillars_that_are_wanted_are_measured(cluster: Callable[..., Scripted]) -> None:
    nodes = cluster({"a": 1.0})
    found = preflight(PreflightSpec(job=PreflightJob(), pillars=("memory",)), lambda _: None)
    assert [order.pillar for _, order in nodes.orders] == ["memory"]
    assert found.exit_code == 0


def test_gpus_are_measured_one_by_one_and_held_against_the_profile_that_has_as_many(cluster: Callable[..., Scripted]) -> None:
    nodes = cluster({"a": 1.0, "b": 1.0}, gpus=tuple(map(str, range(8))), gpu_name="NVIDIA H100 80GB HBM3")
    found = preflight(PreflightSpec(job=PreflightJob(model="llama-2-70b", cluster=CLUSTER)), lambda _: None)
    order = nodes.orders[0][1]
    assert (order.devices, order.prefill_rows, order.precisions) == (tuple("01234567"), 8192, ("bf16", "fp8", "int8"))
    assert order.shape is not None
    assert order.shape["hidden"] == known_shape("llama-2-70b").hidden
    assert {report.profile for report in found.nodes} == {"nd96isr-h100-v5"}
    worlds = [order.world for _, order in nodes.orders if order.world is not None]
    assert [(world.first_rank, world.size, world.address, world.port) for world in worlds] == [
        (0, 16, "10.0.0.0", 4711), (8, 16, "10.0.0.0", 4711)
    ]  # fmt: skip


def test_a_users_own_profile_with_a_device_beside_it_is_what_nodes_are_held_against(
    cluster: Callable[..., Scripted], tmp_path: Path
) -> None:
    figure = "{value: %s, basis: measured, source: my own bench}"
    (tmp_path / "my-cpu.yaml").write_text(
        f"description: a CPU\nmemory_gb: {figure % 64}\ngemm_tflops: {{bf16: {{measured: {figure % 1}}}}}\n"
        f"bandwidth_tb_per_s: {{measured: {figure % 0.01}}}\n"
    )
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "description: mine\ndevice: cpu\nmax_num_seqs: 8\nmax_num_batched_tokens: 512\n"
        f"node: {{architecture: x86_64, cores: {figure % 8}, memory_gb: {figure % 64}, device: my-cpu, devices: 1, batch: doubtful}}\n"
    )
    cluster({"a": 1.0, "b": 0.77})
    job = PreflightJob(engine=EngineSpec(profile=str(profile)), cluster=CLUSTER)
    found = preflight(PreflightSpec(job=job, pillars=("memory",)), lambda _: None)
    assert [report.profile for report in found.nodes] == ["mine", "mine"]
    assert [sentence(finding) for finding in found.findings] == [
        "node b: slow in memory, 77% of the profile: memory of cpu 7.7 GB/s is 77% of the 10 GB/s expected: my own bench (measured)"
    ]
    assert [measured["of_profile"] for node in found.to_dict()["nodes"] for measured in node["measurements"]] == [1.0, 0.77]


def test_ranks_of_one_node_follow_one_another() -> None:
    worlds = world_of({"a": 1, "b": 2}, {"a": "10.0.0.1", "b": "10.0.0.2"}, 99)
    assert worlds["a"].places == worlds["b"].places == (0, 1, 1)
    assert [(world.first_rank, world.address, world.own_address) for world in worlds.values()] == [
        (0, "10.0.0.1", "10.0.0.1"), (1, "10.0.0.1", "10.0.0.2")
    ]  # fmt: skip


def test_precisions_are_those_that_the_device_can_be_expected_to_have() -> None:
    assert precisions_of(facts()) == ("float32",)
    assert precisions_of(facts(cpu_flags=("avx512_fp16", "amx_bf16", "amx_int8"))) == ("float32", "float16", "bf16", "int8")
    assert precisions_of(facts(architecture="aarch64")) == ("float32", "bf16")
    assert precisions_of(facts(gpus=("0",), gpu_name="NVIDIA GB300 and B300")) == ("bf16", "fp8", "int8", "nvfp4")
    assert precisions_of(facts(gpus=("0",), gpu_name="AMD Instinct MI300X")) == ("bf16", "fp8", "int8")


def test_gemms_are_of_one_device_of_a_replica_as_a_run_cuts_it() -> None:
    h100, large = find_profile("nd96isr-h100-v5"), known_shape("llama-3.1-70b")
    assert width_of(large, h100, {}) == 4
    assert width_of(large, h100, {"tensor_parallel_size": 8}) == 8
    assert width_of(known_shape("llama-3.1-8b"), h100, {}) == 1
    assert width_of(known_shape("llama-3.1-405b"), h100, {}) == 8  # of each of two nodes
    assert width_of(large, None, {}) == width_of(large, find_profile("local-cpu"), {}) == 1


def test_the_profile_is_of_the_size_that_azure_says_else_of_the_gpus_else_none() -> None:
    size = AzureNode(vm_size="Standard_ND96isr_H200_v5")
    named = profile_of(facts(azure=size))
    assert named is not None
    assert named.name == "nd96isr-h200-v5"
    assert profile_of(facts(azure=AzureNode(vm_size="Standard_D4s_v5"))) is None
    assert profile_of(facts(gpus=("0",), gpu_name="NVIDIA H100 80GB HBM3")) is None


def test_a_job_goes_on_without_slow_nodes_and_with_those_already_left_out(
    cluster: Callable[..., Scripted], make_job: Callable[..., JobSpec]
) -> None:
    job = make_job(cluster={"kind": "address", "address": "tcp://10.0.0.4:8786", "insecure": True, "leave_out": ["old"]})
    cluster({"a": 1.0, "b": 0.3, "c": 1.1}, {("a", "network"): "timed out"})
    said: list[str] = []
    assert without_slow_nodes(job, said.append).cluster.leave_out == ["b", "old"]
    assert said[-1] == "preflight: 3 nodes, of which b will be left out"
    assert "node a: network was not measured: timed out" in said
    cluster({"a": 1.0, "b": 1.0})
    assert without_slow_nodes(job, said.append).cluster == job.cluster
    cluster({"a": 1.0}, {("a", "storage"): "refused"})
    with pytest.raises(JobError, match="every node is slow or cannot be measured"):
        without_slow_nodes(job, said.append)


def test_a_job_file_gives_what_a_preflight_needs_and_flags_must_be_of_that() -> None:
    data = {"model": "demo", "input": {"uri": "in"}, "output": {"uri": "out"}, "cluster": {"kind": "local"}}
    assert parse_preflight(data, {"model": "demo"}).output is not None
    with pytest.raises(JobError, match="sampling: preflight takes only model, engine, output, cluster, storage"):
        parse_preflight(data, {"sampling": {"max_tokens": 3}})
    with pytest.raises(JobError, match=r"cluster\.kind"):
        parse_preflight({"cluster": {"kind": "cloud"}}, {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["preflight", "--of-median", "1.5"], "--of-profile and --of-median are shares above 0 and up to 1"),
        (["preflight", "--set", "sampling.max_tokens=3"], "sampling: preflight takes only"),
        (["preflight", "--profile", "nd-unknown"], "engine.profile: found 'nd-unknown'"),
        (["preflight", "--leave-out", "b"], "leave_out: only kind: address takes it"),
        (["preflight", "--scheduler", "tcp://127.0.0.1:1"], "insecure"),
        pytest.param(
            ["preflight", "--scheduler", "tcp://127.0.0.1:1", "--insecure"],
            "the scheduler at tcp://127.0.0.1:1 does not answer",
            marks=pytest.mark.slow,
        ),
        (["preflight", "gone.yaml"], "gone.yaml"),
        (["preflight", "--skip", "gravity"], "gravity"),
        (["preflight", "--fast"], "--fast"),
        (["run", "--preflight", "--model", "demo", "--input", "x", "--prompt", "p", "--output", "o"], "only a cluster of kind: address"),
    ],
)
def test_what_cannot_be_is_refused_with_exit_code_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output


def test_a_batch_job_has_no_nodes_yet_and_is_told_how_to_measure_them(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(batch_job()))
    for command in (["preflight", str(file)], ["run", str(file), "--preflight"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2, result.output
        assert "found azure-batch" in result.output
        assert "cluster.preflight: true makes the run measure them before their first unit" in result.output


@pytest.mark.parametrize("cluster", ["cloud", {"leave_out": "b"}, ["address"]])
def test_a_job_file_with_a_wrong_cluster_is_refused_with_exit_code_2(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps({"cluster": cluster}))
    result = CliRunner().invoke(main, ["preflight", str(tmp_path / "job.yaml"), "--leave-out", "a"])
    assert result.exit_code == 2, result.output
    assert "cluster" in result.output


def shown(*tables: Any) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_the_table_says_the_lowest_and_where_it_was(cluster: Callable[..., Scripted]) -> None:
    cluster({"a": 1.0, "b": 0.3}, azure=AzureNode(vm_size="Standard_ND96isr_H100_v5", priority="Spot", events=("Reboot not before now",)))
    found = preflight(PreflightSpec(job=PreflightJob(cluster=CLUSTER)), lambda _: None)
    text = shown(machines(found.nodes), figures(found.nodes, found.expected))
    assert "Standard_ND96isr_H100_v5, Spot, Reboot not before now" in text
    (line,) = [line for line in text.splitlines() if line.startswith("memory of cpu")]
    assert line.split() == ["memory", "of", "cpu", "3", "b", "cpu", "10", "10", "GB/s", "0%"]


def test_run_goes_on_without_the_slow_nodes(
    cluster: Callable[..., Scripted], make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster({"a": 1.0, "b": 0.3, "c": 1.1})
    job = make_job(cluster={"kind": "address", "address": "tcp://10.0.0.4:8786", "insecure": True})
    (tmp_path / "job.yaml").write_text(job.model_dump_json(exclude_defaults=True))
    ran: list[JobSpec] = []

    def stop_here(job: JobSpec) -> None:
        ran.append(job)
        raise JobError("far enough")

    monkeypatch.setattr("jobs.api.run", stop_here)
    result = CliRunner().invoke(main, ["run", str(tmp_path / "job.yaml"), "--preflight"])
    assert "far enough" in result.output
    assert "node b: slow in compute, 30% of the nodes' median" in result.output
    assert [job.cluster.leave_out for job in ran] == [["b"]]


@pytest.mark.engine
def test_this_machine_is_measured_for_real(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["preflight", "--model", str(tiny_model), "--output", str(tmp_path / "out"), "--disk", str(tmp_path), "--seconds", "16"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (node,) = found["nodes"]
    assert (node["name"], node["failures"], found["findings"]) == ("here", [], [])
    by_name = {measured["name"]: measured for measured in node["measurements"]}
    best = max((measured for measured in by_name.values() if measured["name"].startswith("GEMM float32")), key=lambda one: one["value"])
    assert by_name["GEMM float32 1024³"]["ceiling"] >= by_name["GEMM float32 1024³"]["value"]
    assert best["unit"] == "TFLOP/s"
    assert by_name["GEMM float32 gate, up, decode"]["detail"] == "128 x 64 x 192"
    assert by_name["GEMM float32 output layer"]["of_ceiling"] > 0
    assert by_name["memory copy"]["of_ceiling"] == 1.0
    assert by_name["memory triad"]["ceiling"] == by_name["memory copy"]["value"]
    assert {measured["group"] for measured in by_name.values()} >= {
        "attention, prefill", "attention, decode", "all-reduce", "process to process", "store write", "disk read"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
