"""Devices and profiles by name, out of the YAML that lies beside this module or that a user wrote."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.hardware import Device
from schemas.profile import Profile

_DEVICES = Path(__file__).parent / "devices"
_PROFILES = Path(__file__).parent / "profiles"


def device_names() -> list[str]:
    return sorted(path.stem for path in _DEVICES.glob("*.yaml"))


@cache
def load_device(name: str, beside: Path | None = None) -> Device:
    """By name; a file of that name in the folder `beside` goes first, so that a user can describe a device of their own.

    Raises JobError naming those there are.
    """
    for path in [folder / f"{name}.yaml" for folder in (beside, _DEVICES) if folder is not None]:
        if path.is_file():
            try:
                return Device.model_validate({"name": name, **_mapping(path)})
            except ValidationError as error:
                raise JobError(f"device {path}: {describe_validation(error)}") from None
    raise JobError(f"device: found {name!r}; allowed are {', '.join(device_names())}, or a {name}.yaml beside the profile")


def profile_names() -> list[str]:
    return sorted(path.stem for path in _PROFILES.glob("*.yaml"))


def find_profile(name: str) -> Profile:
    """By name, by the name of a VM size, or a path to a .yaml of the user's own; with its device, which may lie beside it.

    Raises JobError naming those there are.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise JobError(f"engine.profile: there is no file {path}; `tokenmill profiles NAME` prints one to start from")
    else:
        path = _PROFILES / f"{name}.yaml"
    if not path.is_file():
        sized = [profile for profile in map(find_profile, profile_names()) if profile.node and profile.node.vm_size == name]
        if sized:
            return sized[0]
        raise JobError(f"engine.profile: found {name!r}; allowed are auto, {', '.join(profile_names())}, a VM size, or a path to a .yaml")
    try:
        profile = Profile.model_validate({"name": path.stem, **_mapping(path)})
    except ValidationError as error:
        raise JobError(f"profile {path}: {describe_validation(error)}") from None
    if profile.node is None or profile.accelerator is not None:
        return profile
    return profile.model_copy(update={"accelerator": load_device(profile.node.device, path.parent)})


def profile_text(name: str) -> str:
    """The YAML of one of ours. Raises JobError naming those there are."""
    return (_PROFILES / f"{find_profile(name).name}.yaml").read_text()


def profile_yaml(profile: Profile) -> str:
    """As a file that `find_profile` reads back, with its device."""
    return yaml.safe_dump(profile.model_dump(mode="json", exclude_defaults=True, exclude={"name"}), sort_keys=False)


def device_of(profile: Profile) -> Device | None:
    """What its node computes on; None where the profile does not say. Raises JobError where no such device is described."""
    if profile.accelerator is not None or profile.node is None:
        return profile.accelerator
    return load_device(profile.node.device)


def pci_name(device_id: int) -> str:
    """What a device with this number on the PCI bus is; empty where none of ours says so."""
    return next((device.description for device in map(load_device, device_names()) if device_id in device.pci_ids), "")


def known_sizes() -> list[Profile]:
    """The profiles of Azure's sizes, by name."""
    return [profile for profile in map(find_profile, profile_names()) if profile.node is not None and profile.node.vm_size]


def profile_of_gpus(gpu_name: str, num_gpus: int) -> Profile | None:
    """The size whose node has as many devices of that name, as the driver says it."""
    for profile in known_sizes():
        device = device_of(profile)
        assert profile.node is not None
        assert device is not None
        if device.driver_name and device.driver_name.lower() in gpu_name.lower() and profile.node.devices == num_gpus:
            return profile
    return None


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise JobError(f"{path}: holds {type(data).__name__}, expected a mapping")
    return data
