"""A Llama model's sizes, and what they cost: parameters, bytes, floating-point operations. From its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import JobError
from schemas.hardware import Precision

_SHAPES = Path(__file__).parent / "shapes"
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_BYTES_PER_WEIGHT: dict[Precision, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "nvfp4": 4.5 / 8}
"""NVFP4 has an 8-bit scale to every 16 weights of 4 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of one model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    """Whether the output layer is the embedding."""
    max_position_embeddings: int
    precision: Precision = "bf16"
    """Of the checkpoint's weights."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Shape:
        """Of a Hugging Face config. Raises JobError where a size is missing."""
        missing = [key for key in _SIZES if not isinstance(config.get(key), int)]
        if missing:
            raise JobError(f"model: {where} lacks {', '.join(missing)}, or has no number there; copy the checkpoint whole")
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            max_position_embeddings=config["max_position_embeddings"],
            precision=_precision(config),
        )

    @property
    def layer_weights(self) -> int:
        """Of all layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Of the output layer."""
        return self.vocab * self.hidden

    def weight_bytes(self, precision: Precision) -> float:
        """Embedding and output layer stay in bf16."""
        return self.layer_weights * _BYTES_PER_WEIGHT[precision] + 2 * self.head_weights * (1 if self.tied else 2)

    def kv_bytes_per_token(self, width_bytes: float) -> float:
        """Over all layers; `width_bytes` is 1 in fp8 and 2 in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width_bytes


def read_shape(folder: str | Path) -> Shape:
    """Of a checkpoint's folder. Raises JobError."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"model: cannot read {path}: {error}") from None
    return Shape.from_config(config, str(path))


def shape_names() -> list[str]:
    """Of models whose sizes are known without a checkpoint."""
    return sorted(path.stem for path in _SHAPES.glob("*.json"))


def known_shape(name: str) -> Shape:
    """Raises JobError naming those there are."""
    path = _SHAPES / f"{name}.json"
    if not path.is_file():
        raise JobError(f"model: found {name!r}; known without a checkpoint are {', '.join(shape_names())}")
    return Shape.from_config(json.loads(path.read_text()), str(path))


def _precision(config: Mapping[str, Any]) -> Precision:
    """As compressed-tensors or ModelOpt wrote it into the config; bf16 stands for every 16- and 32-bit type."""
    words = json.dumps(config.get("quantization_config") or {}).lower()
    if "nvfp4" in words or ('"num_bits": 4, ' in words and '"float"' in words):
        return "nvfp4"
    if '"num_bits": 8' in words or "fp8" in words:
        return "int8" if '"type": "int"' in words else "fp8"
    return "bf16"
