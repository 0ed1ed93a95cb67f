"""Run by the image's build: stops it where a node without internet would later miss something, and nobody would be told."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

_KERNELS = ("flashinfer-cubin", "flashinfer-jit-cache")
_NVCC = "nvidia/cu13/bin/nvcc"


def problems(versions: Mapping[str, str], packages: Path) -> list[str]:
    """`versions` of what is installed in the folder `packages`."""
    found = []
    flashinfer = versions.get("flashinfer-python", "not there")
    for name in _KERNELS:
        have = versions.get(name, "not there")
        if have.split("+")[0] != flashinfer:
            found.append(f"{name} is {have}, flashinfer-python is {flashinfer}: FlashInfer would refuse to be imported, or be left out")
    if not (packages / _NVCC).is_file():
        found.append(f"there is no {_NVCC} in {packages}: kernels that are not precompiled could not be compiled; CUDA_HOME points there")
    found += [f"{name} is not installed" for name in ("tokenmill", "vllm", "flashinfer-python", "ninja") if name not in versions]
    return found


if __name__ == "__main__":
    installed = {one.metadata["Name"].lower(): one.version for one in metadata.distributions()}
    wrong = problems(installed, Path(str(metadata.distribution("vllm").locate_file(""))) if "vllm" in installed else Path(sys.prefix))
    if shutil.which("tokenmill", path=f"{sys.prefix}/bin") is None:
        wrong.append("there is no command tokenmill")
    sys.exit("\n".join(wrong) or 0)
