"""How fast one device multiplies: square matrices, a model's own layers, attention. torch; a process of its own (see pipeline.child).

The ceiling of a precision is its best square GEMM of this run, that of decode attention a plain copy of memory. Weights are used again
and again here, so small ones stay in a CPU's caches, which in an engine they would not.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.child import Say
from pipeline.child import serve
from pipeline.preflight_device import COPY_BYTES
from pipeline.preflight_device import GB
from pipeline.preflight_device import copy_bytes_per_s
from pipeline.preflight_device import free_bytes
from pipeline.preflight_device import take_device
from pipeline.preflight_device import wait_for
from pipeline.preflight_shapes import Attention
from pipeline.preflight_shapes import Gemm
from pipeline.preflight_shapes import attentions
from pipeline.preflight_shapes import layer_gemms
from pipeline.preflight_shapes import squares
from pipeline.shape import Shape
from pipeline.stopwatch import Slices
from pipeline.stopwatch import median_seconds
from schemas.preflight import Answer
from schemas.preflight import Measurement
from schemas.preflight import Order

_T = 1e12
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
_BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bf16": 2, "fp8": 3, "int8": 4, "nvfp4": 2}
"""At most, while the matrices are made: FP8 from bf16, and what INT8 multiplies to has 32 bits."""
_COPY_S = 0.5


def main(data: dict[str, Any], _: Say) -> dict[str, Any]:
    order = Order.model_validate(data["order"])
    device = take_device(data["device"], order.core_ids)
    found = measure(order, device, data["label"])
    return found.model_dump(mode="json")


def measure(order: Order, device: torch.device, label: str) -> Answer:
    """GEMMs precision by precision; attention after the first, in which it is computed, for later ones may find no time."""
    on_gpu = device.type != "cpu"
    shape = Shape(**order.shape) if order.shape is not None else None
    layers = layer_gemms(shape, prefill_rows=order.prefill_rows, decode_rows=order.decode_rows) if shape else []
    attention = attentions(shape, on_gpu=on_gpu, decode_rows=order.decode_rows) if shape else []
    small, large = squares(on_gpu=on_gpu)
    plan = [small, large, *layers, large]  # the ceiling before and after the others, for what else runs here changes
    slices = Slices(order.seconds, len(order.precisions) * len(plan) + len(attention))
    measured: list[Measurement] = []
    left_out: list[str] = []
    for number, precision in enumerate(order.precisions):
        rates: dict[str, float] = {}
        for gemm in plan:
            try:
                rate = gemm.flops / _gemm_seconds(gemm, precision, device, slices.next()) / _T
                rates[gemm.name] = max(rate, rates.get(gemm.name, 0.0))
            except (RuntimeError, NotImplementedError, TypeError, AttributeError, _NoRoom) as error:
                left_out.append(f"GEMM {precision} {gemm.name} on {label}: {_first_line(error)}")
        measured += _measurements(plan, rates, precision, label)
        ceiling = measured[-1].ceiling if rates else None
        for kind in attention if number == 0 else ():
            try:
                measured.append(_attention(kind, device, label, slices.next(), ceiling))
            except (RuntimeError, _NoRoom) as error:
                left_out.append(f"{kind.name} on {label}: {_first_line(error)}")
    return Answer(measurements=tuple(measured), left_out=tuple(left_out))


def _measurements(plan: Sequence[Gemm], rates: Mapping[str, float], precision: str, label: str) -> list[Measurement]:
    """The best square is the ceiling of all, and what a profile's rate is about."""
    ceilings = {name: rate for name, rate in rates.items() if name.endswith("³")}
    best = max(ceilings, key=lambda name: ceilings[name], default="")
    by_name = {gemm.name: gemm for gemm in plan}
    return [
        Measurement(
            pillar="compute", group=f"GEMM {precision}", name=f"GEMM {precision} {name}", device=label, value=rate, unit="TFLOP/s",
            ceiling=ceilings.get(best), rate=f"gemm {precision}" if name == best else None,
            detail=f"{by_name[name].rows} x {by_name[name].inner} x {by_name[name].columns}",
        )
        for name, rate in rates.items()
    ]  # fmt: skip


class _NoRoom(Exception):
    """Not enough memory or time is left."""


