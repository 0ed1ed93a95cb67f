"""RMS norms for vLLM on CPUs, one kernel each. vLLM ships them and by itself computes norms in five to eight torch operations.

Installed as vLLM's plugin, so that every process of an engine has them; taken where the engine argument `ir_op_priority` names them.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROVIDER = "tokenmill"


def register() -> None:
    """Twice is once. Does nothing on GPUs, whose kernels vLLM takes by itself; where a build has none of these, its own is taken."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm import ir

    if PROVIDER in ir.ops.rms_norm.impls:
        return
    current_platform.import_kernels()
    there = hasattr(torch.ops._C, "rms_norm") and hasattr(torch.ops._C, "fused_add_rms_norm")
    ir.ops.rms_norm.register_impl(PROVIDER, supported=there, supports_args=_takes_norm)(_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supported=there, supports_args=_takes_sum, inplace=True)(_fused_add_rms_norm)


def _takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and (weight is None or weight.dtype == x.dtype) and x.is_contiguous()


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


def _takes_sum(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _takes_norm(x, weight, epsilon, variance_size) and x_residual.is_contiguous()


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
