"""What a job will take on each kind of node and number of them: tokens, hours, dollars, with where they lie four times in five. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.backtest import backtest
from jobs.canary import Canary
from jobs.lengths import Lengths
from jobs.lengths import Mean
from pipeline.fit import LIVE_TOKENS
from pipeline.fit import Span
from pipeline.fit import foreseen_span
from pipeline.fit import kv_width_bytes
from pipeline.fit import whole
from pipeline.hardware import device_of
from pipeline.roofline import Speed
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
_WORTH_SAYING = 1.1
"""Times the speed that a node would have with its devices cut otherwise, before a plan says so."""


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
    wider: tuple[int, float] | None = None
    """Devices of a replica with which the node would be so many times as quick, where a run takes fewer."""

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


def offers(
    lengths: Lengths,
    shape: Shape,
    sizes: Sequence[Profile],
    *,
    nodes: Sequence[int] = NODE_COUNTS,
    options: Mapping[str, Any] | None = None,
    weight_bytes: float | None = None,
) -> list[Offer]:
    """Every size that holds the model and every number of nodes, by the roofline. The checkpoint runs in its own precision.

    `options` are the job's engine arguments, `weight_bytes` what the checkpoint's files hold, where there are some. Nodes are cut as a
    run cuts them; see pipeline.fit.
    """
    slower, faster = backtest().ratio_interval(_INTERVAL)
    output = tokens_of(lengths).output
    found = []
    for profile in sizes:
        made = _replica(lengths, shape, profile, options or {}, weight_bytes or shape.weight_bytes(shape.precision))
        if made is None:
            continue
        speed, span, precision, wider = made
        devices, batch, rate = speed.devices, speed.batch, speed.output_tokens_per_s
        assert profile.node is not None
        per_group = profile.node.devices // span.devices if span.nodes == 1 else 1
        for groups in sorted({max(1, count // span.nodes) for count in nodes}):
            replicas, count = per_group * groups, span.nodes * groups
            total = rate * replicas
            mean = _hours(output.value / total, lengths, rate, batch)
            low = _hours(output.low / (total * faster), lengths, rate * faster, batch)
            high = _hours(output.high / (total * slower), lengths, rate * slower, batch)
            hours = Mean(value=mean, low=low, high=high)
            price = profile.usd_per_hour
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
                    usd=hours.times(count * price) if price else None,
                    basis="roofline",
                    wider=wider,
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
        usd=when.times(usd_per_hour) if usd_per_hour else None,
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


def cut_remarks(found: Sequence[Offer]) -> list[str]:
    """Where a run, which cuts its nodes before it has read a row, would do better to be told how."""
    widths = {offer.profile: offer.wider for offer in found if offer.wider is not None}
    if not widths:
        return []
    words = ", ".join(f"{devices} on {profile} ({times:.1f} times as quick)" for profile, (devices, times) in widths.items())
    return [
        f"A run gives a replica the fewest devices that hold a batch of rows of {LIVE_TOKENS:,} tokens. For rows as long as these, set "
        f"engine.options.tensor_parallel_size: {words}."
    ]


def _replica(
    lengths: Lengths, shape: Shape, profile: Profile, options: Mapping[str, Any], weight_bytes: float
) -> tuple[Speed, Span, Precision, tuple[int, float] | None] | None:
    """One replica as a run cuts it, what it takes up, its precision, and a wider one on the same node where that is quicker.

    None where no number of such nodes holds the model.
    """
    device = device_of(profile)
    assert profile.node is not None
    assert device is not None
    asked, most = {**profile.options, **options}, profile.node.devices
    precision: Precision = shape.precision if shape.precision in device.gemm_tflops else "bf16"
    width_bytes = kv_width_bytes(asked, str(asked.get("dtype", profile.dtype)))
    work = Work(prompt_tokens=lengths.prompt.value, output_tokens=max(1.0, lengths.output.value))
    max_num_seqs = whole(asked, "max_num_seqs", profile.max_num_seqs)

    def speed_of(span: Span) -> Speed | None:
        return predict(
            shape,
            device,
            work,
            precision=precision,
            kv_width_bytes=width_bytes,
            max_num_seqs=max_num_seqs,
            most_devices=most,
            devices=span.devices,
            stages=span.nodes,
            weight_bytes=weight_bytes,
        )

    taken = foreseen_span(profile, device, shape, options, weight_bytes=weight_bytes)
    speed = speed_of(taken) if taken is not None and taken.devices <= most else None
    if speed is None or taken is None:
        return None
    others = [] if "tensor_parallel_size" in asked else [speed_of(Span(devices=width)) for width in _wider(speed.devices, most)]
    best = max((other for other in others if other is not None), key=lambda other: other.per_device, default=speed)
    times = best.per_device / speed.per_device
    return speed, taken, precision, (best.devices, times) if times > _WORTH_SAYING else None


def _wider(devices: int, most: int) -> list[int]:
    return [devices << power for power in range(1, most.bit_length()) if devices << power <= most]


def _hours(work_s: float, lengths: Lengths, rate: float, batch: float) -> float:
    """Start, work, and a tail: the last rows' life, in a batch that empties."""
    tail_s = lengths.output.value * batch / rate / 2
    return (_START_S + work_s + tail_s) / 3600


def _product(one: Mean, other: Mean) -> Mean:
    """At least as wide as where it lies four times in five."""
    return Mean(value=one.value * other.value, low=one.low * other.low, high=one.high * other.high)
