"""Versions: what is installed here, and what driver, scheduler and workers must have in common to understand each other."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Mapping
from typing import Any

PACKAGES = ("tokenmill", "distributed")


def versions() -> dict[str, str]:
    """Of this process."""
    here = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {**here, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def installed(*packages: str) -> dict[str, str]:
    """Versions of those that are installed here."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def from_dask(answer: Mapping[str, Any]) -> dict[str, str]:
    """The same out of what a Dask scheduler says of itself; what is not installed there is `none`."""
    packages = answer["packages"]
    here = {package: packages.get(package) or "none" for package in PACKAGES}
    return {**here, "python": ".".join(packages["python"].split(".")[:2])}


def differences(ours: Mapping[str, str], theirs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence for each party whose versions are not ours."""
    return [
        f"{who} has {name} {found.get(name, 'none')}, this process {version}"
        for who, found in theirs.items()
        for name, version in ours.items()
        if found.get(name) != version
    ]
