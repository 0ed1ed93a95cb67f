"""`tokenmill` commands as processes of their own, for tests of what several of them do together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

TOKENMILL = str(Path(sys.executable).with_name("tokenmill"))
PATIENCE_S = 180.0
"""Nothing waits for a time to pass, only for things to happen; this is when a test gives up waiting."""


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Fails where patience ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def said_as_json(*words: str) -> dict[str, Any]:
    """What a command with --json says; what it says besides goes where ours goes. Raises where it fails."""
    done = subprocess.run([TOKENMILL, *words, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


class Command:
    """A command that runs in a session of its own; what it prints goes to a file in `folder`."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [TOKENMILL, *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_for(self, what: str, condition: Callable[[], bool] | None = None) -> None:
        """Until it has printed this, or the condition holds. Fails where it ends before, or patience does."""
        holds = condition or (lambda: what in self.log)
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            ended = self._process.poll()
            assert ended is None or holds(), f"it ended with {ended} before {what!r}:\n{self.log}"
            assert time.monotonic() < deadline, f"waited in vain for {what!r}:\n{self.log}"
            time.sleep(0.05)

    def end(self) -> int:
        """Its exit code."""
        try:
            return self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs:\n{self.log}")

    def family(self) -> list[psutil.Process]:
        """Itself and everything it started that still runs."""
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """With everything it started."""
        for process in self.family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


def listening(processes: list[psutil.Process]) -> set[str]:
    """Every local address on which they accept connections."""
    return {connection.laddr.ip for process in processes for connection in process.net_connections("inet") if connection.status == "LISTEN"}
