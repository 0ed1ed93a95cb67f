"""What is known of devices and sizes: data with sources, a user's own beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.hardware import device_names
from pipeline.hardware import device_of
from pipeline.hardware import find_profile
from pipeline.hardware import known_sizes
from pipeline.hardware import load_device
from pipeline.hardware import profile_of_gpus
from schemas.errors import JobError
from schemas.hardware import Device
from schemas.hardware import Figure
from schemas.hardware import Rate
from schemas.profile import Profile

SIZES = {
    "Standard_ND96asr_v4": ("a100-40", 8),
    "Standard_ND96amsr_A100_v4": ("a100-80", 8),
    "Standard_ND96isr_H100_v5": ("h100-80", 8),
    "Standard_ND96isr_H200_v5": ("h200-141", 8),
    "Standard_ND96isr_MI300X_v5": ("mi300x", 8),
    "Standard_ND128isr_NDR_GB200_v6": ("gb200", 4),
    "Standard_ND128isr_GB300_v6": ("gb300", 4),
}


def figure(value: float) -> Figure:
    return Figure(value=value, basis="assumed", source="a test")


def test_the_seven_sizes_are_there() -> None:
    found = {str(size.node.vm_size): (size.node.device, size.node.devices) for size in known_sizes() if size.node}
    assert found == SIZES


@pytest.mark.parametrize("name", device_names())
def test_every_device_computes_in_bf16_and_says_where_its_numbers_come_from(name: str) -> None:
    device = load_device(name)
    assert device.gemm_flops("bf16") > 1e13
    assert device.attention_flops < device.gemm_tflops["bf16"].ceiling(1.0) * 1e12
    assert 0 < device.bytes_per_s < 1e13
    for rate in [*device.gemm_tflops.values(), device.bandwidth_tb_per_s]:
        if rate.peak and rate.measured:
            assert rate.measured.value < rate.peak.value, name


def test_blackwell_nodes_are_arm_and_doubtful_in_azure_batch() -> None:
    said = {size.node.vm_size: (size.node.architecture, size.node.batch) for size in known_sizes() if size.node}
    assert said["Standard_ND128isr_GB300_v6"] == ("aarch64", "doubtful")
    assert said["Standard_ND96isr_H100_v5"] == ("x86_64", "confirmed")


def test_a_device_must_say_how_fast_bf16_is() -> None:
    values = load_device("h100-80").model_dump()
    del values["gemm_tflops"]["bf16"]
    with pytest.raises(ValidationError, match="gemm_tflops: bf16 is missing"):
        Device.model_validate(values)


def test_a_measured_rate_goes_before_a_share_of_the_peak() -> None:
    assert Rate(peak=figure(100), measured=figure(60)).ceiling(0.7) == 60
    assert Rate(peak=figure(100)).ceiling(0.7) == pytest.approx(70)


def test_a_rate_without_any_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="give peak, measured, or both"):
        Rate()


def test_a_size_is_found_by_its_name_at_azure_too() -> None:
    assert find_profile("Standard_ND96isr_H100_v5").name == "nd96isr-h100-v5"


def test_machines_are_recognised_by_what_the_driver_calls_their_gpus() -> None:
    found = profile_of_gpus("NVIDIA H100 80GB HBM3", 8)
    assert found is not None
    assert found.name == "nd96isr-h100-v5"
    assert profile_of_gpus("NVIDIA H100 80GB HBM3", 1) is None
    assert profile_of_gpus("NVIDIA GeForce", 8) is None


def test_a_size_of_the_users_own_needs_no_python(tmp_path: Path) -> None:
    own = yaml.safe_load((Path("pipeline/profiles") / "nd96isr-h100-v5.yaml").read_text())
    own["node"] |= {"vm_size": "Standard_Mine", "device": "mine", "devices": 2}
    device = yaml.safe_load((Path("pipeline/devices") / "h100-80.yaml").read_text())
    device["memory_gb"]["value"] = 96
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(device))
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(own))
    profile = find_profile(str(tmp_path / "node.yaml"))
    found = device_of(profile)
    assert isinstance(found, Device)
    assert (profile.name, found.memory_bytes) == ("node", 96e9)
    (tmp_path / "mine.yaml").unlink()
    again = Profile.model_validate_json(profile.model_dump_json())
    assert device_of(again) == found  # as a tuned profile, which is stored elsewhere, still knows it


def test_every_size_says_in_which_precision_its_weights_are_best() -> None:
    best = {"A100": "int8", "H100": "fp8", "H200": "fp8", "MI300X": "fp8", "GB200": "nvfp4", "GB300": "nvfp4"}
    for size in known_sizes():
        device = device_of(size)
        assert device is not None
        assert size.precision == next(precision for name, precision in best.items() if name in (device.driver_name or ""))
        assert size.precision in device.gemm_tflops
    assert find_profile("local-cpu").precision == "int8"


def test_every_size_names_what_a_batch_runs_with_and_no_figure_is_published_that_nobody_read() -> None:
    for size in known_sizes():
        assert {"attention_backend", "max_cudagraph_capture_size", "gpu_memory_utilization"} <= set(size.options), size.name
        assert size.options["max_cudagraph_capture_size"] >= size.max_num_seqs
        fabric = size.node.fabric_gbit_per_s if size.node is not None else None
        assert fabric is not None
        assert (fabric.basis == "assumed") is ("not read" in fabric.source)


def test_a_profile_may_say_what_is_preloaded(tmp_path: Path) -> None:
    own = {**yaml.safe_load((Path("pipeline/profiles") / "local-cpu.yaml").read_text()), "preload": ["iomp"]}
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(own))
    assert find_profile(str(tmp_path / "node.yaml")).preload == ("iomp",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devcies": 3}, "node.devcies: unknown key"),
        ({"device": "h1000"}, "device: found 'h1000'; allowed are a100-40"),
        ({"price": {"usd_per_hour": 1.0, "region": "x", "date": "soon", "basis": "assumed", "source": "s"}}, "Invalid isoformat string"),
        ({"devices": 0}, "node.devices"),
    ],
)
def test_a_wrong_profile_is_refused_naming_the_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    own = yaml.safe_load((Path("pipeline/profiles") / "nd96isr-h100-v5.yaml").read_text())
    own["node"] |= change
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(JobError, match=message):
        find_profile(str(tmp_path / "node.yaml"))


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text("{")
    with pytest.raises(JobError, match="cannot be read as YAML"):
        find_profile(str(tmp_path / "node.yaml"))
    with pytest.raises(JobError, match="there is no file"):
        find_profile(str(tmp_path / "none.yaml"))
