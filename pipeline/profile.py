"""Which profile fits this machine, and what it makes of one model: replicas, engine arguments, environment."""

from __future__ import annotations

import ctypes.util
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.fit import LONGEST_ROW
from pipeline.fit import SPLITS
from pipeline.fit import Span
from pipeline.fit import asked_span
from pipeline.fit import kv_width_bytes
from pipeline.fit import longest_row
from pipeline.fit import span_of
from pipeline.fit import whole
from pipeline.gpus import find_gpus
from pipeline.hardware import device_of
from pipeline.hardware import find_profile
from pipeline.hardware import profile_of_gpus
from pipeline.model import Model
from pipeline.tuned import find_tuned
from schemas.errors import JobError
from schemas.job import EngineSpec
from schemas.job import SimulatedOptions
from schemas.profile import Profile
from schemas.tuned import Tuned

_MEMORY_SHARE = 0.8
"""Of the machine's memory that all replicas together may plan with."""
_ENGINE_OVERHEAD_BYTES = 2 << 30
"""vLLM, torch and activations of one CPU replica; 1.4 GB measured with SmolLM2-135M, rounded up."""
_SHORT_ROW = 512
"""Tokens that there is room for in each row of a batch, however short they are said to be."""
_LARGEST_BLOCK = 128
"""Tokens; the engine's own choice on CPUs, and ours are no larger."""
_ROW_SLACK = 64 + _LARGEST_BLOCK
"""Tokens of a row that nobody counted: a chat template's own, and the empty part of its last block."""
ALLOCATORS = ("tcmalloc", "mimalloc", "tbbmalloc", "jemalloc")
"""Best first. Any of them spares the engine glibc's page faults on every logits buffer."""
_LIBRARIES = {
    # Name to what the dynamic loader calls it, and where Python packages put it, under their prefix or their site-packages.
    "tcmalloc": ("tcmalloc_minimal", ()),
    "mimalloc": ("mimalloc", ("cmeel.prefix/lib/libmimalloc.so",)),
    "tbbmalloc": ("tbbmalloc_proxy", ("lib/libtbbmalloc_proxy.so.2",)),
    "jemalloc": ("jemalloc", ()),
    "iomp": ("iomp5", ("lib/libiomp5.so",)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a profile needs to know of a node."""

    cores: int
    memory_bytes: int
    core_ids: tuple[int, ...] = ()
    """By default from 0."""
    cpu_flags: frozenset[str] = frozenset()
    num_gpus: int = 0
    visible_gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; by default all, by number."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Of those worth preloading, what was found, and where."""
    cpu_name: str = ""
    gpu_name: str = ""
    gpu_memory_bytes: int = 0
    """Of one GPU; 0 where nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPlan:
    """How the engines of one machine are cut."""

    profile: str
    replicas: int
    options: dict[str, Any]
    """Engine arguments of every replica."""
    environment: dict[str, str] = field(default_factory=dict)
    """Must be set before a replica's process starts."""
    device_environments: tuple[dict[str, str], ...] = ()
    """One per replica, over `environment`, where replicas differ (which GPU)."""
    bare: bool = False
    """Engine processes get nothing of Tokenmill's own environment: what somebody has who calls the engine by hand."""
    found: str = ""
    """For people: where the settings come from, if they were tuned, and what they leave out."""
    nodes: int = 1
    """That its one replica spans, each with a stage of the model's layers; see pipeline/group.py."""
    shortened: bool = False
    """Whether max_model_len is less than the model's context because a replica's KV cache holds no more."""
    usd_per_hour: float | None = None
    """Of this node, as the profile says."""

    def environment_of(self, index: int) -> dict[str, str]:
        own = self.device_environments[index % len(self.device_environments)] if self.device_environments else {}
        return {**self.environment, **own}


def this_machine(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Machine:
    """Looks at /proc and the scheduler's affinity, and for GPUs below `root`; which of those are visible, the environment says."""
    said = _cpuinfo()
    flags = set((said.get("flags") or said.get("Features") or "").split())
    if said.get("vendor_id") == "AuthenticAMD":
        flags |= {f"amd_{flag}" for flag in flags if flag.startswith("avx512")}  # its units are wider than others' of the same flag
    gpus = find_gpus(root)
    given = environment.get("CUDA_VISIBLE_DEVICES")
    # As the driver reads it: what follows one that is none, such as -1, is not seen either.
    visible = tuple(takewhile(lambda device: device and not device.startswith("-"), (given or "").split(",")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cores=cores,
        core_ids=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        memory_bytes=min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _container_memory_bytes()),
        cpu_flags=frozenset(flags),
        num_gpus=len(visible) if given is not None else gpus.count,
        visible_gpus=visible,
        libraries=_find_libraries(),
        cpu_name=said.get("model name", ""),
        gpu_name=gpus.name,
        gpu_memory_bytes=gpus.memory_bytes,
    )


def node_kind(machine: Machine) -> str:
    """Names machines on which the same settings are good, as part of a file's name."""
    memory_gb = round(machine.memory_bytes / 1e9 / 4) * 4  # kernels differ by some hundred MB
    parts = [f"{machine.cores}-cores", machine.cpu_name or "cpu", f"{memory_gb}gb"]
    if machine.num_gpus:
        parts = [f"{machine.num_gpus}x", machine.gpu_name or "gpu", *parts[:1]]
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def _cpuinfo() -> dict[str, str]:
    """Of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _find_libraries() -> dict[str, str]:
    roots = (Path(sys.prefix), Path(sysconfig.get_path("purelib")))
    found = {}
    for name, (soname, places) in _LIBRARIES.items():
        paths = [str(root / place) for place in places for root in roots if (root / place).is_file()]
        where = next(iter(paths), None) or ctypes.util.find_library(soname)
        if where:
            found[name] = where
    return found


def _container_memory_bytes() -> int:
    """The cgroup's limit; no limit is a very large one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return 1 << 62


def load_profile(name: str, machine: Machine) -> Profile:
    """A profile by name or path, or `auto`: of the VM size that has this machine's GPUs, or of what there is. Raises JobError."""
    if name != "auto":
        return find_profile(name)
    if not machine.num_gpus:
        return find_profile("local-cpu")
    return profile_of_gpus(machine.gpu_name, machine.num_gpus) or find_profile("local-gpu")


def asked_options(engine: EngineSpec) -> dict[str, Any]:
    """Engine arguments that a job asks for, itself or by its ordering."""
    return {**({"enable_prefix_caching": True} if engine.ordering == "auto" else {}), **engine.options}


def cut_machine(
    engine: EngineSpec,
    model: Model,
    *,
    replicas: int | None,
    numerics: Mapping[str, Any] | None = None,
    output_tokens: int | None = None,
    row_tokens: int | None = None,
    most_nodes: int = 1,
) -> ReplicaPlan:
    """The replicas that this machine runs: as tuned, where the profile is auto and something was. Raises JobError.

    `most_nodes` is how many machines one replica may span: more than this one only where nodes of a cluster can meet.
    `numerics` are options that a job was begun with; they win over the profile's, as the job's own win over both.
    `output_tokens` is the most that the job may generate: a small one is done sooner with engines that are up sooner.
    `row_tokens` is about the length of its rows with their completions: see plan_replicas.
    """
    # Rows that begin alike are kept together (engine.ordering), and then a prefix cache costs nothing to speak of.
    options = {**(numerics or {}), **asked_options(engine)}
    if engine.kind == "simulated":
        options = SimulatedOptions.model_validate(engine.options).model_dump()
        _check_span(Span(devices=1, nodes=options["nnodes"]), most_nodes, replicas)
        return ReplicaPlan(profile="simulated", replicas=replicas or 1, options=options, nodes=options["nnodes"])
    machine = this_machine()
    tuned = find_tuned(model.weights_digest, node_kind(machine)) if engine.profile == "auto" else None
    sooner = tuned.sooner if tuned is not None else ()
    quick = next((one.profile for one in sooner if output_tokens is not None and output_tokens < one.below_tokens), None)
    profile = quick or (tuned.profile if tuned is not None else load_profile(engine.profile, machine))
    plan = plan_replicas(profile, machine, model, replicas=replicas, options=options, row_tokens=row_tokens, most_nodes=most_nodes)
    if tuned is None:
        return plan
    origin = _where_from(tuned) + (", with those that are up sooner, for a small job" if quick else "")
    return replace(plan, found="; ".join(filter(None, (origin, plan.found))))


def _where_from(tuned: Tuned) -> str:
    times = f", {tuned.times_defaults:.1f} times {tuned.engine}'s own defaults" if tuned.times_defaults else ""
    return f"engine settings as tuned for this model and node ({tuned.made_at[:10]}{times}); see tokenmill tune --show"


def plan_replicas(
    profile: Profile,
    machine: Machine,
    model: Model,
    *,
    replicas: int | None,
    options: dict[str, Any],
    row_tokens: int | None = None,
    most_nodes: int = 1,
) -> ReplicaPlan:
    """Cut a machine into engine replicas for one model. The user's options win. Raises JobError where the model cannot fit.

    On CPUs a KV cache is no larger than a batch of rows of `row_tokens` fills, where somebody knows them: the engine writes all of it
    once as it starts, which a virtual machine may take seconds for. Longer rows than that are computed in smaller batches.
    Where one machine cannot hold it, but up to `most_nodes` like this one together can, it is this node's part of one replica.
    """
    model_len = min(model.max_position_embeddings, profile.max_model_len or model.max_position_embeddings)
    made: dict[str, Any] = {
        "max_num_seqs": profile.max_num_seqs,
        "max_num_batched_tokens": profile.max_num_batched_tokens,
        "max_model_len": model_len,
        "dtype": profile.dtype,
        **profile.options_for(machine.cpu_flags),
    }
    if profile.device == "gpu":
        return _plan_gpus(profile, machine, model, replicas or profile.replicas, options, made, most_nodes)
    nodes = asked_span(options).nodes
    _check_span(Span(devices=1, nodes=nodes), most_nodes, replicas or profile.replicas)
    if nodes > 1:
        # vLLM 0.32 makes what passes between stages where it warms up for compiled code; without, its CPU runner stops at the first row.
        replicas, made = 1, made | {"distributed_executor_backend": "mp", "enforce_eager": False}
    made["dtype"] = next((dtype for flag, dtype in profile.dtype_by_cpu_flag.items() if flag in machine.cpu_flags), profile.dtype)
    dtype = str(options.get("dtype", made["dtype"]))
    per_token = model.kv_values_per_token * kv_width_bytes({}, dtype)
    model_len = whole(options, "max_model_len", model_len)
    # Room for one longest row at least (vLLM refuses less, and keeps a block for itself), and no more than a full batch could use.
    length = model_len if row_tokens is None else min(model_len, max(row_tokens + _ROW_SLACK, _SHORT_ROW))
    kv_bytes = min(profile.kv_cache_bytes or 1 << 62, per_token * length * whole(options, "max_num_seqs", profile.max_num_seqs))
    kv_bytes = max(kv_bytes, int(per_token * max(LONGEST_ROW * model_len, model_len + 2 * _LARGEST_BLOCK)))
    kv_bytes = whole(options, "kv_cache_memory_bytes", kv_bytes)
    made["kv_cache_memory_bytes"] = kv_bytes
    need = int(1.2 * model.weights_bytes / nodes) + kv_bytes + _ENGINE_OVERHEAD_BYTES
    usable = int(_MEMORY_SHARE * machine.memory_bytes)
    fit = usable // need
    if fit < (replicas or 1):
        what = f"cluster.replicas: {replicas} do not fit" if fit else "model: it does not fit"
        raise JobError(
            f"{what}: one replica needs about {need / 1e9:.1f} GB ({model.weights_bytes / 1e9:.1f} GB of weights, "
            f"{kv_bytes / 1e9:.1f} GB of KV cache), and {usable / 1e9:.1f} GB of this machine's memory may be used; "
            "set engine.options.max_model_len lower, or take a smaller model"
        )
    threads = min(profile.cores_per_replica or machine.cores, machine.cores)
    # Its own number a profile may have from rows that are shorter than these.
    count = replicas or max(1, min(profile.replicas or machine.cores // threads, fit))
    environment = {**profile.environment, "OMP_NUM_THREADS": str(max(1, machine.cores // count))}
    wanted = [name for name in ALLOCATORS if name in machine.libraries][:1] if profile.preload is None else profile.preload
    if paths := [machine.libraries[name] for name in wanted if name in machine.libraries]:
        environment["LD_PRELOAD"] = ":".join(paths)
    pinned = tuple(_pinned(machine, index, count) for index in range(count)) if profile.pin_cores and count <= machine.cores else ()
    return ReplicaPlan(
        profile=profile.name,
        replicas=count,
        options={**made, **options},
        environment=environment,
        device_environments=pinned,
        nodes=nodes,
        usd_per_hour=profile.usd_per_hour,
    )


def _plan_gpus(
    profile: Profile,
    machine: Machine,
    model: Model,
    replicas: int | None,
    options: dict[str, Any],
    made: dict[str, Any],
    most_nodes: int,
) -> ReplicaPlan:
    """The fewest GPUs a replica that hold the weights and a batch; where they do not hold the model's longest row too, a shorter one."""
    asked = {**profile.options, **options}
    most = machine.num_gpus or (profile.node.devices if profile.node is not None else 0)
    memory_bytes, context = _gpu_memory_bytes(profile, machine), made["max_model_len"]
    kv_bytes = model.kv_values_per_token * kv_width_bytes(asked, str(asked.get("dtype", profile.dtype)))
    sizes = {"weight_bytes": model.weights_bytes, "kv_bytes_per_token": kv_bytes, "memory_bytes": memory_bytes}
    span = span_of(asked, **sizes, most=most, context=context)
    if span is None or (span.nodes > most_nodes and "nnodes" not in asked):
        together = (
            f", or let {span.nodes} such nodes hold it together: see jobs/cluster/README.md, Replicas over several nodes" if span else ""
        )
        raise JobError(
            f"model: its {model.weights_bytes / 1e9:.0f} GB of weights and a batch do not fit into this node's {most} GPUs of "
            f"{memory_bytes / 1e9:.0f} GB; make it smaller by `tokenmill model prepare`, take a larger node{together}; see `tokenmill plan`"
        )
    _check_span(span, most_nodes, replicas)
    width = span.devices
    count = 1 if span.nodes > 1 else replicas or max(1, most // width)
    if count * width > most:
        raise JobError(f"cluster.replicas: {count} replicas of {width} GPUs each need {count * width}, this machine has {most}")
    longest = longest_row(asked, **sizes, span=span) or context
    shortened = longest < context and "max_model_len" not in asked
    if not SPLITS & set(asked):
        made |= {"tensor_parallel_size": width} if width > 1 else {}
        made |= {"pipeline_parallel_size": span.nodes, "nnodes": span.nodes} if span.nodes > 1 else {}
    made |= {"distributed_executor_backend": "mp"} if span.nodes > 1 else {}
    made |= {"max_model_len": longest} if shortened else {}
    devices = machine.visible_gpus or tuple(map(str, range(most)))
    visible = tuple({"CUDA_VISIBLE_DEVICES": ",".join(devices[index * width : (index + 1) * width])} for index in range(count))
    return ReplicaPlan(
        profile=profile.name,
        replicas=count,
        options={**made, **options},
        environment=profile.environment,
        device_environments=visible,
        found=_shortened_words(longest, context, span) if shortened else "",
        nodes=span.nodes,
        shortened=shortened,
        usd_per_hour=profile.usd_per_hour,
    )


def _gpu_memory_bytes(profile: Profile, machine: Machine) -> int:
    """Of one: what is described, which a plan knows too, but no more than this machine's has. 0 where nobody knows."""
    device = device_of(profile)
    known = [size for size in (machine.gpu_memory_bytes, int(device.memory_bytes) if device is not None else 0) if size]
    return min(known, default=0)


def _check_span(span: Span, most_nodes: int, replicas: int | None) -> None:
    """Raises JobError where a replica would span machines that cannot meet, or not one replica alone does."""
    if span.nodes > most_nodes:
        raise JobError(
            f"engine.options.nnodes: found {span.nodes}, but one replica may span {most_nodes} here: nodes meet in the rendezvous of a "
            "cluster; see jobs/cluster/README.md, Replicas over several nodes"
        )
    if span.nodes > 1 and replicas not in (None, 1):
        raise JobError(f"--replicas: found {replicas}, expected 1: this node is one part of a replica that spans {span.nodes} nodes")


def _shortened_words(longest: int, context: int, span: Span) -> str:
    where = f"{span.all_devices} GPUs" if span.all_devices > 1 else "one GPU"
    return (
        f"prompt and completion may have {longest:,} tokens of the model's {context:,}: the KV cache of a replica on {where} holds no "
        "longer row; for longer ones set engine.options.tensor_parallel_size higher"
    )


def _pinned(machine: Machine, index: int, count: int) -> dict[str, str]:
    """For OpenMP in the replica's own process, and for an engine core in another one, which vLLM pins itself."""
    ids = machine.core_ids or tuple(range(machine.cores))
    own = ids[index * len(ids) // count : (index + 1) * len(ids) // count]
    return {
        "OMP_PLACES": ",".join(f"{{{core}}}" for core in own),
        "OMP_PROC_BIND": "close",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, own)),
    }
