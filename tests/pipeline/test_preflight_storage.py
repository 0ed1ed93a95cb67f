"""A store and a disk, measured for real and left as they were."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import preflight
from pipeline import storage
from pipeline.preflight_storage import Disk
from pipeline.preflight_storage import Store
from pipeline.preflight_storage import file_system_of
from pipeline.preflight_storage import measure_place
from pipeline.preflight_storage import missing_folders
from pipeline.preflight_storage import object_bytes
from schemas.errors import JobError
from schemas.preflight import Order


def order(**values: Any) -> Order:
    return Order(**{"pillar": "storage", "seconds": 0.4, "devices": ("cpu",), **values})


def test_a_quick_store_gets_large_objects_and_a_slow_one_small_ones() -> None:
    assert object_bytes(1 << 20, 0.0001, 1.0) == 8 << 20
    assert object_bytes(1 << 20, 0.01, 1.0) == pytest.approx((1 << 20) * 100 / 32, abs=1)
    assert object_bytes(1 << 20, 10.0, 1.0) == 64 << 10


def test_the_file_system_is_the_one_that_is_mounted_nearest() -> None:
    mounts = "/dev/sda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/md0 /tmp/nvme xfs rw 0 0\n"
    assert [file_system_of(Path(path), mounts) for path in ("/home/x", "/tmp", "/tmp/a", "/tmp/nvme/b", "/tmpfoo")] == [
        "ext4", "tmpfs", "tmpfs", "xfs", "ext4"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_store_and_a_disk_are_measured_and_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part.parquet").write_bytes(b"not ours")
    answer = preflight.measure(order(output=str(tmp_path / "out"), disk=str(tmp_path)))
    figures = {measurement.name: (measurement.unit, measurement.device) for measurement in answer.measurements}
    assert figures == {
        f"{place} {act}": ("objects/s" if act in ("create", "get") else "GB/s", "node")
        for place in ("store", "disk")
        for act in ("write", "read", "create", "get")
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part.parquet"]


def test_folders_that_were_made_for_it_are_gone_again_and_others_stay(tmp_path: Path) -> None:
    uri = str(tmp_path / "not" / "there" / "mark")
    assert missing_folders(uri) == [uri, str(tmp_path / "not" / "there"), str(tmp_path / "not")]
    assert missing_folders("az://container/out") == []
    store = Store(uri, missing_folders(uri))
    store.write("one", b"1")
    (tmp_path / "not" / "mine").write_text("somebody else's")
    store.clean()
    assert [path.name for path in (tmp_path / "not").iterdir()] == ["mine"]


def test_a_store_that_is_no_folder_works_too() -> None:
    store = Store("memory://preflight/mark", [])
    measured = measure_place(store, group="store", where="memory", seconds=0.2, most_bytes=64 << 20)
    assert len(measured) == 4
    assert storage.list_names("memory://preflight/mark") == {}


@pytest.mark.slow
def test_without_an_output_the_store_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    answer = preflight.measure(order(disk=str(tmp_path)))
    assert {measurement.group.split()[0] for measurement in answer.measurements} == {"disk"}
    assert answer.left_out == ("the store: no output was named; give --output",)


def test_a_disk_that_is_memory_is_not_measured() -> None:
    if not (Path("/dev/shm").is_dir() and os.access("/dev/shm", os.W_OK)):
        pytest.skip("no /dev/shm here")
    answer = preflight.measure(order(disk="/dev/shm"))
    assert answer.measurements == ()
    assert answer.left_out[1] == "the local disk: /dev/shm is tmpfs, which is memory; name another folder by --disk"


class Failing(Disk):
    """A disk that fails at the tenth object."""

    def write(self, name: str, data: bytes) -> None:
        if name == "large-9":
            raise OSError(5, "input/output error")
        super().write(name, data)


def test_what_was_written_is_deleted_where_the_store_fails_in_between(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="input/output error"):
        measure_place(Failing(tmp_path / "mark"), group="disk", where="here", seconds=2.0, most_bytes=1 << 30)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_store_that_refuses_is_a_failed_pillar_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file, where a folder is expected")
    with pytest.raises(JobError, match="Not a directory"):
        preflight.measure(order(output=str(tmp_path / "out"), disk=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"--disk: there is no folder {tmp_path}/gone"):
        preflight.measure(order(disk=str(tmp_path / "gone")))
