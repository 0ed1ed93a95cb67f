"""Every ND size for every well-known model, as the installed vLLM takes it: real EngineArgs, no weights, memory by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.hardware import device_of
from pipeline.hardware import known_sizes
from pipeline.model import Model
from pipeline.profile import Machine
from pipeline.profile import plan_replicas
from pipeline.roofline import MEMORY_SHARE
from pipeline.roofline import OVERHEAD_BYTES
from pipeline.shape import known_shape
from pipeline.shape import shape_names
from schemas.errors import JobError
from schemas.hardware import Precision
from schemas.profile import Profile

pytestmark = pytest.mark.engine

_NODES = {
    ("nd96asr-v4", "llama-3.1-405b", "bf16"): 4, ("nd96amsr-a100-v4", "llama-3.1-405b", "bf16"): 2,
    ("nd96isr-h100-v5", "llama-3.1-405b", "bf16"): 2, ("nd128isr-ndr-gb200-v6", "llama-3.1-405b", "bf16"): 2,
    ("nd96asr-v4", "llama-3.1-405b", "int8"): 2,
}  # fmt: skip
"""Where one does not do: 405 billion weights in 16 bits are 812 GB, in 8 bits 410 GB."""


def checkpoint(name: str, precision: Precision) -> Model:
    shape = known_shape(name)
    return Model(
        path=f"/models/{name}",
        weights_digest=name,
        tokenizer_digest="t",
        template_digest="",
        weights_bytes=int(shape.weight_bytes(precision)),
        max_position_embeddings=shape.max_position_embeddings,
        vocab_size=shape.vocab,
        kv_values_per_token=int(shape.kv_bytes_per_token(1)),
    )


def machine_of(profile: Profile) -> Machine:
    device = device_of(profile)
    assert profile.node is not None
    assert device is not None
    return Machine(
        cores=int(profile.node.cores.value),
        memory_bytes=int(profile.node.memory_gb.value * 1e9),
        num_gpus=profile.node.devices,
        gpu_memory_bytes=int(device.memory_bytes),
    )


@pytest.mark.parametrize("model", shape_names())
@pytest.mark.parametrize("profile", known_sizes(), ids=lambda profile: profile.name)
def test_a_size_becomes_engine_arguments_and_the_model_fits(profile: Profile, model: str) -> None:
    from vllm import EngineArgs

    machine = machine_of(profile)
    assert profile.precision is not None
    for precision in {"bf16", profile.precision}:
        where = checkpoint(model, precision)  # type: ignore[arg-type]
        nodes = _NODES.get((profile.name, model, precision), 1)
        if nodes > 1:
            with pytest.raises(JobError, match=f"do not fit into this node's .* or let {nodes} such nodes hold it together"):
                plan_replicas(profile, machine, where, replicas=None, options={})
        plan = plan_replicas(profile, machine, where, replicas=None, options={}, most_nodes=nodes)
        width = plan.options.get("tensor_parallel_size", 1)
        assert plan.replicas * width == machine.num_gpus
        assert plan.nodes == nodes == plan.options.get("pipeline_parallel_size", 1)
        args = EngineArgs(model=where.path, **plan.options)
        assert (args.tensor_parallel_size, args.max_num_seqs, args.dtype) == (width, profile.max_num_seqs, "bfloat16")
        assert (args.pipeline_parallel_size, args.nnodes) == (nodes, nodes)
        width *= nodes
        assert args.gpu_memory_utilization == MEMORY_SHARE
        kv_bytes = where.kv_values_per_token * (1 if plan.options.get("kv_cache_dtype") == "fp8" else 2)
        room = width * (MEMORY_SHARE * machine.gpu_memory_bytes - OVERHEAD_BYTES) - where.weights_bytes
        assert room > 8 * 1024 * kv_bytes, (precision, width)
        longest = plan.options["max_model_len"]
        assert longest * kv_bytes <= room  # vLLM refuses to start with less
        assert plan.shortened is (longest < where.max_position_embeddings)
        assert plan.shortened is bool(plan.found)
        if width > 1:  # a smaller one does not hold 64 rows
            smaller = width / 2 * (MEMORY_SHARE * machine.gpu_memory_bytes - OVERHEAD_BYTES) - where.weights_bytes
            assert smaller < 64 * 1024 * kv_bytes
        if nodes > 1:  # one node less does not hold eight
            fewer = width * (1 - 1 / nodes) * (MEMORY_SHARE * machine.gpu_memory_bytes - OVERHEAD_BYTES) - where.weights_bytes
            assert fewer < 8 * 1024 * kv_bytes


def test_a_user_may_ask_for_more_devices_a_replica() -> None:
    profile = next(size for size in known_sizes() if size.name == "nd96isr-h100-v5")
    where = replace(checkpoint("llama-3.1-8b", "bf16"))
    plan = plan_replicas(profile, machine_of(profile), where, replicas=None, options={"tensor_parallel_size": 4})
    assert (plan.replicas, plan.options["tensor_parallel_size"]) == (2, 4)
    assert [plan.environment_of(index)["CUDA_VISIBLE_DEVICES"] for index in range(2)] == ["0,1,2,3", "4,5,6,7"]


@pytest.mark.parametrize(
    ("size", "model", "precision", "longest"),
    [("nd128isr-gb300-v6", "llama-3.1-405b", "nvfp4", 90_880), ("nd96asr-v4", "llama-3.1-8b", "bf16", 107_008)],
)
def test_a_model_whose_longest_row_has_no_room_gets_a_shorter_context(size: str, model: str, precision: Precision, longest: int) -> None:
    profile = next(known for known in known_sizes() if known.name == size)
    machine, where = machine_of(profile), checkpoint(model, precision)
    plan = plan_replicas(profile, machine, where, replicas=None, options={})
    assert (plan.options["max_model_len"], plan.options.get("tensor_parallel_size")) == (longest, None)
    wider = plan_replicas(profile, machine, where, replicas=None, options={"tensor_parallel_size": 2})
    assert (wider.options["max_model_len"], wider.shortened) == (131_072, False)
