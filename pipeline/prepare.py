"""What a checkpoint becomes: the recipe for each precision, and the name that source, recipe and rows give it. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any
from typing import get_args

from pipeline.shape import Shape
from schemas.prepared import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_VERSION = 1
"""Of what is done with a recipe: a change of it gives other weights, under another name."""
_SMOOTHING = 0.7
_KEPT: dict[Precision, float] = {"int8": 1.4, "fp8": 0.6, "nvfp4": 0.4}
"""Bytes in memory for each byte of the weights, which themselves stay on disk, mapped: what is made of them, and of INT8 what was smoothed.

Measured on three layers, 3,072 wide, with compressed-tensors 0.17 and transformers 5.19: 1.28, 0.44 and 0.29."""
_STEP_BYTES: dict[Precision, int] = {"int8": 8, "fp8": 8, "nvfp4": 64}
"""For each weight of a layer while that is quantised; measured in the same way: 5, 6 and 44."""
_OVERHEAD_BYTES = 1 << 30
"""Torch, and rows that calibrate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How weights are made smaller."""

    precision: Precision
    smoothing: float | None = None
    """SmoothQuant's strength, from 0 (all in the weights' favour) to 1 (all in the activations'); None is no smoothing."""
    output_layer: bool = False
    """Whether the output layer is quantised, too; it is then stored apart from the embedding."""

    @property
    def calibrated(self) -> bool:
        """Whether rows are needed to see how large activations become."""
        return self.smoothing is not None or self.precision == "nvfp4"


def recipe_for(precision: Precision) -> Recipe:
    """The recipe that passes the gate with the least loss of speed.

    INT8: perplexity of the demo model on 12 of GSM8K's answers, over the unquantised one's, weights and activations rounded: 1.025 with
    plain rounding, 0.994 with SmoothQuant at 0.65 and 1.003 with the output layer in it, too.
    """
    if precision == "int8":
        return Recipe(precision=precision, smoothing=_SMOOTHING, output_layer=True)
    return Recipe(precision=precision)


def room_bytes(weights_bytes: int, shape: Shape, recipe: Recipe) -> int:
    """Memory that quantising takes."""
    widest = shape.hidden * max(shape.intermediate, shape.vocab if recipe.output_layer else 0)
    return int(_KEPT[recipe.precision] * weights_bytes) + _STEP_BYTES[recipe.precision] * widest + _OVERHEAD_BYTES


def prepared_digest(source: dict[str, str], recipe: Recipe, rows: Any) -> str:
    """Names a prepared checkpoint: the same digest means the same weights, judged on the same rows."""
    data = {"version": _VERSION, "source": source, "recipe": asdict(recipe), "rows": rows}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
