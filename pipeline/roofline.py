"""How fast one replica generates, from sizes and ceilings alone: what each kind of work costs, one after the other.

A step of the batch costs
  GEMMs      the larger of their arithmetic and of reading the weights once
  activations reading and writing them between the GEMMs
  attention  reading every live row's keys and values
  links      two all-reduces a layer where the replica has several devices
  host       a constant for every row in the batch
and the prefill of the rows that took the place of those that finished. Time does not overlap; what does overlap in a real engine is
in the constants, which are few, stated here, and fitted on six published results (see jobs.backtest).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.shape import Shape
from schemas.hardware import Device
from schemas.hardware import Precision

MEMORY_SHARE = 0.92
"""vLLM's gpu_memory_utilization."""
OVERHEAD_BYTES = 6e9
"""Of one device: CUDA context, graphs, activations; assumed."""
MIN_LIVE_ROWS = 64
"""A model fits when so many rows of the job's mean length do, too: with fewer the weights are read for almost nothing."""
_FEW_LIVE_ROWS = 8
"""Enough for the whole node's devices together, where there are no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constants:
    """What the ceilings do not say. Fitted, or stated."""

    gemm_share: float = 1.0
    """Of the largest GEMM's rate, on TensorRT-LLM. Fitted."""
    vllm_share: float = 0.6
    """Of that, on vLLM. Fitted."""
    bandwidth_share: float = 0.9
    """Of the copy's rate, when weights, keys and values are read. Fitted."""
    activation_passes: float = 10.0
    """Times that a token's hidden state is read or written in one layer, in 16 bits. Fitted; not below 10, which two norms, two
    additions and what goes into and out of four GEMMs make."""
    host_s_per_row: float = 2.5e-5
    """Of one row in one step. Fitted."""


CONSTANTS = Constants()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the rows are like."""

    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean."""

    @property
    def live_tokens(self) -> float:
        """Of a row in the batch, on average over its life."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Of one replica, in steady state."""

    devices: int
    """Of the replica."""
    batch: float
    """Rows in it at once."""
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    seconds_per_step: dict[str, float]
    """By kind of work; their sum is a step's time, in which each row of the batch (of one stage's part of it) gets one token."""

    @property
    def per_device(self) -> float:
        """Output tokens/s."""
        return self.output_tokens_per_s / self.devices


def kv_room_bytes(*, devices: int, weight_bytes: float, memory_bytes: float, memory_share: float = MEMORY_SHARE) -> float:
    """What a replica's devices together have left for keys and values; below 0 where they do not hold the weights."""
    return devices * (memory_share * memory_bytes - OVERHEAD_BYTES) - weight_bytes


def devices_needed(
    *,
    weight_bytes: float,
    kv_bytes_per_token: float,
    live_tokens: float,
    memory_bytes: float,
    most: int,
    memory_share: float = MEMORY_SHARE,
) -> int | None:
    """The smallest tensor-parallel size, a power of two, that holds weights and MIN_LIVE_ROWS rows.

    All `most` of them where only they hold a few rows; None where not even they do.
    """
    devices = 1
    while devices <= most:
        room = kv_room_bytes(devices=devices, weight_bytes=weight_bytes, memory_bytes=memory_bytes, memory_share=memory_share)
        rows = room / (kv_bytes_per_token * live_tokens)
        if rows >= MIN_LIVE_ROWS or (2 * devices > most and rows >= _FEW_LIVE_ROWS):
            return devices
        devices *= 2
    return None


def predict(
    shape: Shape,
    device: Device,
    work: Work,
    *,
    precision: Precision,
    kv_width_bytes: float,
    max_num_seqs: int,
    most_devices: int,
    vllm: bool = True,
    devices: int | None = None,
    stages: int = 1,
    weight_bytes: float | None = None,
    constants: Constants = CONSTANTS,
) -> Speed | None:
    """Of one replica on as few devices as hold it; None where `most_devices` do not. `precision` is of weights and of what they multiply.

    `weight_bytes` are the weights' where they are stored in another precision. Raises KeyError where the device does not compute in it.
    Of so many `stages`, each has its part of the layers on devices of its own, and of the batch in turn: all work at the same time, and
    the last one, which has the output layer too, says how fast. What goes between them is left out: a row's hidden state, once a step.
    """
    weights = (shape.weight_bytes(precision) if weight_bytes is None else weight_bytes) / stages
    kv = shape.kv_bytes_per_token(kv_width_bytes) / stages
    layers, layer_weights = shape.layers / stages, shape.layer_weights / stages
    if devices is None:
        devices = devices_needed(
            weight_bytes=weights, kv_bytes_per_token=kv, live_tokens=work.live_tokens, memory_bytes=device.memory_bytes, most=most_devices
        )
    if devices is None:
        return None
    room = kv_room_bytes(devices=devices, weight_bytes=weights, memory_bytes=device.memory_bytes)
    batch = min(float(max_num_seqs), room / (kv * work.live_tokens)) / stages  # of one stage at once; the others have the rest
    if batch < 1:
        return None
    c = constants
    flops = device.gemm_flops(precision) * c.gemm_share * (c.vllm_share if vllm else 1.0)
    bandwidth = device.bytes_per_s * c.bandwidth_share
    begun = batch / work.output_tokens  # rows that begin in one step
    activation_s = c.activation_passes * layers * shape.hidden * 2 / bandwidth  # of one token
    reduced_bytes = 2 * layers * shape.hidden * 2 * 2 * (devices - 1) / devices  # two all-reduces a layer, of one token
    link = 1e9 * (device.peer_gb_per_s.value if device.peer_gb_per_s else 25.0)  # PCIe 4, where nobody says
    prefill_flops = 2 * layer_weights * work.prompt_tokens
    attention_flops = 2 * layers * shape.heads * shape.head_dim * work.prompt_tokens**2  # causal: half of the square, twice
    seconds = {
        "gemm": max(2 * (layer_weights + shape.head_weights) * batch / flops, weights / bandwidth) / devices,
        "activations": batch * activation_s / devices,
        "attention": batch * kv * work.live_tokens / bandwidth / devices,
        "prefill": begun * (prefill_flops / flops + attention_flops / device.attention_flops + work.prompt_tokens * activation_s) / devices,
        "links": (batch + begun * work.prompt_tokens) * reduced_bytes / link if devices > 1 else 0.0,
        "host": batch * c.host_s_per_row,
    }
    rate = batch / math.fsum(seconds.values())
    return Speed(
        devices=stages * devices,
        batch=stages * batch,
        output_tokens_per_s=rate,
        prompt_tokens_per_s=rate * work.prompt_tokens / work.output_tokens,
        seconds_per_step=seconds,
    )
