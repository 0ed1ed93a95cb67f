"""A node's local disks: which are taken, which never, and what an earlier start made is used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import main
from pipeline.scratch import Plan
from pipeline.scratch import make_scratch
from pipeline.scratch import plan_scratch
from pipeline.scratch import read_disks
from pipeline.scratch import run_command
from schemas.errors import JobError

_LOCAL = "Microsoft NVMe Direct Disk              "
_SYSTEM = {
    "name": "/dev/sda", "type": "disk", "size": 274877906944, "model": "Virtual Disk", "mountpoints": [None],
    "children": [{"name": "/dev/sda1", "type": "part", "size": 274760433152, "model": None, "mountpoints": ["/"]}],
}  # fmt: skip
_ON_DISKS = {"/dev/sda": "PTTYPE=gpt"}
_ARRAY = "/dev/md100"


def disk(name: str, **instead: Any) -> dict[str, Any]:
    """A raw local disk, as lsblk shows it on an ND H100 v5."""
    return {"name": name, "type": "disk", "size": 3840755982336, "model": _LOCAL, "mountpoints": [None], **instead}


def planned(devices: Sequence[dict[str, Any]], holding: Mapping[str, str]) -> Plan:
    found = {path: f"DEVNAME={path}\n{text}\n" for path, text in {**_ON_DISKS, **holding}.items()}
    return plan_scratch(read_disks({"blockdevices": list(devices)}, lambda path: found.get(path, "")), "/mnt/tokenmill")


def commands(*devices: dict[str, Any], **holding: str) -> list[str]:
    """`nvme0n1="TYPE=ext4"`: what blkid finds there."""
    plan = planned(devices, {f"/dev/{name}": text for name, text in holding.items()})
    return [" ".join(command) for command in plan.commands]


def test_raw_local_disks_are_joined_to_one() -> None:
    names = [f"/dev/nvme{index}n1" for index in range(8)]
    plan = planned([_SYSTEM, *map(disk, names)], {})
    assert [" ".join(command) for command in plan.commands] == [
        f"mdadm --create {_ARRAY} --run --name tokenmill --level 0 --raid-devices 8 {' '.join(names)}",
        f"mkfs.xfs -K -L tokenmill {_ARRAY}",
        f"mount --options noatime {_ARRAY} /mnt/tokenmill",
    ]
    assert plan.found == "8 local disks joined, 30.7 TB"


def test_one_local_disk_needs_no_joining() -> None:
    assert commands(_SYSTEM, disk("/dev/nvme0n1", model="Microsoft NVMe Direct Disk v2")) == [
        "mkfs.xfs -K -L tokenmill /dev/nvme0n1",
        "mount --options noatime /dev/nvme0n1 /mnt/tokenmill",
    ]


@pytest.mark.parametrize(
    ("taken", "holds"),
    [
        ({"model": "MSFT NVMe Accelerator v1.0"}, ""),
        ({"model": "Virtual Disk"}, ""),
        ({"model": None}, ""),
        ({}, "TYPE=ext4"),
        ({}, "PTTYPE=gpt"),
        ({}, "TYPE=linux_raid_member\nLABEL=node:batch"),
        ({"mountpoints": ["/mnt/resource"]}, ""),
        ({"children": [{"name": "/dev/nvme0n1p1", "type": "part", "size": 1, "mountpoints": [None]}]}, ""),
        (
            {"children": [{"name": "/dev/md0", "type": "raid0", "size": 1, "mountpoints": [None]}]},
            "TYPE=linux_raid_member\nLABEL=node:batch",
        ),
    ],
)
def test_a_disk_that_is_no_local_one_or_has_anything_on_it_is_left_alone(taken: dict[str, Any], holds: str) -> None:
    assert commands(_SYSTEM, disk("/dev/nvme0n1", **taken), nvme0n1=holds) == []
    left = commands(_SYSTEM, disk("/dev/nvme0n1", **taken), disk("/dev/nvme1n1"), nvme0n1=holds)
    assert left == ["mkfs.xfs -K -L tokenmill /dev/nvme1n1", "mount --options noatime /dev/nvme1n1 /mnt/tokenmill"]


def test_what_an_earlier_start_made_is_mounted_again_and_not_made_again() -> None:
    array = {"name": "/dev/md127", "type": "raid0", "size": 7, "model": None, "mountpoints": [None]}
    member = "TYPE=linux_raid_member\nLABEL=node:tokenmill"
    running = [disk(f"/dev/nvme{index}n1", children=[array]) for index in range(2)]
    again = commands(_SYSTEM, *running, nvme0n1=member, nvme1n1=member, md127="LABEL=tokenmill\nTYPE=xfs")
    assert again == ["mount --options noatime /dev/md127 /mnt/tokenmill"]
    assert commands(_SYSTEM, disk("/dev/nvme0n1"), disk("/dev/nvme1n1"), nvme0n1=member, nvme1n1=member) == [
        f"mdadm --assemble {_ARRAY} /dev/nvme0n1 /dev/nvme1n1",
        f"mount --options noatime {_ARRAY} /mnt/tokenmill",
    ]
    assert commands(disk("/dev/nvme0n1"), nvme0n1="LABEL=tokenmill\nTYPE=xfs") == ["mount --options noatime /dev/nvme0n1 /mnt/tokenmill"]


def test_the_folder_is_there_for_every_user_whatever_disks_there_are(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(command: Sequence[str]) -> str:
        ran.append(" ".join(command))
        if command[0] == "blkid":
            return _ON_DISKS.get(command[-1], "")
        return json.dumps({"blockdevices": [_SYSTEM, disk("/dev/nvme0n1")]}) if command[0] == "lsblk" else ""

    folder = tmp_path / "mnt" / "tokenmill"
    assert make_scratch(str(folder), run) == f"{folder}: one local disk, 3.8 TB"
    assert [command.split()[0] for command in ran] == ["lsblk", "blkid", "mkfs.xfs", "mount"]
    assert folder.stat().st_mode & 0o7777 == 0o1777


def test_a_disk_that_cannot_be_made_stops_the_start_and_says_why(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str:
        if command[0] == "lsblk":
            return json.dumps({"blockdevices": [disk("/dev/nvme0n1")]})
        if command[0] == "blkid":
            return ""
        raise JobError("`mkfs.xfs` ended with 1: no")

    with pytest.raises(JobError, match="mkfs"):
        make_scratch(str(tmp_path / "scratch"), run)


def test_node_start_on_a_machine_without_local_disks_makes_a_folder_and_fetches_the_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"lsblk": json.dumps({"blockdevices": [_SYSTEM]}), "blkid": "PTTYPE=gpt"}
    monkeypatch.setattr("pipeline.scratch.run_command", lambda command: answers[command[0]])
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "scratch"
    for _ in range(2):
        done = CliRunner().invoke(main, ["node-start", str(folder), "--model", str(tiny_model)])
        assert (done.exit_code, done.exception) == (0, None), done.output
        assert "no local disk is free" in done.output
    assert (folder / "cache").stat().st_mode & 0o7777 == 0o1777
    assert all(path.stat().st_mode & 0o006 == 0o006 for path in (folder / "cache").rglob("*"))


_REAL = os.geteuid() == 0 and all(shutil.which(tool) for tool in ("losetup", "mkfs.xfs", "blkid")) and Path("/dev/loop-control").exists()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A real block device, in a file."""
    file = tmp_path / "disk"
    with file.open("wb") as opened:
        opened.truncate(400 << 20)
    done = subprocess.run(["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


@pytest.mark.skipif(not _REAL, reason="needs root, loop devices and xfsprogs")
def test_a_real_device_is_made_once_keeps_its_files_and_another_s_is_never_taken(tmp_path: Path, loop: str) -> None:
    """lsblk's listing is made up, so that nothing but the loop device is ever in it; what is run on it is real."""

    def run(command: Sequence[str]) -> str:
        return json.dumps({"blockdevices": [disk(loop)]}) if command[0] == "lsblk" else run_command(command)

    folder = tmp_path / "scratch"
    try:
        assert make_scratch(str(folder), run) == f"{folder}: one local disk, 3.8 TB"
        (folder / "weights").write_text("here")
        assert make_scratch(str(folder), run) == f"{folder} is mounted already"
        subprocess.run(["umount", str(folder)], check=True)
        assert not (folder / "weights").exists()
        assert "mounted again" in make_scratch(str(folder), run)
        assert (folder / "weights").read_text() == "here"
        subprocess.run(["umount", str(folder)], check=True)
        subprocess.run(["mkfs.xfs", "-f", "-L", "somebody", loop], check=True, capture_output=True)
        assert "no local disk is free" in make_scratch(str(folder), run)
        assert not os.path.ismount(folder)
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", str(folder)], check=True)
