"""Norms in one kernel give what vLLM's own operations do, and an engine takes them where it is told to."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pipeline.profile import load_profile
from pipeline.profile import this_machine

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def ops() -> Any:
    from pipeline.engine import norms

    norms.register()
    norms.register()
    from vllm import ir

    return ir.ops


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 3, 128])
def test_a_norm_and_a_sum_with_its_norm_are_those_of_torch(ops: Any, dtype: str, tokens: int) -> None:
    import torch

    kind = getattr(torch, dtype)
    torch.manual_seed(tokens)
    x, residual, weight = (torch.randn(*shape, dtype=kind) for shape in ((tokens, 576), (tokens, 576), (576,)))
    close = {"atol": 0.07, "rtol": 0.02} if dtype == "bfloat16" else {"atol": 1e-5, "rtol": 1e-5}
    ours, native = (ops.rms_norm.impls[name].impl_fn(x, weight, 1e-5) for name in ("tokenmill", "native"))
    torch.testing.assert_close(ours, native, **close)
    native = ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
    ours = ops.fused_add_rms_norm.impls["tokenmill"].impl_fn(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(ours, native, **close)


def test_what_the_kernels_do_not_take_is_left_to_torch(ops: Any) -> None:
    import torch

    x, weight = torch.randn(4, 576), torch.ones(576)
    takes = ops.rms_norm.impls["tokenmill"].supports_args
    assert takes(x, weight, 1e-5)
    assert not takes(x, weight.bfloat16(), 1e-5)
    assert not takes(x, weight, 1e-5, 288)
    assert not takes(torch.randn(576, 4).t(), weight, 1e-5)
    assert not ops.fused_add_rms_norm.impls["tokenmill"].supports_args(x, torch.randn(576, 4).t(), weight, 1e-5)


def test_the_profile_of_cpus_names_them() -> None:
    priority = load_profile("local-cpu", this_machine()).options["ir_op_priority"]
    assert priority == {"rms_norm": ["tokenmill"], "fused_add_rms_norm": ["tokenmill"]}


def test_every_process_of_an_engine_has_them() -> None:
    """vLLM loads its plugins in each, and this package is one."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); from vllm import ir; print(sorted(ir.ops.rms_norm.impls))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tokenmill" in done.stdout.splitlines()[-1]
