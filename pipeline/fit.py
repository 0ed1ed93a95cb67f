"""Fit: how many GPUs hold a replica, and how long a row may be in it. Sizes and engine arguments in, numbers out.

The one rule by which a run cuts its nodes and a plan foresees it. Nobody has seen rows then: they are taken to be of LIVE_TOKENS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.roofline import MEMORY_SHARE
from pipeline.roofline import devices_needed
from pipeline.roofline import kv_room_bytes
from pipeline.shape import Shape
from schemas.errors import JobError
from schemas.hardware import Device
from schemas.profile import Profile

LIVE_TOKENS = 1024
"""Of a row in the batch: prompt and half the completion. Assumed."""
LONGEST_ROW = 1.05
"""Times its keys and values that a cache has room for at least: vLLM counts in blocks, and refuses less than one longest row."""
MOST_NODES = 16
"""That one replica may span: Llama 3.1 405B in 16 bits takes four of the smallest ND nodes."""
SPLITS = frozenset({"tensor_parallel_size", "pipeline_parallel_size", "nnodes"})
"""Engine arguments that say how a replica is split; with any of them, nothing is worked out."""
_UNEVEN = 1.1
"""Times the mean that the fullest stage holds: layers are whole, and the first and the last have the embedding or the output layer too."""
_STEP = 256
"""Tokens that the longest row is a multiple of."""
_WIDTH_BYTES = {"float32": 4}


def whole(options: Mapping[str, Any], name: str, default: int) -> int:
    """An engine argument that counts something. Raises JobError where it does not."""
    value = options.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise JobError(f"engine.options.{name}: found {value!r}, expected a whole number above 0")
    return value


def kv_width_bytes(options: Mapping[str, Any], dtype: str) -> int:
    """Of one number in the KV cache; `dtype` is that of the activations."""
    return 1 if str(options.get("kv_cache_dtype", "auto")).startswith("fp8") else _WIDTH_BYTES.get(dtype, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What one replica takes up."""

    devices: int
    """Of each node."""
    nodes: int = 1

    @property
    def all_devices(self) -> int:
        return self.nodes * self.devices

    @property
    def excess(self) -> float:
        """Times what the model takes up that all devices together must have, as stages are not even."""
        return _UNEVEN if self.nodes > 1 else 1.0


def span_of(
    options: Mapping[str, Any], *, weight_bytes: float, kv_bytes_per_token: float, memory_bytes: float, most: int, context: int
) -> Span | None:
    """GPUs of one replica: as asked for, or the fewest that hold the weights and a batch. 1 where nobody knows their memory.

    Where a node's `most` do not hold them: all of as few nodes as do, each with a stage of the model's layers. None where not even
    MOST_NODES hold them. Raises JobError where an option is none.
    """
    if not memory_bytes or SPLITS & set(options):
        return asked_span(options)
    for nodes in range(1, MOST_NODES + 1):
        # Stages split the layers, so that each node has its share of weights, keys and values.
        share = Span(devices=most, nodes=nodes).excess / nodes
        devices = devices_needed(
            weight_bytes=weight_bytes * share,
            kv_bytes_per_token=kv_bytes_per_token * share,
            live_tokens=min(LIVE_TOKENS, whole(options, "max_model_len", context)),
            memory_bytes=memory_bytes,
            most=most,
            memory_share=_memory_share(options),
        )
        if devices is not None:
            return Span(nodes=nodes, devices=devices if nodes == 1 else most)
    return None


def foreseen_span(profile: Profile, device: Device, shape: Shape, options: Mapping[str, Any], *, weight_bytes: float) -> Span | None:
    """What a replica will take up on a node that is not here, as a run there cuts it. Raises JobError where an option is none."""
    assert profile.node is not None
    asked = {**profile.options, **options}
    return span_of(
        asked,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=shape.kv_bytes_per_token(kv_width_bytes(asked, str(asked.get("dtype", profile.dtype)))),
        memory_bytes=device.memory_bytes,
        most=profile.node.devices,
        context=shape.max_position_embeddings,
    )


def asked_span(options: Mapping[str, Any]) -> Span:
    """As vLLM understands the three options. Raises JobError where they do not divide."""
    width, stages, nodes = (whole(options, name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size", "nnodes"))
    if width * stages % nodes:
        raise JobError(
            f"engine.options.nnodes: found {nodes}, expected a divisor of the replica's {width * stages} devices "
            f"(tensor_parallel_size {width} times pipeline_parallel_size {stages})"
        )
    return Span(nodes=nodes, devices=width * stages // nodes)


def longest_row(
    options: Mapping[str, Any], *, span: Span, weight_bytes: float, kv_bytes_per_token: float, memory_bytes: float
) -> int | None:
    """Tokens of the longest row for which a replica's KV cache has room; None where nobody knows its GPUs' memory, or it has none."""
    weight_bytes, kv_bytes_per_token = span.excess * weight_bytes, span.excess * kv_bytes_per_token
    if "kv_cache_memory_bytes" in options:
        room = float(span.all_devices * whole(options, "kv_cache_memory_bytes", 1))
    elif memory_bytes:
        room = kv_room_bytes(
            devices=span.all_devices, weight_bytes=weight_bytes, memory_bytes=memory_bytes, memory_share=_memory_share(options)
        )
    else:
        return None
    return max(0, int(room / (LONGEST_ROW * kv_bytes_per_token)) // _STEP * _STEP) or None


def _memory_share(options: Mapping[str, Any]) -> float:
    share = options.get("gpu_memory_utilization", MEMORY_SHARE)
    return float(share) if isinstance(share, int | float) else MEMORY_SHARE
