"""Nodes of the tests' own Batch service: they run tasks' command lines as real processes on this machine, and can vanish."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit

import psutil

from tests.azurite import Azurite

_GRACE_S = 8.0
"""Between Batch's SIGTERM and its SIGKILL."""


class TaskFailed(Exception):
    """Batch could not prepare the task: code and message."""


@dataclass(slots=True, eq=False)
class Node:
    """One machine of a pool."""

    id: str
    slots: int
    state: str = "idle"
    tasks: list[Running] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        return self.state == "idle" and len(self.tasks) < self.slots


@dataclass(slots=True, eq=False)
class Running:
    """A task's process."""

    process: subprocess.Popen[bytes]
    folder: Path
    kill_at: float | None = None

    @property
    def family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ask_to_end(self) -> None:
        if self.kill_at is None and self.process.poll() is None:
            self.kill_at = time.monotonic() + _GRACE_S
            self.process.send_signal(signal.SIGTERM)

    def vanish(self) -> None:
        """As with a machine: nobody is asked."""
        for member in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()

    def poll(self) -> int | None:
        if self.kill_at is not None and time.monotonic() > self.kill_at:
            self.vanish()
        return self.process.poll()


def start(task: Mapping[str, Any], folder: Path, environment: Mapping[str, str], identities: set[str], azurite: Azurite) -> Running:
    """Fetch its resource files and start its command, as Batch does: no shell, the task's own working directory. Raises TaskFailed."""
    work = folder / "wd"
    work.mkdir(parents=True, exist_ok=True)
    for file in task.get("resourceFiles", []):
        _check_identity(file, identities)
        container, name = blob_of(file["httpUrl"], azurite)
        with azurite.client() as client, client.get_blob_client(container, name) as blob:
            (work / file["filePath"]).write_bytes(blob.download_blob().readall())
    settings = {each["name"]: each["value"] for each in task.get("environmentSettings", [])}
    try:
        with (folder / "stdout.txt").open("ab") as out, (folder / "stderr.txt").open("ab") as err:
            process = subprocess.Popen(
                shlex.split(task["commandLine"]),
                cwd=work,
                env={**environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
    except FileNotFoundError as error:
        raise TaskFailed("CommandProgramNotFound", str(error)) from None
    return Running(process=process, folder=folder)


def upload(task: Mapping[str, Any], folder: Path, exit_code: int, identities: set[str], azurite: Azurite) -> None:
    """Its output files. Raises TaskFailed."""
    wanted = {"taskcompletion", "tasksuccess" if exit_code == 0 else "taskfailure"}
    for each in task.get("outputFiles", []):
        if each["uploadOptions"]["uploadCondition"] not in wanted:
            continue
        place = each["destination"]["container"]
        _check_identity(place, identities)
        container = urlsplit(place["containerUrl"]).path.rstrip("/").rpartition("/")[2]
        pattern = each["filePattern"]
        base, inner = (folder, pattern.removeprefix("../")) if pattern.startswith("../") else (folder / "wd", pattern)
        for path in sorted(base.glob(inner)):
            name = f"{place['path']}/{path.name}" if "*" in pattern else place["path"]
            with azurite.client() as client, client.get_blob_client(container, name) as blob:
                blob.upload_blob(path.read_bytes(), overwrite=True)


def blob_of(url: str, azurite: Azurite) -> tuple[str, str]:
    """Container and name, unquoted."""
    path = unquote(urlsplit(url).path).removeprefix(f"/{azurite.account}").lstrip("/")
    container, _, name = path.partition("/")
    return container, name


def _check_identity(place: Mapping[str, Any], identities: set[str]) -> None:
    found = place.get("identityReference", {}).get("resourceId")
    if found not in identities:
        raise TaskFailed("ResourceFileIdentityNotFound" if "httpUrl" in place else "OutputIdentityNotFound", f"{found} is not the pool's")


def base_environment() -> dict[str, str]:
    """What a node's image gives every task."""
    kept = ("HOME", "LANG", "TMPDIR", "PYTHONPATH")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # with `tokenmill` in it
    return {"PATH": path, **{name: os.environ[name] for name in kept if name in os.environ}}
