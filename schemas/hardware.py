"""Hardware: what is known of an accelerator and of a node, each number with where it comes from. Data, read from YAML."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field
from pydantic import model_validator

from schemas.sampling import Frozen

Precision = Literal["bf16", "fp8", "nvfp4", "int8"]
"""Of weights, and of what is multiplied with them."""
Basis = Literal["measured", "published", "assumed"]
"""measured: somebody ran it and said how. published: a maker's or a cloud's figure. assumed: nobody's; the source says why."""

GEMM_SHARE_OF_PEAK = 0.70
"""Of a device's dense peak that its largest GEMM reaches, where nobody measured it. Azure's guide: H100 FP8 1,377 of 1,979 (0.70), H200
0.69, GB200 FP8 0.58 and FP4 0.76; the middle of these four."""
BANDWIDTH_SHARE_OF_PEAK = 0.90
"""Likewise of memory bandwidth: H100 0.89 (triad), H200 0.86, GB200 and GB300 0.92."""
ATTENTION_SHARE_OF_BF16_PEAK = 0.33
"""Likewise of attention in prefill: FlashAttention-2 on H100, 328 of 989."""


class Figure(Frozen):
    """A number, how it is known, and from where."""

    value: float = Field(gt=0)
    basis: Basis
    source: str = Field(min_length=1)


class Rate(Frozen):
    """How fast something is: at the most by its maker, and as measured. At least one of them."""

    peak: Figure | None = None
    measured: Figure | None = None

    @model_validator(mode="after")
    def _something(self) -> Rate:
        if self.peak is None and self.measured is None:
            raise ValueError("give peak, measured, or both")
        return self

    def ceiling(self, share_of_peak: float) -> float:
        """What the best program reaches: as measured, or so much of the peak."""
        if self.measured is not None:
            return self.measured.value
        assert self.peak is not None
        return share_of_peak * self.peak.value


class Device(Frozen):
    """One accelerator."""

    name: str
    description: str
    driver_name: str | None = None
    """A part of what nvidia-smi or rocm-smi call it, by which it is recognised, in capitals or not."""
    pci_ids: list[int] = []
    """AMD: its numbers on the PCI bus, by which it is recognised where its name cannot be seen."""
    memory_gb: Figure
    """10^9 bytes that programs see."""
    gemm_tflops: dict[Precision, Rate]
    """Dense, by the precision of both factors. Precisions that it cannot compute in are absent."""
    attention_tflops: Figure | None = None
    """In prefill."""
    bandwidth_tb_per_s: Rate
    """Of its memory."""
    peer_gb_per_s: Figure | None = None
    """Bus bandwidth of an all-reduce among the devices of one node."""

    @model_validator(mode="after")
    def _computes(self) -> Device:
        if "bf16" not in self.gemm_tflops:
            raise ValueError("gemm_tflops: bf16 is missing, in which it runs what it has no other precision for")
        return self

    def gemm_flops(self, precision: Precision) -> float:
        """Per second. Raises KeyError where it does not compute in that precision."""
        return 1e12 * self.gemm_tflops[precision].ceiling(GEMM_SHARE_OF_PEAK)

    @property
    def attention_flops(self) -> float:
        """Per second, in prefill."""
        if self.attention_tflops is not None:
            return 1e12 * self.attention_tflops.value
        bf16 = self.gemm_tflops["bf16"]
        peak = bf16.peak.value if bf16.peak is not None else bf16.ceiling(1.0) / GEMM_SHARE_OF_PEAK
        return 1e12 * ATTENTION_SHARE_OF_BF16_PEAK * peak

    @property
    def bytes_per_s(self) -> float:
        """Of its memory."""
        return 1e12 * self.bandwidth_tb_per_s.ceiling(BANDWIDTH_SHARE_OF_PEAK)

    @property
    def memory_bytes(self) -> float:
        return 1e9 * self.memory_gb.value


class Price(Frozen):
    """What an hour of one node costs. Configuration: prices differ by region, contract and day; set your own in a profile of yours."""

    usd_per_hour: float = Field(gt=0)
    region: str
    date: str
    """Of the price, as in 2026-09-01."""
    basis: Basis
    source: str = Field(min_length=1)

    @model_validator(mode="after")
    def _dated(self) -> Price:
        date.fromisoformat(self.date)
        return self


class Disk(Frozen):
    """A node's local disks of one kind."""

    kind: Literal["nvme", "temporary"]
    count: int = Field(ge=1)
    total_gb: Figure
    read_gb_per_s: Figure | None = None
    """Of all of them together."""
    write_gb_per_s: Figure | None = None


class Node(Frozen):
    """One VM size."""

    vm_size: str | None = None
    """As Azure's API names it; None for machines that are not Azure's."""
    architecture: Literal["x86_64", "aarch64"]
    cores: Figure
    memory_gb: Figure
    device: str
    """The name of a device."""
    devices: int = Field(ge=1)
    network_gbit_per_s: Figure | None = None
    """Of the VM's Ethernet, over which storage is read and written."""
    fabric_gbit_per_s: Figure | None = None
    """Between the devices of different nodes, all of a node's links together."""
    disks: list[Disk] = []
    batch: Literal["confirmed", "listed", "doubtful"]
    """Whether Azure Batch makes pools of it: somebody was seen to, the service lists it, or nobody knows."""
    price: Price | None = None
