"""Azurite, a real blob service on this machine, as a context manager for tests and for long runs of their own.

It has an account of its own with a random key, keeps everything in memory, and ends with whoever started it.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from pathlib import Path

import pytest
from azure.core.exceptions import AzureError
from azure.storage.blob import BlobServiceClient
from azure.storage.blob import ContainerSasPermissions
from azure.storage.blob import generate_container_sas

_FOLDER = Path(__file__).resolve().parent.parent / ".ci" / "node_modules"
_MAIN = _FOLDER / "azurite" / "dist" / "src" / "blob" / "main.js"
_START_LIMIT_S = 60.0
CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"


def why_not() -> str | None:
    """The reason why Azurite cannot run here, or None."""
    if shutil.which("node") is None:
        return "node is not installed (Debian: nodejs npm)"
    if not _MAIN.is_file():
        return "Azurite is not installed (make setup)"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Azurite:
    """A running service."""

    host: str
    port: int
    account: str
    key: str = field(repr=False)
    pid: int
    scheme: str = "http"

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/{self.account}"

    @property
    def connection_string(self) -> str:
        return f"DefaultEndpointsProtocol={self.scheme};AccountName={self.account};AccountKey={self.key};BlobEndpoint={self.endpoint};"

    def at(self, port: int) -> Azurite:
        """The same service through a proxy on another port."""
        return replace(self, port=port)

    def client(self) -> BlobServiceClient:
        """The SDK's own client, with all rights. Close it."""
        return BlobServiceClient.from_connection_string(self.connection_string, retry_total=0)

    def new_container(self, prefix: str = "test") -> str:
        """An empty container's name."""
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        with self.client() as client:
            client.create_container(name).close()
        return name

    def delete_container(self, name: str) -> None:
        with self.client() as client:
            client.delete_container(name)

    def sas(self, container: str, *, lifetime_s: float = 3600.0, permission: str = "racwdl") -> str:
        """A signature for one container. Its times have whole seconds."""
        now = datetime.now(UTC)
        return generate_container_sas(
            self.account,
            container,
            account_key=self.key,
            permission=ContainerSasPermissions.from_string(permission),
            start=now - timedelta(minutes=5),
            expiry=now + timedelta(seconds=lifetime_s),
        )

    def names(self, container: str) -> list[str]:
        """All blobs, as the SDK lists them."""
        with self.client() as client, client.get_container_client(container) as found:
            return sorted(blob.name for blob in found.list_blobs())


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    *, host: str = "127.0.0.1", cert: Path | None = None, key: Path | None = None, oauth: bool = False, account: str | None = None
) -> Iterator[Azurite]:
    """Start Azurite, wait until it answers, end it surely. With a certificate over https; with `oauth` it takes tokens, too."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    account, secret = account or f"acct{secrets.token_hex(6)}", base64.b64encode(secrets.token_bytes(64)).decode()
    options = ["--disableTelemetry", "--skipApiVersionCheck", "--silent", "--inMemoryPersistence"]
    if cert is not None and key is not None:
        options += ["--cert", str(cert), "--key", str(key)]
    if oauth:
        options += ["--oauth", "basic"]
    for attempt in range(3):  # somebody else may take the port before it is bound
        port = free_port(host)
        process = subprocess.Popen(
            ["node", str(_MAIN), *options, "--blobHost", host, "--blobPort", str(port)],
            env={**os.environ, "AZURITE_ACCOUNTS": f"{account}:{secret}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the test
        )
        service = Azurite(host=host, port=port, account=account, key=secret, pid=process.pid, scheme="https" if cert else "http")
        try:
            if not _answers(service, process):
                if attempt == 2:
                    said = process.stderr.read().decode(errors="replace") if process.stderr else ""
                    raise RuntimeError(f"Azurite ended with {process.returncode}: {said[-2000:]}")
                continue
            yield service
            return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it has nothing to save
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def _answers(service: Azurite, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _START_LIMIT_S
    while process.poll() is None:
        try:
            if service.scheme == "https":
                socket.create_connection((service.host, service.port), timeout=1).close()
            else:
                with service.client() as client:
                    next(iter(client.list_containers()), None)
            return True
        except (AzureError, OSError):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return False


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """One service for all tests of a session; each takes its own container. Mark such tests `azurite`."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running() as service:
        yield service


@pytest.fixture
def container(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh container; this process, and those it starts, reach it as az://NAME."""
    monkeypatch.setenv(CONNECTION_STRING, azurite.connection_string)
    return azurite.new_container()


if __name__ == "__main__":
    # For trying things by hand: prints how to reach it, and runs until its standard input closes.
    with running() as started:
        print(f"export {CONNECTION_STRING}='{started.connection_string}'", flush=True)
        print(f"az://{started.new_container()}", flush=True)
        sys.stdin.read()
