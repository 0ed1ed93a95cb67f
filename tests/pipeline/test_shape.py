"""A model's sizes and what they cost."""

from __future__ import annotations

import pytest

from pipeline.shape import Shape
from pipeline.shape import known_shape
from pipeline.shape import shape_names
from schemas.errors import JobError

BILLION = 1e9


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-2-70b", 68.98), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("llama-3.1-405b", 405.85)]
)
def test_parameters_are_those_of_the_model_card(name: str, billions: float) -> None:
    shape = known_shape(name)
    assert (shape.layer_weights + 2 * shape.head_weights) / BILLION == pytest.approx(billions, rel=0.002)


def test_keys_and_values_of_a_token_are_as_published() -> None:
    assert known_shape("llama-3.1-8b").kv_bytes_per_token(2) == 128 * 1024
    assert known_shape("llama-2-70b").kv_bytes_per_token(2) == 320 * 1024
    assert known_shape("llama-3.1-405b").kv_bytes_per_token(2) == 504 * 1024


def test_fewer_bits_leave_embedding_and_output_layer_as_they_are() -> None:
    shape = known_shape("llama-2-70b")
    rest = 2 * 2 * shape.head_weights
    assert shape.weight_bytes("fp8") == shape.layer_weights + rest
    assert shape.weight_bytes("nvfp4") == pytest.approx(0.5625 * shape.layer_weights + rest)
    assert shape.weight_bytes("bf16") / 1e9 == pytest.approx(137.95, rel=0.001)


CONFIG = {
    "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("quantization", "precision"),
    [
        (None, "bf16"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, "int8"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}, "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_a_checkpoints_precision_is_read_from_its_config(quantization: dict[str, object] | None, precision: str) -> None:
    assert Shape.from_config({**CONFIG, "quantization_config": quantization}, "c").precision == precision


def test_a_config_that_lacks_a_size_is_refused() -> None:
    with pytest.raises(JobError, match=r"c lacks vocab_size"):
        Shape.from_config({key: value for key, value in CONFIG.items() if key != "vocab_size"}, "c")


def test_an_unknown_shape_names_the_known() -> None:
    with pytest.raises(JobError, match=", ".join(shape_names())):
        known_shape("gpt")
