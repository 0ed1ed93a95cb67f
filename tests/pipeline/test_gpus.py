"""The GPUs of a machine, told from trees as AMD's driver and NVIDIA's lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.gpus import Gpus
from pipeline.gpus import find_gpus
from pipeline.hardware import profile_of_gpus
from pipeline.profile import load_profile
from pipeline.profile import this_machine

MI300X_IN_A_VM = 0x74B5
VRAM_BYTES = 205_822_885_888


def node(root: Path, number: int, *, gpu_id: int, memory_bytes: int, **properties: int) -> Path:
    """One node of the topology, as the driver writes it."""
    place = root / "sys/class/kfd/kfd/topology/nodes" / str(number)
    bank = place / "mem_banks/0/properties"
    bank.parent.mkdir(parents=True)
    (place / "gpu_id").write_text(f"{gpu_id}\n")
    (place / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))
    bank.write_text(f"heap_type {1 if gpu_id else 0}\nsize_in_bytes {memory_bytes}\nflags 0\nwidth 8192\nmem_clk_max 1300\n")
    return place


def cpu(root: Path, number: int) -> Path:
    return node(root, number, gpu_id=0, memory_bytes=925 << 30, cpu_cores_count=48, vendor_id=0, device_id=0, drm_render_minor=0)


def mi300x_node(root: Path, *, gpus: int = 8) -> Path:
    """Two sockets and their GPUs, as ND96isr_MI300X_v5 has them."""
    for number in range(2):
        cpu(root, number)
    for number in range(2, 2 + gpus):
        node(
            root, number, gpu_id=1000 + number, memory_bytes=VRAM_BYTES, vendor_id=0x1002, device_id=MI300X_IN_A_VM,
            drm_render_minor=126 + number,
        )  # fmt: skip
    return root


def test_eight_mi300x_are_counted_without_the_cpus_and_recognised(tmp_path: Path) -> None:
    found = find_gpus(mi300x_node(tmp_path))
    assert found == Gpus(count=8, name="AMD Instinct MI300X 192 GB", memory_bytes=VRAM_BYTES)
    machine = this_machine({}, mi300x_node(tmp_path / "again"))
    assert (machine.num_gpus, machine.gpu_name, machine.gpu_memory_bytes) == (8, found.name, VRAM_BYTES)
    assert load_profile("auto", machine).name == "nd96isr-mi300x-v5"


def test_a_node_with_fewer_of_them_is_none_of_azures_sizes(tmp_path: Path) -> None:
    machine = this_machine({}, mi300x_node(tmp_path, gpus=4))
    assert load_profile("auto", machine).name == "local-gpu"


def test_the_cards_own_name_goes_before_the_devices_number(tmp_path: Path) -> None:
    card = mi300x_node(tmp_path) / "sys/class/drm/renderD128/device"
    card.mkdir(parents=True)
    (card / "product_name").write_text("AMD Instinct Mi300X OAM\n")
    found = find_gpus(tmp_path)
    assert found.name == "AMD Instinct Mi300X OAM"
    assert profile_of_gpus(found.name, found.count) is not None  # whatever its capitals


def test_a_gpu_that_nobody_knows_has_no_name_but_its_memory(tmp_path: Path) -> None:
    node(tmp_path, 0, gpu_id=7, memory_bytes=16 << 30, vendor_id=0x1002, device_id=0x1234, drm_render_minor=128)
    assert find_gpus(tmp_path) == Gpus(count=1, name="", memory_bytes=16 << 30)


def test_cpus_alone_are_no_gpus(tmp_path: Path) -> None:
    cpu(tmp_path, 0)
    assert find_gpus(tmp_path) == Gpus()
    assert load_profile("auto", this_machine({}, tmp_path)).name == "local-cpu"


def test_a_gpu_whose_id_cannot_be_read_is_not_this_containers(tmp_path: Path) -> None:
    place = mi300x_node(tmp_path, gpus=2) / "sys/class/kfd/kfd/topology/nodes/3/gpu_id"
    place.unlink()
    place.mkdir()  # reading it fails, as the driver makes it for a device that a container was not given
    assert find_gpus(tmp_path).count == 1


@pytest.mark.parametrize("properties", ["", "vendor_id\n", "vendor_id x\ndevice_id y z\n"])
def test_damaged_properties_leave_a_nameless_gpu(tmp_path: Path, properties: str) -> None:
    place = node(tmp_path, 0, gpu_id=7, memory_bytes=1)
    (place / "properties").write_text(properties)
    assert find_gpus(tmp_path) == Gpus(count=1, name="", memory_bytes=1)


def test_nvidias_device_nodes_are_counted_without_its_control_ones(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert find_gpus(tmp_path).count == 2


def test_what_the_environment_shows_is_what_there_is(tmp_path: Path) -> None:
    machine = this_machine({"CUDA_VISIBLE_DEVICES": "3,5"}, mi300x_node(tmp_path))
    assert (machine.num_gpus, machine.visible_gpus) == (2, ("3", "5"))


@pytest.mark.parametrize(("said", "expected"), [("", ()), ("-1", ()), ("1,-1,3", ("1",)), ("GPU-5a,2", ("GPU-5a", "2"))])
def test_what_the_environment_hides_is_not_there(tmp_path: Path, said: str, expected: tuple[str, ...]) -> None:
    machine = this_machine({"CUDA_VISIBLE_DEVICES": said}, mi300x_node(tmp_path))
    assert (machine.num_gpus, machine.visible_gpus) == (len(expected), expected)