def _gemm_seconds(gemm: Gemm, precision: str, device: torch.device, budget_s: float | None) -> float:
    if budget_s is None:
        raise _NoRoom("no time was left; give more --seconds")
    need, free = gemm.values * _BYTES_PER_VALUE.get(precision, 4), free_bytes(device)
    if need > free:
        raise _NoRoom(f"it needs {need / GB:.1f} GB, and {free / GB:.1f} GB are free beside the engine")
    with torch.inference_mode():
        return median_seconds(_gemm(gemm, precision, device), budget_s=budget_s, wait=wait_for(device))


def _gemm(gemm: Gemm, precision: str, device: torch.device) -> Callable[[], object]:
    """x[rows, inner] times the transpose of w[columns, inner], as a linear layer stores it."""
    x_size, w_size = (gemm.rows, gemm.inner), (gemm.columns, gemm.inner)
    if precision in _DTYPES:
        x, w = (torch.randn(size, device=device, dtype=_DTYPES[precision]) for size in (x_size, w_size))
        y = torch.empty((gemm.rows, gemm.columns), device=device, dtype=_DTYPES[precision])
        return lambda: torch.mm(x, w.t(), out=y)
    if precision == "int8":
        x, w = (torch.randint(-127, 128, size, device=device, dtype=torch.int8) for size in (x_size, w_size))
        return lambda: torch._int_mm(x, w.t())
    if precision == "fp8":
        dtype = torch.float8_e4m3fnuz if torch.version.hip and "gfx94" in _architecture(device) else torch.float8_e4m3fn
        x, w = (torch.randn(size, device=device, dtype=torch.bfloat16).to(dtype) for size in (x_size, w_size))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    if precision == "nvfp4":
        x, w = (
            torch.randint(0, 256, (rows, inner // 2), device=device, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
            for rows, inner in (x_size, w_size)
        )
        of_x, of_w = (_block_scales(rows, inner, device) for rows, inner in (x_size, w_size))
        return lambda: torch._scaled_mm(x, w.t(), scale_a=of_x, scale_b=of_w, out_dtype=torch.bfloat16)
    raise NotImplementedError(f"nobody here knows how to multiply in {precision}")


def _block_scales(rows: int, inner: int, device: torch.device) -> torch.Tensor:
    """One for every 16 values, padded to tiles of 128 x 4 as cuBLAS wants them; all the same, so that their order does not matter."""
    return torch.ones((-(-rows // 128) * 128) * (-(-inner // 64) * 4), device=device).to(torch.float8_e4m3fn)


def _architecture(device: torch.device) -> str:
    return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))


def _attention(kind: Attention, device: torch.device, label: str, budget_s: float | None, ceiling: float | None) -> Measurement:
    """torch's own, not the engine's: an engine reads keys and values out of pages."""
    if budget_s is None:
        raise _NoRoom("no time was left; give more --seconds")
    precision = "float32" if device.type == "cpu" else "bf16"
    dtype = _DTYPES[precision]
    need, free = kind.kv_values * dtype.itemsize * 3, free_bytes(device)
    if need > free:
        raise _NoRoom(f"it needs {need / GB:.1f} GB, and {free / GB:.1f} GB are free beside the engine")
    query = torch.randn((kind.batch, kind.heads, kind.queries, kind.head_dim), device=device, dtype=dtype)
    keys, values = (torch.randn((kind.batch, kind.kv_heads, kind.keys, kind.head_dim), device=device, dtype=dtype) for _ in range(2))
    causal = kind.queries == kind.keys
    with torch.inference_mode():
        seconds = median_seconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=causal, enable_gqa=True),
            budget_s=budget_s,
            wait=wait_for(device),
        )
    common = {"pillar": "compute", "group": kind.name, "name": f"{kind.name} {precision}", "device": label}
    sizes = f"{kind.batch} x {kind.queries} tokens over {kind.keys}, {kind.heads} heads, {kind.kv_heads} of keys"
    if causal:
        rate = kind.flops / seconds / _T
        return Measurement.model_validate(
            {**common, "value": rate, "unit": "TFLOP/s", "ceiling": ceiling, "rate": "attention", "detail": sizes}
        )
    rate = kind.kv_values * dtype.itemsize / seconds / GB
    copy = copy_bytes_per_s(device, min(COPY_BYTES, free_bytes(device) // 8), budget_s=_COPY_S) / GB
    return Measurement.model_validate(
        {**common, "value": rate, "unit": "GB/s", "ceiling": copy, "detail": f"keys and values read; {sizes}"}
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


if __name__ == "__main__":
    serve(main)
