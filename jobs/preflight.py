"""Preflight: the pillars on every node of a cluster, or here, and what follows from them. Asks nodes, decides nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import nullcontext
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import Protocol

from pydantic import ValidationError

from jobs.preflight_judge import Expected
from jobs.preflight_judge import busy
from jobs.preflight_judge import exit_code
from jobs.preflight_judge import expected_rates
from jobs.preflight_judge import findings
from jobs.preflight_judge import medians
from jobs.preflight_judge import to_leave_out
from pipeline import preflight as node_part
from pipeline import storage
from pipeline import tls
from pipeline.fit import foreseen_span
from pipeline.hardware import device_of
from pipeline.hardware import find_profile
from pipeline.hardware import known_sizes
from pipeline.hardware import profile_of_gpus
from pipeline.model import resolve_model
from pipeline.preflight import limit_s
from pipeline.preflight_shapes import part_of
from pipeline.shape import Shape
from pipeline.shape import known_shape
from pipeline.shape import read_shape
from pipeline.shape import shape_names
from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.job import ClusterSpec
from schemas.job import EngineSpec
from schemas.job import JobSpec
from schemas.job import OutputSpec
from schemas.preflight import PILLARS
from schemas.preflight import Answer
from schemas.preflight import Failure
from schemas.preflight import Finding
from schemas.preflight import NodeFacts
from schemas.preflight import NodeReport
from schemas.preflight import Order
from schemas.preflight import Pillar
from schemas.preflight import Thresholds
from schemas.preflight import World
from schemas.profile import Profile
from schemas.sampling import Frozen
from schemas.storage import StorageSpec

HERE = "here"
DEFAULT_SECONDS = 34.0
"""Of measuring. Starting processes comes on top: with torch 2.13, 10 s of two idle cores for the three that need it."""
_SHARES: dict[Pillar, float] = {"compute": 0.5, "memory": 0.1, "network": 0.15, "storage": 0.25}
_FACTS_S = 30.0
_ROWS = {True: (8192, 256), False: (512, 128)}
"""Of prefill and decode, on GPUs and on CPUs: within the profiles' max_num_batched_tokens and max_num_seqs, so such steps there are."""
_GPU_MODEL = "llama-3.1-8b"
_CPU_SHAPE = Shape(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True, max_position_embeddings=8192
)
"""SmolLM2-135M's config.json, the demo's model: the largest of which two CPU cores do all figures within a minute."""
_NO_NODES_YET = (
    "whose nodes are not there before its run asks for them; cluster.preflight: true makes the run measure them before their first unit"
)

Say = Callable[[str], None]


class PreflightJob(Frozen):
    """What a preflight needs to know of a job; the parts of a job file that say so."""

    model: str | None = None
    """A checkpoint, or a name of `pipeline.shape`. By default the one that a cluster's nodes run, and here one that fits."""
    engine: EngineSpec = EngineSpec()
    output: OutputSpec | None = None
    cluster: ClusterSpec = ClusterSpec()
    storage: StorageSpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightSpec:
    """What to measure, where, and when a figure is slow."""

    job: PreflightJob
    pillars: tuple[Pillar, ...] = PILLARS
    seconds: float = DEFAULT_SECONDS
    disk: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightResult:
    """What was found."""

    nodes: list[NodeReport]
    expected: dict[str, dict[str, Expected]]
    findings: list[Finding]

    @property
    def leave_out(self) -> list[str]:
        """Nodes that a job does better without."""
        return to_leave_out(self.nodes, self.findings)

    @property
    def exit_code(self) -> int:
        return exit_code(self.nodes, self.findings)

    def to_dict(self) -> dict[str, Any]:
        nodes = []
        for report in self.nodes:
            values = report.model_dump(mode="json")
            for measured, described in zip(report.measurements, values["measurements"], strict=True):
                rate = self.expected.get(report.name, {}).get(measured.rate or "")
                described["of_ceiling"] = measured.of_ceiling
                described["expected"] = None if rate is None else asdict(rate)
                described["of_profile"] = None if rate is None else measured.value / rate.value
            nodes.append(values)
        return {
            "exit_code": self.exit_code,
            "findings": [finding.model_dump(mode="json") for finding in self.findings],
            "leave_out": self.leave_out,
            "medians": medians(self.nodes),
            "nodes": nodes,
        }


class Nodes(Protocol):
    """Who is asked. See pipeline.preflight.node_task."""

    @property
    def names(self) -> list[str]: ...

    @property
    def models(self) -> Mapping[str, str | None]:
        """By node, the checkpoint on its disk that its engines run."""
        ...

    def host(self, name: str) -> str: ...

    def ask(self, what: str, orders: Mapping[str, dict[str, Any]], limit_s: float) -> dict[str, dict[str, Any] | str]:
        """By node what it answered, or why it did not."""
        ...


