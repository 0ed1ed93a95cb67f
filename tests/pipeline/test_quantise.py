"""What quantising does to a tiny Llama's weights, and what it must not do. Real torch and compressed-tensors, no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.prepare import PRECISIONS
from pipeline.prepare import Precision
from pipeline.prepare import Recipe
from pipeline.prepare import recipe_for
from pipeline.quantise import _input_peaks
from pipeline.quantise import _smooth
from pipeline.quantise import quantise

pytestmark = pytest.mark.slow  # these imports alone take seconds: `make fast` does not even collect this file

ROWS = [[0, *range(5 + row, 45 + row)] for row in range(4)]
Q, K, V, OUT, GATE, UP, DOWN = (
    f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Precision], tuple[dict[str, Any], dict[str, Any]]]:
    """Tensors and config of the tiny model in a precision; made once each."""
    folder = tmp_path_factory.mktemp("quantised")

    def make(precision: Precision) -> tuple[dict[str, Any], dict[str, Any]]:
        target = folder / precision
        if not target.exists():
            quantise(str(tiny_model), str(target), recipe_for(precision), ROWS, lambda _: None)
        return load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())

    return make


def test_int8_is_integers_with_a_scale_for_each_output_channel(made: Callable[..., Any]) -> None:
    tensors, config = made("int8")
    for name in (Q, K, V, OUT, GATE, UP, DOWN, "lm_head"):
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert (weight.dtype, scale.shape) == (torch.int8, (weight.shape[0], 1))
        assert (weight.int().abs().amax(1) >= 127).all()  # the whole range is used
    assert config["quantization_config"]["format"] == "int-quantized"
    (group,) = config["quantization_config"]["config_groups"].values()
    assert (group["input_activations"]["dynamic"], group["input_activations"]["strategy"]) == (True, "token")
    assert (config["quantization_config"]["quant_method"], group["targets"]) == ("compressed-tensors", ["Linear", "re:.*lm_head"])


def test_int8_of_what_is_not_smoothed_is_the_weight_within_half_a_step(made: Callable[..., Any], tiny_model: Path) -> None:
    tensors, _ = made("int8")
    original = load_file(tiny_model / "model.safetensors")
    for name in (OUT, "lm_head"):
        scale = tensors[f"{name}.weight_scale"]
        assert ((tensors[f"{name}.weight"] * scale - original[f"{name}.weight"]).abs() <= scale * 0.5001).all()


def test_fp8_is_eight_bit_floats_but_for_the_output_layer(made: Callable[..., Any], tiny_model: Path) -> None:
    tensors, config = made("fp8")
    original = load_file(tiny_model / "model.safetensors")
    for name in (Q, OUT, DOWN):
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert (weight.dtype, scale.shape) == (torch.float8_e4m3fn, (weight.shape[0], 1))
        assert torch.allclose(weight.float() * scale, original[f"{name}.weight"], rtol=0.07, atol=1e-3)
    assert torch.equal(tensors["lm_head.weight"], original["lm_head.weight"])
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_nvfp4_is_packed_pairs_with_a_scale_for_each_sixteen(made: Callable[..., Any]) -> None:
    tensors, config = made("nvfp4")
    weight, scale = tensors[f"{GATE}.weight_packed"], tensors[f"{GATE}.weight_scale"]
    assert (weight.dtype, weight.shape) == (torch.uint8, (96, 32))
    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (96, 4))
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    assert "lm_head.weight_packed" not in tensors


def test_layers_that_an_engine_computes_as_one_share_their_overall_scales(made: Callable[..., Any]) -> None:
    tensors, _ = made("nvfp4")
    for group in ((Q, K, V), (GATE, UP)):
        for kind in ("weight_global_scale", "input_global_scale"):
            values = {float(tensors[f"{name}.{kind}"]) for name in group}
            assert len(values) == 1
            assert values.pop() > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_norms_and_embedding_are_no_linear_layers(made: Callable[..., Any], precision: Precision, tiny_model: Path) -> None:
    tensors, _ = made(precision)
    original = load_file(tiny_model / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.float32


def test_smoothing_changes_nothing_that_the_model_computes(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(torch.tensor(ROWS)).logits
        weight = model.model.layers[0].mlp.up_proj.weight.clone()
        peaks = _input_peaks(model, ROWS, lambda _: None)
        for index, layer in enumerate(model.model.layers):
            _smooth(layer, f"model.layers.{index}.", peaks, 0.7)
        assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, weight)
        assert torch.allclose(model(torch.tensor(ROWS)).logits, before, atol=1e-4)


def test_a_loud_channel_is_as_quiet_as_its_neighbours_afterwards(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.input_layernorm.weight[3] *= 100
        layer.mlp.up_proj.weight[5] *= 100
        ratios = []
        for _ in range(2):
            peaks = _input_peaks(model, ROWS, lambda _: None)
            names = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
            ratios.append([float(peaks[name].max() / peaks[name].median()) for name in names])
            _smooth(layer, "model.layers.0.", peaks, 1.0)
    assert min(ratios[0]) > 20
    assert max(ratios[1]) < 1.01


def test_an_output_layer_that_was_the_embedding_becomes_one_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    tied = tmp_path / "tied"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    quantise(str(tied), str(tmp_path / "out"), Recipe(precision="int8", smoothing=0.7, output_layer=True), ROWS, lambda _: None)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.int8
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
