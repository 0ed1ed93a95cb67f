"""A node's fast local disk: the raw NVMe disks that Azure leaves lying about, joined to one, formatted and mounted. Needs root.

Sizes with a SCSI temporary disk beside their NVMe disks (H100, H200, MI300X) get only the former mounted, which is 1 of 29 TB.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import JobError

_LOCAL = re.compile(r"Microsoft NVMe Direct Disk( v2)?", re.IGNORECASE)
"""What Azure calls disks of the machine itself; others, the system's among them, come over the network and are never touched."""
_NAME = "tokenmill"
_ARRAY = "/dev/md100"
"""A number, because links by name are made by udev, which a container does not have."""
_LIST = ("lsblk", "--json", "--bytes", "--paths", "--output", "NAME,TYPE,SIZE,MODEL,MOUNTPOINTS")
_PROBE = ("blkid", "--probe", "--output", "export")
"""Reads the disk itself. lsblk and plain blkid would ask udev, and in a container see no file systems on any disk."""
_NOTHING_FOUND = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A block device."""

    path: str
    size_bytes: int
    model: str
    holds: str
    """What blkid finds on it: a file system, a part of an array, or partitions; empty for a raw disk."""
    label: str
    in_use: bool
    """Mounted, or with partitions or an array above it."""

    @property
    def is_local(self) -> bool:
        return _LOCAL.fullmatch(self.model) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to run, and what then is the case, in words."""

    commands: tuple[tuple[str, ...], ...]
    found: str


def make_scratch(folder: str, run: Callable[[Sequence[str]], str]) -> str:
    """Make `folder` the mount point of all local disks together; a plain folder where there are none. Again: nothing to do.

    Returns what it came to. Raises JobError.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(path):
        said = f"{folder} is mounted already"
    else:
        plan = plan_scratch(read_disks(json.loads(run(_LIST)), lambda device: run((*_PROBE, device))), folder)
        for command in plan.commands:
            run(command)
        said = f"{folder}: {plan.found}"
    path.chmod(0o1777)
    return said


def open_to_all(folder: Path) -> None:
    """Everything below was written by root, and is for whatever user a task runs as; nobody may delete what is another's."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o1777 if path.is_dir() else 0o666)


def read_disks(listing: dict[str, Any], probe: Callable[[str], str]) -> list[Disk]:
    """From lsblk's JSON: local disks and arrays, once each; `probe` gives what blkid exports of one. Others are not even looked at."""
    devices = {str(device["name"]): device for top in listing["blockdevices"] for device in _flat(top)}
    return [
        _disk(path, device, probe(path))
        for path, device in devices.items()
        if _LOCAL.fullmatch(str(device.get("model") or "").strip()) or str(device.get("type")).startswith("raid")
    ]


def plan_scratch(disks: Sequence[Disk], folder: str) -> Plan:
    """Use what an earlier start made; else take the raw local disks; else none. Never a disk that has anything on it."""
    mount = ("mount", "--options", "noatime")
    for disk in disks:
        if disk.label == _NAME and disk.holds == "xfs":
            return Plan(commands=((*mount, disk.path, folder),), found=f"what an earlier start made of {disk.path}, mounted again")
    members = [disk.path for disk in disks if disk.holds == "linux_raid_member" and disk.label.split(":")[-1] == _NAME]
    if members:
        assemble = ("mdadm", "--assemble", _ARRAY, *members)
        return Plan(
            commands=(assemble, (*mount, _ARRAY, folder)), found=f"the {len(members)} disks that an earlier start joined, mounted again"
        )
    raw = sorted((disk for disk in disks if disk.is_local and not disk.in_use and not disk.holds), key=lambda disk: disk.path)
    if not raw:
        return Plan(commands=(), found="no local disk is free; a folder on the disk that is there")
    size = f"{sum(disk.size_bytes for disk in raw) / 1e12:.1f} TB"
    paths = [disk.path for disk in raw]
    device = paths[0] if len(paths) == 1 else _ARRAY
    create = ("mdadm", "--create", _ARRAY, "--run", "--name", _NAME, "--level", "0", "--raid-devices", str(len(paths)), *paths)
    # -K: trimming 29 TB first would take minutes, and the disks are new.
    commands = (("mkfs.xfs", "-K", "-L", _NAME, device), (*mount, device, folder))
    joined = f"{len(paths)} local disks joined" if len(paths) > 1 else "one local disk"
    return Plan(commands=commands if len(paths) == 1 else (create, *commands), found=f"{joined}, {size}")


def _flat(device: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield device
    for child in device.get("children") or []:
        yield from _flat(child)


def _disk(path: str, device: dict[str, Any], exported: str) -> Disk:
    found = dict(line.split("=", 1) for line in exported.splitlines() if "=" in line)
    return Disk(
        path=path,
        size_bytes=int(device.get("size") or 0),
        model=str(device.get("model") or "").strip(),
        holds=found.get("TYPE") or found.get("PTTYPE") or "",
        label=found.get("LABEL", "").replace("\\", ""),
        in_use=bool(device.get("children") or [one for one in device.get("mountpoints") or [] if one]),
    )


def run_command(command: Sequence[str]) -> str:
    """What it prints. Raises JobError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise JobError(f"{command[0]} is not installed; the worker image has it (infra/image)") from None
    if done.returncode != 0 and (command[: len(_PROBE)] != _PROBE or done.returncode != _NOTHING_FOUND):
        why = done.stderr.strip() or done.stdout.strip()
        root = "" if os.geteuid() == 0 else "; this needs root: in a container, --privileged and user 0"
        raise JobError(f"`{' '.join(command)}` ended with {done.returncode}: {why}{root}")
    return done.stdout
