"""A node's local disks: which are taken, which never, and what an earlier start made is used again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import main
from pipeline.scratch import make_scratch
from pipeline.scratch import plan_scratch
from pipeline.scratch import read_disks
from schemas.errors import JobError

_LOCAL = "Microsoft NVMe Direct Disk              "
_SYSTEM = {
    "name": "/dev/sda", "type": "disk", "size": 274877906944, "model": "Virtual Disk", "fstype": None, "label": None, "mountpoints": [None],
    "children": [{"name": "/dev/sda1", "type": "part", "size": 274760433152, "fstype": "ext4", "label": "root", "mountpoints": ["/"]}],
}  # fmt: skip


def disk(name: str, **instead: Any) -> dict[str, Any]:
    """A raw local disk, as lsblk shows it on an ND H100 v5."""
    plain = {"type": "disk", "size": 3840755982336, "model": _LOCAL, "fstype": None, "label": None, "mountpoints": [None]}
    return {"name": name, **plain, **instead}


def commands(*devices: dict[str, Any]) -> list[str]:
    return [" ".join(command) for command in plan_scratch(read_disks({"blockdevices": list(devices)}), "/mnt/tokenmill").commands]


def test_raw_local_disks_are_joined_to_one() -> None:
    eight = [disk(f"/dev/nvme{index}n1") for index in range(8)]
    plan = plan_scratch(read_disks({"blockdevices": [_SYSTEM, *eight]}), "/mnt/tokenmill")
    assert [" ".join(command) for command in plan.commands] == [
        "mdadm --create /dev/md/tokenmill --run --name tokenmill --level 0 --raid-devices 8 "
        + " ".join(f"/dev/nvme{index}n1" for index in range(8)),
        "mkfs.xfs -K -L tokenmill /dev/md/tokenmill",
        "mount --options noatime /dev/md/tokenmill /mnt/tokenmill",
    ]
    assert plan.found == "8 local disks joined, 30.7 TB"


def test_one_local_disk_needs_no_joining() -> None:
    assert commands(_SYSTEM, disk("/dev/nvme0n1", model="Microsoft NVMe Direct Disk v2")) == [
        "mkfs.xfs -K -L tokenmill /dev/nvme0n1",
        "mount --options noatime /dev/nvme0n1 /mnt/tokenmill",
    ]


@pytest.mark.parametrize(
    "taken",
    [
        {"model": "MSFT NVMe Accelerator v1.0"},
        {"model": "Virtual Disk"},
        {"model": None},
        {"fstype": "ext4"},
        {"mountpoints": ["/mnt/resource"]},
        {"children": [{"name": "/dev/nvme0n1p1", "type": "part", "size": 1, "fstype": "ext4", "label": "data", "mountpoints": [None]}]},
        {
            "fstype": "linux_raid_member",
            "label": "node:batch",
            "children": [{"name": "/dev/md0", "type": "raid0", "size": 1, "fstype": "xfs"}],
        },
    ],
)
def test_a_disk_that_is_no_local_one_or_has_anything_on_it_is_left_alone(taken: dict[str, Any]) -> None:
    assert commands(_SYSTEM, disk("/dev/nvme0n1", **taken)) == []
    left = commands(_SYSTEM, disk("/dev/nvme0n1", **taken), disk("/dev/nvme1n1"))
    assert left == ["mkfs.xfs -K -L tokenmill /dev/nvme1n1", "mount --options noatime /dev/nvme1n1 /mnt/tokenmill"]


def test_what_an_earlier_start_made_is_mounted_again_and_not_made_again() -> None:
    array = {"name": "/dev/md127", "type": "raid0", "size": 7, "fstype": "xfs", "label": "tokenmill", "mountpoints": [None]}
    member = {"fstype": "linux_raid_member", "label": "node:tokenmill"}
    running = [disk(f"/dev/nvme{index}n1", **member, children=[array]) for index in range(2)]
    assert commands(_SYSTEM, *running) == ["mount --options noatime /dev/md127 /mnt/tokenmill"]
    stopped = [disk(f"/dev/nvme{index}n1", **member) for index in range(2)]
    assert commands(_SYSTEM, *stopped) == [
        "mdadm --assemble /dev/md/tokenmill /dev/nvme0n1 /dev/nvme1n1",
        "mount --options noatime /dev/md/tokenmill /mnt/tokenmill",
    ]
    assert commands(disk("/dev/nvme0n1", fstype="xfs", label="tokenmill")) == ["mount --options noatime /dev/nvme0n1 /mnt/tokenmill"]


def test_the_folder_is_there_for_every_user_whatever_disks_there_are(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(command: Sequence[str]) -> str:
        ran.append(" ".join(command))
        return json.dumps({"blockdevices": [_SYSTEM, disk("/dev/nvme0n1")]}) if command[0] == "lsblk" else ""

    folder = tmp_path / "mnt" / "tokenmill"
    assert make_scratch(str(folder), run) == f"{folder}: one local disk, 3.8 TB"
    assert [command.split()[0] for command in ran] == ["lsblk", "mkfs.xfs", "mount"]
    assert folder.stat().st_mode & 0o7777 == 0o1777


def test_a_disk_that_cannot_be_made_stops_the_start_and_says_why(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str:
        if command[0] == "lsblk":
            return json.dumps({"blockdevices": [disk("/dev/nvme0n1")]})
        raise JobError("`mkfs.xfs` ended with 1: no")

    with pytest.raises(JobError, match="mkfs"):
        make_scratch(str(tmp_path / "scratch"), run)


def test_node_start_on_a_machine_without_local_disks_makes_a_folder_and_fetches_the_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.scratch._run", lambda command: json.dumps({"blockdevices": [_SYSTEM]}))
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "scratch"
    for _ in range(2):
        done = CliRunner().invoke(main, ["node-start", str(folder), "--model", str(tiny_model)])
        assert (done.exit_code, done.exception) == (0, None), done.output
        assert "no local disk is free" in done.output
    assert (folder / "cache").stat().st_mode & 0o7777 == 0o1777
    assert all(path.stat().st_mode & 0o006 == 0o006 for path in (folder / "cache").rglob("*"))
