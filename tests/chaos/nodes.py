"""A cluster of its own for the storm: a scheduler and nodes as processes, started again whenever they end, as a service manager would."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.test_processes import Running


class Site:
    """`tokenmill keys`, `tokenmill scheduler`, and a `tokenmill worker` for each node; TLS on, found by rendezvous."""

    def __init__(self, folder: Path, rendezvous: str, job_sections: dict[str, Any], num_nodes: int) -> None:
        """`job_sections` are the model and engine that the nodes run."""
        self._folder, self._rendezvous, self._sections, self._num_nodes = folder, rendezvous, job_sections, num_nodes
        self._keys = folder / "keys"
        self._running: dict[str, Running] = {}
        self._starts: Counter[str] = Counter()
        self.troubles: list[str] = []
        made = Running(folder, "keys", str(self._keys))
        if made.end() != 0:
            raise RuntimeError(made.stderr)
        self.keep()

    @property
    def cluster(self) -> dict[str, Any]:
        """A job's cluster section."""
        return {"kind": "address", "rendezvous": self._rendezvous, "keys": str(self._keys)}

    @property
    def pids(self) -> list[int]:
        return [running.process.pid for running in self._running.values()]

    @property
    def restarts(self) -> int:
        return sum(self._starts.values()) - len(self._starts)

    def keep(self) -> None:
        """Start what is not there."""
        for service in ("scheduler", *(f"node-{number}" for number in range(self._num_nodes))):
            running = self._running.get(service)
            if running is not None and running.process.poll() is None:
                continue
            if running is not None and "Traceback" in running.stderr:
                self.troubles.append(f"{service}: a traceback (exit code {running.process.returncode}):\n{running.stderr[-3000:]}")
            self._starts[service] += 1
            self._running[service] = Running(self._folder, *self._command(service))

    def close(self) -> None:
        for running in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                running.process.kill()
            running.process.wait()

    def _command(self, service: str) -> list[str]:
        found = ["--keys", str(self._keys), "--rendezvous", self._rendezvous]
        if service == "scheduler":
            return ["scheduler", *found, "--listen", "tls://127.0.0.1:0", "--dashboard", "none"]
        options = [f"--set=engine.options.{name}={value}" for name, value in self._sections["engine"]["options"].items()]
        profile = [f"--profile={self._sections['engine']['profile']}"] if "profile" in self._sections["engine"] else []
        # Each start has a name of its own: the one before may be stopped, not dead, and wake.
        name = f"{service}-{self._starts[service]}"
        engine = ["--engine", self._sections["engine"]["kind"], *profile, *options]
        return ["worker", "--model", self._sections["model"], *engine, "--replicas", "1", "--name", name, *found]
