"""The GPUs of this machine: how many, what they are called, how much memory one has. Loads neither CUDA nor ROCm into this process."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline.hardware import pci_name

_AMD = 0x1002
_VIDEO_MEMORY = (1, 2)
"""Kinds of memory banks that the driver calls the device's own, seen by the host or not; 0 is the machine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """All of one kind, as on every node that is rented."""

    count: int = 0
    name: str = ""
    """Empty where nobody says."""
    memory_bytes: int = 0
    """Of one; 0 where nobody says."""


def find_gpus(root: Path = Path("/")) -> Gpus:
    """By NVIDIA's device nodes and tool, or else by what AMD's driver says in /sys; `root` is where dev/ and sys/ lie."""
    nvidia = len(list((root / "dev").glob("nvidia[0-9]*")))
    if nvidia:
        name, memory_bytes = _first_of_nvidia()
        return Gpus(count=nvidia, name=name, memory_bytes=memory_bytes)
    nodes = [node for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*")) if _is_gpu(node)]
    return Gpus(count=len(nodes), name=_amd_name(nodes[0], root), memory_bytes=_amd_memory_bytes(nodes[0])) if nodes else Gpus()


def _first_of_nvidia() -> tuple[str, int]:
    """Name and memory, by the driver's own tool."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        name, memory_mib = lines[0].rsplit(",", 1)
        return name.strip(), int(memory_mib) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "", 0


def _is_gpu(node: Path) -> bool:
    """CPUs are nodes of that tree too, with id 0; a GPU that this container may not use cannot be read."""
    return _read(node / "gpu_id") not in ("", "0")


def _amd_name(node: Path, root: Path) -> str:
    """As the card itself says; virtual machines do not see that, but the device's number."""
    said = _numbers(node / "properties")
    own = _read(root / f"sys/class/drm/renderD{said.get('drm_render_minor', 0)}" / "device" / "product_name")
    return own or (pci_name(said.get("device_id", 0)) if said.get("vendor_id") == _AMD else "")


def _amd_memory_bytes(node: Path) -> int:
    banks = map(_numbers, node.glob("mem_banks/*/properties"))
    return sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in _VIDEO_MEMORY)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
