"""The optional installer of a browser: it installs where it can, and fails nowhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "setup-chromium"
_TOOLS = ("bash", "env", "mktemp", "tail", "rm", "timeout")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of commands that is all of PATH; its root is whoever `id` says."""
    for tool in _TOOLS:
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    command(tmp_path, "id", "echo 0")
    return tmp_path


def command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def ran(machine: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine / "bash", _SCRIPT], env={"PATH": str(machine), **environment}, capture_output=True, text=True, check=False
    )


def test_a_browser_that_is_there_is_enough(machine: Path) -> None:
    command(machine, "chromium", "exit 1")
    done = ran(machine)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_machine_without_apt_is_told_what_will_be_skipped(machine: Path) -> None:
    done = ran(machine)
    assert (done.returncode, done.stdout) == (0, "")
    assert "neither chromium nor apt-get is here, so the tests in a browser will be skipped" in done.stderr


def test_root_installs_it(machine: Path, tmp_path: Path) -> None:
    command(machine, "apt-get", f'echo "$@" >> {tmp_path}/asked')
    done = ran(machine)
    assert (done.returncode, done.stdout) == (0, "setup: chromium is ready\n")
    assert "install -y --no-install-recommends chromium fonts-dejavu-core" in (tmp_path / "asked").read_text()


def test_an_apt_that_fails_fails_nothing_else(machine: Path) -> None:
    command(machine, "apt-get", "echo 'E: Unable to locate package chromium'; exit 100")
    done = ran(machine)
    assert (done.returncode, done.stdout) == (0, "")
    assert "E: Unable to locate package chromium" in done.stderr
    assert "skipped" in done.stderr


@pytest.mark.parametrize(("ci", "installs"), [("", False), ("true", True)])
def test_another_user_s_machine_is_changed_in_ci_alone(machine: Path, ci: str, installs: bool) -> None:
    command(machine, "id", "echo 1000")
    command(machine, "sudo", 'shift; exec "$@"')
    command(machine, "true", "exit 0")
    command(machine, "apt-get", "exit 0")
    done = ran(machine, CI=ci)
    assert (done.returncode, "is ready" in done.stdout) == (0, installs)
