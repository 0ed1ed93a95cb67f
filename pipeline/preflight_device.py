"""A device for a preflight's own process: choose it, know its free memory, wait for it, copy in its memory. torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.stopwatch import median_seconds

GB = 1e9
COPY_BYTES = 512 << 20
"""Of each of a copy's two buffers: several times the last-level cache of one socket."""
_SHARE_OF_FREE_MEMORY = 0.5
"""An engine may be idle beside this process, and its batches need room when it works again."""


def take_device(name: str, core_ids: Sequence[int]) -> torch.device:
    """`cpu` on these cores, or the one GPU that this process was shown. Raises RuntimeError where torch has no GPU."""
    if name != "cpu":
        return torch.device("cuda", 0)
    if core_ids and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, core_ids)  # who started this process may be bound to one core for its engine
        torch.set_num_threads(len(core_ids))
    return torch.device("cpu")


def wait_for(device: torch.device) -> Callable[[], object]:
    """Returns when all that was asked of the device is done."""
    return (lambda: None) if device.type == "cpu" else torch.cuda.synchronize


def free_bytes(device: torch.device) -> int:
    """That a measurement may take."""
    if device.type != "cpu":
        return int(_SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return int(_SHARE_OF_FREE_MEMORY * available)


def copy_bytes_per_s(device: torch.device, num_bytes: int, *, budget_s: float) -> float:
    """Read and written: twice the buffer's bytes for each copy."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), budget_s=budget_s, wait=wait_for(device))


def triad_bytes_per_s(device: torch.device, num_bytes: int, *, budget_s: float) -> float:
    """a = b + s c, as in STREAM: three times the buffer's bytes each."""
    b, c = torch.ones(num_bytes // 4, device=device), torch.ones(num_bytes // 4, device=device)
    a = torch.empty_like(b)
    return 3 * b.nbytes / median_seconds(lambda: torch.add(b, c, alpha=3.0, out=a), budget_s=budget_s, wait=wait_for(device))
