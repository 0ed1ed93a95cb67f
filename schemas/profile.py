"""Profile: what kind of node an engine runs on and how its engines are cut. Data, read from pipeline/profiles/*.yaml."""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import Field

from schemas.hardware import Device
from schemas.hardware import Node
from schemas.hardware import Precision
from schemas.sampling import Frozen


class Profile(Frozen):
    """One kind of node. Options are the engine's own arguments; environment must be set before its process starts."""

    name: str
    description: str
    device: Literal["cpu", "gpu"]
    node: Node | None = None
    """The hardware; None where the machine is looked at instead."""
    accelerator: Device | None = None
    """What `node.device` names, as it was described where the profile was read, so that whoever has the profile knows it."""
    precision: Precision | None = None
    """Of weights that `tokenmill model prepare` would make for it; what a checkpoint holds is what runs."""
    replicas: int | None = Field(default=None, ge=1)
    """Engine replicas of one node; by default as many as its cores or devices give."""
    cores_per_replica: int | None = Field(default=None, ge=1)
    """CPU only: cores one engine replica computes on, where `replicas` does not say."""
    kv_cache_bytes: int | None = Field(default=None, ge=1)
    """CPU only: upper bound of one replica's KV cache."""
    max_num_seqs: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    """Upper bound of prompt plus completion; by default the model's own."""
    preload: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """CPU only: libraries that engine processes start with, by the names that pipeline.profile knows; those that a machine lacks
    are left out. By default an allocator, where one is found."""
    pin_cores: bool = False
    """CPU only: every replica computes on cores of its own and no others."""
    options: dict[str, Any] = {}
    environment: dict[str, str] = {}
    dtype_by_cpu_flag: dict[str, str] = {}
    """CPU only: the first of these flags that the CPU has decides the dtype."""
    dtype: str = "auto"
    """Where no flag decides."""
    options_by_cpu_flag: dict[str, dict[str, Any]] = {}
    """CPU only: further options where the CPU has a flag; `options` win over them, and flags over those that come after them."""

    def options_for(self, cpu_flags: Set[str]) -> dict[str, Any]:
        """`options`, and those that a CPU's flags add to them."""
        found = dict(self.options)
        for flag, options in self.options_by_cpu_flag.items() if self.device == "cpu" else ():
            if flag in cpu_flags:
                found = {**options, **found}
        return found

    @property
    def usd_per_hour(self) -> float | None:
        """Of one node; None where it says no price."""
        price = self.node.price if self.node is not None else None
        return price.usd_per_hour if price is not None else None
