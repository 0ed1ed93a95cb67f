"""What a benchmark's figures depend on: model, machine, settings, versions. Looks, and measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.accept import Accepted
from jobs.bench.result import Setting
from jobs.bench.rows import plan_of
from pipeline.engine.engine import EngineInfo
from pipeline.model import Model
from pipeline.profile import Machine
from pipeline.profile import this_machine
from pipeline.versions import installed
from pipeline.versions import versions
from pipeline.worker import ENVIRONMENT

_PACKAGES = ("torch", "transformers", "pyarrow", "mlcommons-loadgen")


def setting_of(accepted: Accepted, engine: EngineInfo, start_s: Mapping[str, float]) -> Setting:
    """The engine's own account of itself comes before what was planned."""
    plan, job, machine = plan_of(accepted), accepted.job, this_machine()
    return Setting(
        model={
            "name": job.model,
            "path": accepted.model.path,
            "weights_sha256": accepted.model.weights_digest,
            "tokenizer_sha256": accepted.model.tokenizer_digest,
            "weights_bytes": accepted.model.weights_bytes,
            "quantisation": quantisation_of(accepted.model),
        },
        machine=described(machine),
        settings={
            "engine": engine.kind,
            "profile": plan.profile,
            "replicas": plan.replicas,
            "dtype": engine.dtype,
            "quantisation": plan.options.get("quantization") or quantisation_of(accepted.model),
            "prefix_caching": plan.options.get("enable_prefix_caching"),
            "ordering": job.engine.ordering,
            "ignore_eos": job.sampling.ignore_eos,
            "max_tokens": job.sampling.max_tokens,
            "temperature": job.sampling.temperature,
            "options": dict(plan.options),
            "environment": {**({} if plan.bare else ENVIRONMENT), **plan.environment},
        },
        versions={**versions(), "engine": f"{engine.kind} {engine.version}", **installed(*_PACKAGES)},
        start_s={name: round(seconds, 2) for name, seconds in start_s.items()},
        cores=machine.cores,
    )


def described(machine: Machine) -> dict[str, Any]:
    return {
        "cores": machine.cores,
        "cpu": machine.cpu_name,
        "memory_bytes": machine.memory_bytes,
        "gpus": machine.num_gpus,
        "gpu": machine.gpu_name,
    }


def quantisation_of(model: Model) -> str:
    """As the checkpoint names it; `none` where its weights are plain."""
    quantised = _json_of(model, "config.json").get("quantization_config") or {}
    return " ".join(str(quantised[key]) for key in ("quant_method", "format") if quantised.get(key)) or "none"


def eos_ids_of(model: Model) -> frozenset[int]:
    """Tokens that end a completion, as the checkpoint says."""
    found = _json_of(model, "generation_config.json").get("eos_token_id") or _json_of(model, "config.json").get("eos_token_id") or []
    return frozenset([found] if isinstance(found, int) else found)


def _json_of(model: Model, name: str) -> dict[str, Any]:
    path = Path(model.path, name)
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
