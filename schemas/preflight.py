"""Preflight: what a node is asked to measure, what it measured, and what follows from that."""

from __future__ import annotations

from typing import Any
from typing import Literal
from typing import get_args

from pydantic import ConfigDict
from pydantic import Field

from schemas.sampling import Frozen

Pillar = Literal["compute", "memory", "network", "storage"]
PILLARS: tuple[Pillar, ...] = get_args(Pillar)
Unit = Literal["TFLOP/s", "GB/s", "objects/s"]
"""10^12, 10^9 and 1 a second."""


class _Value(Frozen):
    """Goes from process to process as JSON, which knows no tuples."""

    model_config = ConfigDict(strict=False)


class Measurement(_Value):
    """One figure of one device of one node: the median over repetitions, or the mean over a stretch of time."""

    pillar: Pillar
    group: str
    """What is judged together, as in `GEMM bf16`."""
    name: str
    """The same on every node; unique on a device."""
    device: str
    """`cpu`, `gpu 3`, or `node` where it is the whole node's."""
    value: float = Field(gt=0)
    unit: Unit
    ceiling: float | None = Field(default=None, gt=0)
    """The best that the same process saw of its kind, in the same unit: of square GEMMs, or of plain copies of memory."""
    rate: str | None = None
    """Which of the profile's rates it should reach; see jobs.preflight_judge."""
    detail: str = ""
    """For people: sizes, partners."""

    @property
    def of_ceiling(self) -> float | None:
        return None if self.ceiling is None else self.value / self.ceiling


class World(_Value):
    """All processes of a network measurement, and which of them are this node's."""

    address: str
    """Of the first process, where the others meet."""
    port: int
    places: tuple[int, ...]
    """By rank, the number of the node; ranks of one node follow one another."""
    first_rank: int
    """Of this node's processes."""
    own_address: str
    """Of this node, by which its network interface is found."""

    @property
    def size(self) -> int:
        return len(self.places)


class Order(_Value):
    """What one node is asked for one pillar."""

    pillar: Pillar
    seconds: float = Field(gt=0)
    """To measure for; starting processes comes on top."""
    devices: tuple[str, ...]
    """`cpu` alone, or GPUs as CUDA_VISIBLE_DEVICES names them."""
    core_ids: tuple[int, ...] = ()
    """CPU cores to compute on; empty where the system has no such notion."""
    shape: dict[str, Any] | None = None
    """Of the model; see pipeline.shape.Shape."""
    prefill_rows: int = Field(default=512, ge=1)
    decode_rows: int = Field(default=128, ge=1)
    precisions: tuple[str, ...] = ()
    output: str | None = None
    """Where the job's output goes; None leaves the store out."""
    disk: str | None = None
    """A local folder; None is the system's temporary one."""
    world: World | None = None


class Answer(_Value):
    """What a node measured for one order."""

    measurements: tuple[Measurement, ...]
    left_out: tuple[str, ...] = ()
    """What was not measured, and why; a sentence for each."""


class AzureNode(_Value):
    """What the instance metadata service says of a virtual machine. Empty where it says nothing."""

    vm_size: str = ""
    priority: str = ""
    """Regular or Spot."""
    location: str = ""
    zone: str = ""
    events: tuple[str, ...] | None = None
    """Scheduled ones that concern it, as in `Reboot not before ...`; None where the service did not answer in time."""


class NodeFacts(_Value):
    """What a node is."""

    architecture: str
    core_ids: tuple[int, ...]
    num_cores: int = Field(ge=1)
    load: float
    """Processes that ran or wanted to, mean over the last minute."""
    cpu_name: str
    cpu_flags: tuple[str, ...]
    """Of those that decide about precisions."""
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    gpu_name: str
    free_port: int
    """Was free for listening a moment ago."""
    shape: dict[str, Any] | None = None
    """Of the model that the node was asked about; see pipeline.shape.Shape."""
    azure: AzureNode | None = None


class Failure(_Value):
    """A pillar that a node could not measure."""

    pillar: Pillar
    reason: str


class NodeReport(_Value):
    """All that is known of one node."""

    name: str
    facts: NodeFacts | None
    """None where it did not even answer that."""
    profile: str = ""
    """What it was held against; empty where nothing is known of such nodes."""
    measurements: tuple[Measurement, ...] = ()
    left_out: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()


class Thresholds(_Value):
    """Below which share a figure is slow."""

    of_profile: float = Field(default=0.8, gt=0, le=1)
    """Of what the profile says. Azure's own figures of one size differ by 8 % from node to node (research/azure.md, 1.1)."""
    of_median: float = Field(default=0.75, gt=0, le=1)
    """Of the nodes' median, in a group of figures. Measuring for so short a time scatters by 10 % on busy machines."""


class Finding(_Value):
    """That a device of a node is slow, and by what."""

    node: str
    device: str
    group: str
    share: float
    against: Literal["the profile", "the nodes' median"]
    evidence: str
    """A sentence with the figures."""