class HereNodes:
    """This machine, as the only node."""

    @property
    def names(self) -> list[str]:
        return [HERE]

    @property
    def models(self) -> Mapping[str, str | None]:
        return {HERE: None}

    def host(self, name: str) -> str:
        return "127.0.0.1"

    def ask(self, what: str, orders: Mapping[str, dict[str, Any]], limit_s: float) -> dict[str, dict[str, Any] | str]:
        ((name, order),) = orders.items()
        try:
            if what == "facts":
                return {name: node_part.facts(order["model"]).model_dump(mode="json")}
            return {name: node_part.measure(Order.model_validate(order)).model_dump(mode="json")}
        except JobError as error:
            return {name: str(error)}


def parse_preflight(data: Mapping[str, Any], flags: Mapping[str, Any]) -> PreflightJob:
    """A job file's fields, of which other sections do not matter here, with the flags' over them. Raises JobError."""
    if strange := sorted(set(flags) - set(PreflightJob.model_fields)):
        raise JobError(f"{strange[0]}: preflight takes only {', '.join(PreflightJob.model_fields)}")
    try:
        return PreflightJob.model_validate({field: data[field] for field in PreflightJob.model_fields if field in data})
    except ValidationError as error:
        raise JobError(describe_validation(error)) from None


def preflight(spec: PreflightSpec, say: Say) -> PreflightResult:
    """Measure and judge. Raises JobError where the cluster cannot be reached or is at work, or the model or profile is none."""
    job = spec.job
    if job.cluster.kind == "azure-batch":
        raise JobError(f"cluster.kind: found azure-batch, {_NO_NODES_YET}")
    storage.use(job.storage)
    asked = None if job.engine.profile == "auto" else find_profile(job.engine.profile)
    with _nodes(job) as nodes:
        facts = _facts(nodes, with_model=not job.model)
        shape = _own_shape(job) if job.model else None
        answers: dict[str, list[Answer]] = {name: [] for name in nodes.names}
        failures: dict[str, list[Failure]] = {name: [] for name in nodes.names}
        known = {name: found for name, found in facts.items() if isinstance(found, NodeFacts)}
        profiles = {name: asked or profile_of(found) for name, found in known.items()}
        for pillar in spec.pillars:
            orders = _orders(spec, pillar, known, profiles, shape, nodes)
            if not orders:
                continue
            seconds = next(iter(orders.values())).seconds
            say(f"{pillar}: {seconds:.0f} s on {len(orders)} {'node' if len(orders) == 1 else 'nodes'}")
            told = nodes.ask("measure", {name: order.model_dump(mode="json") for name, order in orders.items()}, limit_s(seconds))
            for name, answer in told.items():
                if isinstance(answer, str):
                    failures[name].append(Failure(pillar=pillar, reason=answer))
                else:
                    answers[name].append(Answer.model_validate(answer))
    reports = [
        NodeReport(
            name=name,
            facts=found if isinstance(found, NodeFacts) else None,
            profile=profile.name if (profile := profiles.get(name)) is not None and profile.node is not None else "",
            measurements=tuple(measured for answer in answers[name] for measured in answer.measurements),
            left_out=tuple(text for answer in answers[name] for text in answer.left_out),
            failures=tuple(failures[name]) if isinstance(found, NodeFacts) else (Failure(pillar="compute", reason=found),),
        )
        for name, found in facts.items()
    ]
    expected = {name: _expected(profile, len(nodes.names)) for name, profile in profiles.items() if profile is not None}
    return PreflightResult(nodes=reports, expected=expected, findings=findings(reports, expected, spec.thresholds))


def without_slow_nodes(job: JobSpec, say: Say, spec: PreflightSpec | None = None) -> JobSpec:
    """The job with slow nodes left out, of a cluster of kind address. Raises JobError, also where no node would be left."""
    if job.cluster.kind != "address":
        kind = f"azure-batch, {_NO_NODES_YET}" if job.cluster.kind == "azure-batch" else job.cluster.kind
        raise JobError(f"--preflight: only a cluster of kind: address has nodes to leave out, found {kind}")
    own = PreflightJob(model=None, engine=job.engine, output=job.output, cluster=job.cluster, storage=job.storage)
    left_out = sorted({*job.cluster.leave_out, *slow_nodes(spec or PreflightSpec(job=own), say)})
    return job.model_copy(update={"cluster": job.cluster.model_copy(update={"leave_out": left_out})})


def slow_nodes(spec: PreflightSpec, say: Say) -> list[str]:
    """Names of nodes that a job does better without; findings are said. Raises JobError, also where no node would be left."""
    found = preflight(spec, say)
    for report in found.nodes:
        for failure in report.failures:
            say(f"node {report.name}: {failure.pillar} was not measured: {failure.reason}")
    for text in (*map(sentence, found.findings), *busy(found.nodes)):
        say(text)
    slow = found.leave_out
    if len(slow) == len(found.nodes):
        raise JobError(
            f"preflight: every node is slow or cannot be measured ({', '.join(slow)}); "
            "see `tokenmill preflight`, and to run on them all the same leave the preflight out"
        )
    say(f"preflight: {len(found.nodes)} nodes" + (f", of which {', '.join(slow)} will be left out" if slow else ", none of them slow"))
    return slow


