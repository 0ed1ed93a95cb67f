"""Prompt: one input row as the model will be asked it, or the reason why it cannot be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from typing import get_args

from schemas.sampling import Sampling

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RowError:
    """Why a row has no completion. The message never carries the prompt itself."""

    kind: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What one row asks: plain text, or messages for the chat template."""

    position: int
    content: str | tuple[Message, ...]
    sampling: Sampling
    seed: int | None = None
    """The row's own, where it names one."""
