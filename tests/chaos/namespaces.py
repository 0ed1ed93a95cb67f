"""Hosts as network namespaces on one bridge: real sockets, real partitions, one machine. Needs root and iproute2.

The test's own process is on the bridge too. A cut drops frames in silence, both ways, as a broken switch does: the two hosts
are made to believe in a hardware address that nobody has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest

_NOBODY = "02:00:00:00:00:01"
_DEVICE = "eth0"
_DIE_S = 10.0
_CLONE_NEWNET = 0x40000000


def skip_without_namespaces() -> None:
    """Skips the test with what is missing."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (Debian package iproute2)")
    probe = f"tm-probe-{os.getpid()}"
    made = _ip("netns", "add", probe, check=False)
    if made.returncode:
        pytest.skip(f"needs the right to make network namespaces (root, CAP_SYS_ADMIN): {made.stderr.strip()}")
    _ip("netns", "del", probe)
    link = _ip("link", "add", f"tmp{os.getpid() % 100000}", "type", "bridge", check=False)
    if link.returncode:
        pytest.skip(f"needs the right to make bridges (CAP_NET_ADMIN): {link.stderr.strip()}")
    _ip("link", "del", f"tmp{os.getpid() % 100000}")


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace with one network card."""

    name: str
    namespace: str
    address: str
    port: str
    """Its end on the bridge."""
    processes: list[Process] = field(default_factory=list)
    """Started here, ended or not."""

    def start(self, *command: str, cwd: Path, environment: dict[str, str] | None = None) -> Process:
        """A process on this host, in a session of its own; what it prints goes to a file in `cwd`."""
        self.processes.append(Process(self, list(command), cwd, environment or {}))
        return self.processes[-1]

    def pids(self) -> list[int]:
        """Of every process on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).stdout.split()]

    def unplug(self) -> None:
        _ip("link", "set", self.port, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self.port, "up")

    def kill(self) -> None:
        """As a host dies: nobody hears a word."""
        self.unplug()
        self.kill_processes()

    def kill_processes(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait(_DIE_S)


@contextmanager
def inside(host: Host) -> Iterator[None]:
    """This thread is on the host: its sockets, and the processes that it starts."""
    own, there = (os.open(path, os.O_RDONLY) for path in ("/proc/thread-self/ns/net", f"/run/netns/{host.namespace}"))
    try:
        _enter(there)
        try:
            yield
        finally:
            _enter(own)
    finally:
        os.close(own)
        os.close(there)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


class Process:
    """A command that runs on a host."""

    def __init__(self, host: Host, command: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self.log_path = cwd / f"{host.name}-{Path(command[0]).name}-{time.monotonic_ns()}.log"
        with self.log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                ["ip", "netns", "exec", host.namespace, *command],  # ip becomes the command: one process, one id
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit code. Fails the test where it does not come."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end within {timeout_s:.0f} s:\n{self.log}")


class Network:
    """Hosts on a bridge. Made by `network`."""

    def __init__(self, names: list[str]) -> None:
        tag = f"{random.SystemRandom().randrange(1 << 20):05x}"
        subnet = f"198.18.{random.SystemRandom().randrange(256)}"  # set aside for test networks
        self._bridge = f"tm{tag}"
        self.own_address = f"{subnet}.1"
        self.hosts = {
            name: Host(name=name, namespace=f"tm-{tag}-{name}", address=f"{subnet}.{index + 10}", port=f"tm{tag}p{index}")
            for index, name in enumerate(names)
        }
        self._hardware: dict[str, str] = {}

    def make(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge", "forward_delay", "0")
        _ip("addr", "add", f"{self.own_address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self.hosts.values():
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.port, "type", "veth", "peer", "name", _DEVICE, "netns", host.namespace)
            _ip("link", "set", host.port, "master", self._bridge, "up")
            inside = ("-n", host.namespace)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", _DEVICE)
            _ip(*inside, "link", "set", _DEVICE, "up")
            self._hardware[host.name] = _ip(*inside, "-br", "link", "show", _DEVICE).stdout.split()[2]

    def cut(self, one: Host, other: Host) -> None:
        """No frame gets from one to the other, nor back."""
        self._believe(one, other, _NOBODY)
        self._believe(other, one, _NOBODY)

    def heal(self, one: Host, other: Host) -> None:
        self._believe(one, other, self._hardware[other.name])
        self._believe(other, one, self._hardware[one.name])

    def _believe(self, host: Host, peer: Host, hardware: str) -> None:
        _ip("-n", host.namespace, "neigh", "replace", peer.address, "lladdr", hardware, "dev", _DEVICE, "nud", "permanent")

    def remove(self) -> None:
        """Ends what runs on the hosts, and leaves nothing behind, however far `make` got."""
        for host in self.hosts.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                host.kill_processes()
            _ip("netns", "del", host.namespace, check=False)
            _ip("link", "del", host.port, check=False)
        _ip("link", "del", self._bridge, check=False)


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """A network for as long as the block runs. Skips the test where that is not possible."""
    skip_without_namespaces()
    made = Network(list(names))
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done