def sentence(finding: Finding) -> str:
    where = f"node {finding.node}" + ("" if finding.device in ("node", "cpu") else f", {finding.device}")
    return f"{where}: slow in {finding.group}, {finding.share:.0%} of {finding.against}: {finding.evidence}"


def profile_of(facts: NodeFacts) -> Profile | None:
    """Of the VM size that Azure says the node is, or that has these GPUs; None of a CPU that nobody described."""
    size = facts.azure.vm_size if facts.azure is not None else ""
    named = next((profile for profile in known_sizes() if profile.node is not None and size and profile.node.vm_size == size), None)
    return named or (profile_of_gpus(facts.gpu_name, len(facts.gpus)) if facts.gpus else None)


def precisions_of(facts: NodeFacts) -> tuple[str, ...]:
    """In which to multiply. Those that a GPU lacks come back as left out; 16-bit floats on a CPU without them take minutes."""
    if facts.gpus:
        four_bits = ("nvfp4",) if "B200" in facts.gpu_name or "B300" in facts.gpu_name else ()
        return ("bf16", "fp8", "int8", *four_bits)
    half = {"float16": ("avx512_fp16",), "bf16": ("avx512_bf16", "amx_bf16"), "int8": ("avx512_vnni", "amx_int8")}
    arm = facts.architecture == "aarch64"  # /proc/cpuinfo names other flags there
    return ("float32", *(name for name, flags in half.items() if (arm and name == "bf16") or set(flags) & set(facts.cpu_flags)))


def world_of(counts: Mapping[str, int], hosts: Mapping[str, str], port: int) -> dict[str, World]:
    """By node, given how many processes each has; the first node's first process is where they meet."""
    places = tuple(place for place, count in enumerate(counts.values()) for _ in range(count))
    first = next(iter(counts))
    return {
        name: World(address=hosts[first], port=port, places=places, first_rank=places.index(place), own_address=hosts[name])
        for place, name in enumerate(counts)
    }


def _nodes(job: PreflightJob) -> AbstractContextManager[Nodes]:
    if job.cluster.kind != "address":
        return nullcontext(HereNodes())
    if job.cluster.keys is not None:
        tls.check_apart(job.cluster.keys, [job.output.uri] if job.output else [])
    from jobs.cluster.dask_nodes import DaskNodes  # Dask: a second

    return DaskNodes(job.cluster)


def _facts(nodes: Nodes, *, with_model: bool) -> dict[str, NodeFacts | str]:
    told = nodes.ask("facts", {name: {"model": nodes.models[name] if with_model else None} for name in nodes.names}, _FACTS_S)
    return {name: answer if isinstance(answer, str) else NodeFacts.model_validate(answer) for name, answer in told.items()}


def _own_shape(job: PreflightJob) -> Shape:
    if job.model in shape_names():
        return known_shape(job.model)
    folder = Path(storage.absolute(str(job.model)))  # which need not hold weights
    return read_shape(folder if (folder / "config.json").is_file() else resolve_model(str(job.model)).path)


def width_of(shape: Shape, profile: Profile | None, options: Mapping[str, Any]) -> int:
    """Devices of such a node that a replica takes, as a run cuts it; 1 where nobody has described the node. Raises JobError."""
    device = device_of(profile) if profile is not None else None
    if profile is None or profile.node is None or device is None:
        return 1
    span = foreseen_span(profile, device, shape, options, weight_bytes=shape.weight_bytes(shape.precision))
    return min(span.devices, profile.node.devices) if span is not None else profile.node.devices


def _orders(
    spec: PreflightSpec,
    pillar: Pillar,
    facts: Mapping[str, NodeFacts],
    profiles: Mapping[str, Profile | None],
    shape: Shape | None,
    nodes: Nodes,
) -> dict[str, Order]:
    devices = {name: found.gpus or ("cpu",) for name, found in facts.items()}
    worlds: dict[str, World] = {}
    if pillar == "network" and facts:
        alone = len(facts) == 1
        counts = {name: max(len(devices[name]), 2 if alone and not found.gpus else 1) for name, found in facts.items()}
        first = next(iter(facts.values()))
        worlds = world_of(counts, {name: nodes.host(name) for name in facts}, first.free_port)
    orders = {}
    for name, found in facts.items():
        prefill_rows, decode_rows = _ROWS[bool(found.gpus)]
        usual = known_shape(_GPU_MODEL) if found.gpus else _CPU_SHAPE
        whole = shape or (Shape(**found.shape) if found.shape else usual)
        orders[name] = Order(
            pillar=pillar,
            seconds=spec.seconds * _SHARES[pillar],
            devices=devices[name],
            core_ids=found.core_ids,
            shape=asdict(part_of(whole, width_of(whole, profiles[name], spec.job.engine.options))),
            prefill_rows=prefill_rows,
            decode_rows=decode_rows,
            precisions=precisions_of(found),
            output=spec.job.output.uri if spec.job.output else None,
            disk=spec.disk,
            world=worlds.get(name),
        )
    return orders


def _expected(profile: Profile, num_nodes: int) -> dict[str, Expected]:
    device = device_of(profile)
    return expected_rates(profile.node, device, num_nodes=num_nodes) if profile.node is not None and device is not None else {}
