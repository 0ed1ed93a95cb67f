"""What a job will take on each kind of node and number of them: tokens, hours, dollars, with where they lie four times in five. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.backtest import backtest
from jobs.canary import Canary
from jobs.lengths import Lengths
from jobs.lengths import Mean
from pipeline.hardware import device_of
from pipeline.roofline import Work
from pipeline.roofline import predict
from pipeline.shape import Shape
from schemas.hardware import Precision
from schemas.profile import Profile

NODE_COUNTS = (1, 2, 4, 8, 16)
_INTERVAL = 0.8
_START_S = 600.0
"""From an empty pool to engines that generate, where none runs yet: nodes, image, weights, graphs. Assumed."""
_CANARY_SPREAD = 0.15
"""A canary's seconds are good to about so much, four times in five; see tests/bench/estimate.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One way to run the job."""

    profile: str
    vm_size: str | None
    nodes: int
    precision: Precision | None
    """None where the checkpoint runs as it is on this machine."""
    replicas: int
    """Of all nodes."""
    devices_per_replica: int
    batch: float
    output_tokens_per_s: float
    """Of all replicas."""
    hours: Mean
    usd: Mean | None
    """None where no price is known."""
    basis: str
    """Where the speed comes from."""

    @property
    def here(self) -> bool:
        """Whether it is this machine, by its canary."""
        return self.basis == "canary"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Of all rows that are generated."""

    prompt: Mean
    output: Mean


def tokens_of(lengths: Lengths) -> Tokens:
    rows = lengths.generated
    return Tokens(prompt=_product(lengths.prompt, rows), output=_product(lengths.output, rows))


def offers(lengths: Lengths, shape: Shape, sizes: Sequence[Profile], *, nodes: Sequence[int] = NODE_COUNTS) -> list[Offer]:
    """Every size that holds the model and every number of nodes, by the roofline. The checkpoint runs in its own precision."""
    slower, faster = backtest().ratio_interval(_INTERVAL)
    output = tokens_of(lengths).output
    found = []
    for profile in sizes:
        made = _replica(lengths, shape, profile)
        if made is None:
            continue
        devices, batch, rate, precision = made
        assert profile.node is not None
        per_node = profile.node.devices // devices
        for count in nodes:
            replicas = per_node * count
            total = rate * replicas
            mean = _hours(output.value / total, lengths, rate, batch)
            low = _hours(output.low / (total * faster), lengths, rate * faster, batch)
            high = _hours(output.high / (total * slower), lengths, rate * slower, batch)
            hours = Mean(value=mean, low=low, high=high)
            price = profile.node.price.usd_per_hour if profile.node.price else None
            found.append(
                Offer(
                    profile=profile.name,
                    vm_size=profile.node.vm_size,
                    nodes=count,
                    precision=precision,
                    replicas=replicas,
                    devices_per_replica=devices,
                    batch=batch,
                    output_tokens_per_s=total,
                    hours=hours,
                    usd=_times(hours, count * price) if price else None,
                    basis="roofline",
                )
            )
    return found


def offer_here(lengths: Lengths, canary: Canary, *, profile: str, usd_per_hour: float | None) -> Offer:
    """On this machine, by what the canary's steps cost."""
    generated = lengths.generated

    def hours(rows: float, output_tokens: float, factor: float) -> float:
        rows /= canary.replicas
        work_s = canary.cost.seconds(rows=rows, prompt_tokens=lengths.prompt.value, output_tokens=output_tokens, batch=canary.max_num_seqs)
        return (canary.start_s + factor * work_s) / 3600

    when = Mean(
        value=hours(generated.value, lengths.output.value, 1.0),
        low=hours(generated.low, lengths.output.low, 1 - _CANARY_SPREAD),
        high=hours(generated.high, lengths.output.high, 1 + _CANARY_SPREAD),
    )
    return Offer(
        profile=profile,
        vm_size=None,
        nodes=1,
        precision=None,
        replicas=canary.replicas,
        devices_per_replica=1,
        batch=min(canary.max_num_seqs, generated.value / canary.replicas),
        output_tokens_per_s=generated.value * lengths.output.value / (when.value * 3600 - canary.start_s),
        hours=when,
        usd=_times(when, usd_per_hour) if usd_per_hour else None,
        basis="canary",
    )


def cheapest(found: Sequence[Offer], deadline_s: float | None) -> Offer | None:
    """That is done by the deadline four times in five; the quicker of two that cost the same. None where no priced one is."""
    fitting = [offer for offer in found if offer.usd and (deadline_s is None or offer.hours.high * 3600 <= deadline_s)]
    return min(fitting, key=lambda offer: (round(offer.usd.value, 2) if offer.usd else math.inf, offer.hours.value), default=None)


def quickest(found: Sequence[Offer], max_usd: float | None) -> Offer | None:
    """That stays below so many dollars four times in five. None where none does."""
    fitting = [offer for offer in found if max_usd is None or (offer.usd and offer.usd.high <= max_usd)]
    return min(fitting, key=lambda offer: offer.hours.value, default=None)


def _replica(lengths: Lengths, shape: Shape, profile: Profile) -> tuple[int, float, float, Precision] | None:
    """Devices, batch, output tokens/s and precision of one replica; None where the node does not hold the model."""
    device = device_of(profile)
    assert profile.node is not None
    assert device is not None
    precision: Precision = shape.precision if shape.precision in device.gemm_tflops else "bf16"
    kv = str(profile.options.get("kv_cache_dtype", "auto"))
    speed = predict(
        shape,
        device,
        Work(prompt_tokens=lengths.prompt.value, output_tokens=max(1.0, lengths.output.value)),
        precision=precision,
        kv_width_bytes=1 if kv.startswith("fp8") else 2,
        max_num_seqs=profile.max_num_seqs,
        most_devices=profile.node.devices,
    )
    return None if speed is None else (speed.devices, speed.batch, speed.output_tokens_per_s, precision)


def _hours(work_s: float, lengths: Lengths, rate: float, batch: float) -> float:
    """Start, work, and a tail: the last rows' life, in a batch that empties."""
    tail_s = lengths.output.value * batch / rate / 2
    return (_START_S + work_s + tail_s) / 3600


def _product(one: Mean, other: Mean) -> Mean:
    """At least as wide as where it lies four times in five."""
    return Mean(value=one.value * other.value, low=one.low * other.low, high=one.high * other.high)


def _times(mean: Mean, factor: float) -> Mean:
    return Mean(value=mean.value * factor, low=mean.low * factor, high=mean.high * factor)
