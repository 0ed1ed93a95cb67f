"""The throughput model against what others published: predicted over published, row by row. Starts nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import Field

from pipeline.hardware import load_device
from pipeline.roofline import CONSTANTS
from pipeline.roofline import Constants
from pipeline.roofline import Speed
from pipeline.roofline import Work
from pipeline.roofline import predict
from pipeline.shape import known_shape
from schemas.hardware import Precision
from schemas.sampling import Frozen

_PUBLISHED = Path(__file__).parent / "published.yaml"
_MAX_NUM_SEQS = 2048
"""gpu_batch_size of Azure's own submission."""
_MOST_DEVICES = 8


class Workload(Frozen):
    """Mean lengths of a benchmark's rows."""

    prompt_tokens: float = Field(gt=0)
    output_tokens: float = Field(gt=0)


class Published(Frozen):
    """One result."""

    device: str
    model: str
    per_device: float = Field(gt=0)
    """Output tokens/s."""
    precision: Precision
    engine: Literal["trt-llm", "vllm"]
    division: Literal["closed", "open"] = "closed"
    """Open results may have changed the model; they are shown, and their errors counted apart."""
    fitted: bool = False
    note: str = ""


class _File(Frozen):
    workloads: dict[str, Workload]
    rows: list[Published]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One result and what the model says of it."""

    published: Published
    speed: Speed

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.speed.per_device / self.published.per_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Backtest:
    """All of them."""

    rows: tuple[Checked, ...]
    constants: Constants

    def errors(self, *, division: str = "closed", fitted: bool | None = None) -> list[float]:
        """How far predictions are off, as shares of the published value, without sign."""
        chosen = [row for row in self.rows if row.published.division == division]
        return [abs(row.ratio - 1) for row in chosen if fitted is None or row.published.fitted == fitted]

    def ratio_interval(self, share: float) -> tuple[float, float]:
        """Published over predicted, in the middle `share` of the rows that no constant was fitted on."""
        ratios = [1 / row.ratio for row in self.rows if not row.published.fitted]
        low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


def backtest(constants: Constants = CONSTANTS) -> Backtest:
    """Every published row."""
    file = _published()
    return Backtest(rows=tuple(_check(row, file.workloads[row.model], constants) for row in file.rows), constants=constants)


def fit(spaces: dict[str, Sequence[float]]) -> Constants:
    """The constants in a grid that come nearest to the fitted rows, by the squares of their log ratios."""
    file = _published()
    rows = [row for row in file.rows if row.fitted]
    best = (math.inf, CONSTANTS)
    names = list(spaces)

    def walk(at: int, chosen: dict[str, float]) -> None:
        nonlocal best
        if at < len(names):
            for value in spaces[names[at]]:
                walk(at + 1, {**chosen, names[at]: value})
            return
        constants = Constants(**chosen)
        loss = sum(math.log(_check(row, file.workloads[row.model], constants).ratio) ** 2 for row in rows)
        if loss < best[0]:
            best = (loss, constants)

    walk(0, {})
    return best[1]


@cache
def _published() -> _File:
    return _File.model_validate(yaml.safe_load(_PUBLISHED.read_text()))


def _check(row: Published, workload: Workload, constants: Constants) -> Checked:
    speed = predict(
        known_shape(row.model),
        load_device(row.device),
        Work(prompt_tokens=workload.prompt_tokens, output_tokens=workload.output_tokens),
        precision=row.precision,
        kv_width_bytes=1,
        max_num_seqs=_MAX_NUM_SEQS,
        most_devices=_MOST_DEVICES,
        vllm=row.engine == "vllm",
        constants=constants,
    )
    assert speed is not None, f"{row.model} does not fit on {_MOST_DEVICES} {row.device}"
    return Checked(published=row, speed=speed)
