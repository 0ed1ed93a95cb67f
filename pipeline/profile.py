"""Which profile fits this machine, and what it makes of one model: replicas, engine arguments, environment."""

from __future__ import annotations

import ctypes.util
import os
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.model import Model
from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.job import EngineSpec
from schemas.job import SimulatedOptions
from schemas.profile import Profile

_FOLDER = Path(__file__).parent / "profiles"
_MEMORY_SHARE = 0.8
"""Of the machine's memory that all replicas together may plan with."""
_ENGINE_OVERHEAD_BYTES = 2 << 30
"""vLLM, torch and activations of one CPU replica; 1.4 GB measured with SmolLM2-135M, rounded up."""
_WIDTH_BYTES = {"float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a profile needs to know of a node."""

    cores: int
    memory_bytes: int
    cpu_flags: frozenset[str] = frozenset()
    num_gpus: int = 0
    visible_gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; by default all, by number."""
    tcmalloc: str | None = None


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

    def environment_of(self, index: int) -> dict[str, str]:
        own = self.device_environments[index % len(self.device_environments)] if self.device_environments else {}
        return {**self.environment, **own}


def this_machine() -> Machine:
    """Looks at /proc, the scheduler's affinity and CUDA's or ROCm's device nodes."""
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.split(":", 1)[1].split())
                break
    except OSError:
        pass
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(list(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = tuple(device for device in (given or "").split(",") if device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        cores=cores,
        memory_bytes=min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _container_memory_bytes()),
        cpu_flags=frozenset(flags),
        num_gpus=len(visible) if given is not None else gpus,
        visible_gpus=visible,
        tcmalloc=ctypes.util.find_library("tcmalloc_minimal"),
    )


def _container_memory_bytes() -> int:
    """The cgroup's limit; no limit is a very large one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return 1 << 62


def _whole(options: dict[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise JobError(f"engine.options.{name}: found {value!r}, expected a whole number above 0")
    return value


def load_profile(name: str, machine: Machine) -> Profile:
    """A profile by name, or `auto`. Raises JobError naming those there are."""
    known = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
    chosen = ("local-gpu" if machine.num_gpus else "local-cpu") if name == "auto" else name
    if chosen not in known:
        raise JobError(f"engine.profile: found {name!r}; allowed are auto, {', '.join(known)}")
    try:
        return Profile.model_validate({"name": chosen, **yaml.safe_load(known[chosen].read_text())})
    except ValidationError as error:
        raise JobError(f"profile {known[chosen]}: {describe_validation(error)}") from None


def cut_machine(engine: EngineSpec, model: Model, *, replicas: int | None) -> ReplicaPlan:
    """The replicas that this machine runs. Raises JobError."""
    if engine.kind == "simulated":
        options = SimulatedOptions.model_validate(engine.options).model_dump()
        return ReplicaPlan(profile="simulated", replicas=replicas or 1, options=options)
    machine = this_machine()
    return plan_replicas(load_profile(engine.profile, machine), machine, model, replicas=replicas, options=engine.options)


def plan_replicas(profile: Profile, machine: Machine, model: Model, *, replicas: int | None, options: dict[str, Any]) -> ReplicaPlan:
    """Cut a machine into engine replicas for one model. The user's options win. Raises JobError where the model cannot fit."""
    model_len = min(model.max_position_embeddings, profile.max_model_len or model.max_position_embeddings)
    made: dict[str, Any] = {
        "max_num_seqs": profile.max_num_seqs,
        "max_num_batched_tokens": profile.max_num_batched_tokens,
        "max_model_len": model_len,
        "dtype": profile.dtype,
        **profile.options,
    }
    if profile.device == "gpu":
        width = _whole(options, "tensor_parallel_size", 1)
        count = replicas or max(1, machine.num_gpus // width)
        devices = machine.visible_gpus or tuple(map(str, range(machine.num_gpus)))
        if count * width > machine.num_gpus:
            raise JobError(
                f"cluster.replicas: {count} replicas of {width} GPUs each need {count * width}, this machine has {machine.num_gpus}"
            )
        visible = tuple({"CUDA_VISIBLE_DEVICES": ",".join(devices[index * width : (index + 1) * width])} for index in range(count))
        return ReplicaPlan(
            profile=profile.name, replicas=count, options={**made, **options}, environment=profile.environment, device_environments=visible
        )
    made["dtype"] = next((dtype for flag, dtype in profile.dtype_by_cpu_flag.items() if flag in machine.cpu_flags), profile.dtype)
    dtype = str(options.get("dtype", made["dtype"]))
    per_token = model.kv_values_per_token * _WIDTH_BYTES.get(dtype, 2)
    model_len = _whole(options, "max_model_len", model_len)
    # Room for one longest row at least (vLLM refuses less), and no more than a full batch of longest rows could use.
    kv_bytes = min(profile.kv_cache_bytes or 1 << 62, per_token * model_len * _whole(options, "max_num_seqs", profile.max_num_seqs))
    kv_bytes = max(kv_bytes, int(1.05 * per_token * model_len))
    kv_bytes = _whole(options, "kv_cache_memory_bytes", kv_bytes)
    made["kv_cache_memory_bytes"] = kv_bytes
    need = int(1.2 * model.weights_bytes) + kv_bytes + _ENGINE_OVERHEAD_BYTES
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
    count = replicas or max(1, min(machine.cores // threads, fit))
    environment = {**profile.environment, "OMP_NUM_THREADS": str(max(1, machine.cores // count))}
    if machine.tcmalloc:
        environment["LD_PRELOAD"] = machine.tcmalloc
    return ReplicaPlan(profile=profile.name, replicas=count, options={**made, **options}, environment=environment)
