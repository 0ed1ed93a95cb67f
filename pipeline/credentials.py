"""A recipe (schemas/storage.py) in, an Azure credential out. Secrets are read here, when they are needed, and kept nowhere.

The recipe is one for the whole process and lies in an environment variable, so that worker processes inherit it; each
builds its own credential. Knows nothing of blobs.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from pydantic import ValidationError

from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.storage import CredentialSpec
from schemas.storage import StorageSpec

if TYPE_CHECKING:
    from azure.core.credentials import AzureSasCredential

VARIABLE = "TOKENMILL_STORAGE"
"""Holds the recipe as JSON. Nothing in it is secret."""
_OUTER = "TOKENMILL_STORAGE_OUTER"
"""What VARIABLE held before a job of this process put its own recipe there."""


def use(spec: StorageSpec | None) -> None:
    """From now on this process, and those it starts, reach Azure storage as this says; None: as before the first `use`."""
    if spec is None:
        outer = os.environ.pop(_OUTER, None)
        if outer:
            os.environ[VARIABLE] = outer
        elif outer is not None:
            del os.environ[VARIABLE]
        return
    os.environ.setdefault(_OUTER, os.environ.get(VARIABLE, ""))
    file = spec.credential.file
    if file is not None:  # workers run in other folders
        credential = spec.credential.model_copy(update={"file": os.path.abspath(os.path.expanduser(file))})
        spec = spec.model_copy(update={"credential": credential})
    os.environ[VARIABLE] = spec.model_dump_json(exclude_none=True)


def current() -> StorageSpec:
    """The process's recipe: what `use` said, else VARIABLE, else what adlfs's AZURE_STORAGE_* variables say. Raises JobError."""
    text = os.environ.get(VARIABLE)
    return _from_json(text) if text else _from_adlfs_variables()


def parse(fields: Any) -> StorageSpec:
    """A recipe from plain data. Raises JobError, which repeats nothing of it."""
    try:
        return StorageSpec.model_validate(fields)
    except ValidationError as error:
        raise JobError(describe_validation(error, show_found=False)) from None


@functools.lru_cache(maxsize=8)
def _from_json(text: str) -> StorageSpec:
    try:
        return parse(json.loads(text))
    except JobError as error:
        raise JobError(f"{VARIABLE}: {error}") from None
    except ValueError:
        raise JobError(f"{VARIABLE} is not JSON such as {{'account_name': ..., 'credential': {{'kind': ...}}}} (not shown)") from None


def _from_adlfs_variables() -> StorageSpec:
    """In the order in which adlfs lets one win over the others."""
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or None
    for kind in ("connection_string", "account_key", "sas"):
        variable = "AZURE_STORAGE_SAS_TOKEN" if kind == "sas" else f"AZURE_STORAGE_{kind.upper()}"
        if os.environ.get(variable):
            return StorageSpec.model_validate({"account_name": account, "credential": {"kind": kind, "env": variable}})
    anonymous = os.environ.get("AZURE_STORAGE_ANON", "false").lower() not in ("false", "0", "f", "")
    return StorageSpec.model_validate({"account_name": account, "credential": {"kind": "anonymous" if anonymous else "default"}})


def secret(spec: CredentialSpec) -> str:
    """The secret that the recipe names. Raises JobError where there is none."""
    if spec.env is not None:
        value, where = os.environ.get(spec.env, ""), f"storage.credential.env: the environment variable {spec.env}"
    else:
        assert spec.file is not None
        where = f"storage.credential.file: {spec.file}"
        try:
            value = Path(spec.file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"{where} cannot be read: {error.strerror if isinstance(error, OSError) else 'it is not text'}") from None
    value = value.strip()
    if not value:
        raise JobError(f"{where} is empty or missing on {os.uname().nodename}; put the {spec.kind} there and run the same command again")
    return value


def stamp(spec: CredentialSpec) -> tuple[int, ...]:
    """Changes when the secret may have; what was built under another stamp is to be built again."""
    if spec.env is not None:
        return (hash(os.environ.get(spec.env)),)
    if spec.file is None:
        return ()
    try:
        found = os.stat(os.path.expanduser(spec.file))
    except OSError:
        return ()
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def sas(spec: CredentialSpec) -> AzureSasCredential:
    """A SAS that is looked up for every request, so that a rotated one serves the requests after it."""
    from azure.core.credentials import AzureSasCredential

    class LiveSas(AzureSasCredential):
        """Holds the recipe and the last signature read."""

        def __init__(self) -> None:
            super().__init__("unread")
            self._stamp: tuple[int, ...] | None = None

        @property
        def signature(self) -> str:
            found = stamp(spec)
            if found != self._stamp:
                self.update(secret(spec).lstrip("?"))
                self._stamp = found
            return super().signature

        def __reduce__(self) -> Any:
            raise TypeError("a credential is not pickled; build it from its recipe")

    return LiveSas()


def token(spec: CredentialSpec) -> Any:
    """An azure-identity credential, which gets a new token before the old one ends."""
    import azure.identity.aio as identity

    if spec.kind == "managed_identity":
        return identity.ManagedIdentityCredential(client_id=spec.client_id)
    if spec.kind == "workload_identity":
        try:
            return identity.WorkloadIdentityCredential(client_id=spec.client_id)
        except ValueError as error:
            raise JobError(f"storage.credential.kind workload_identity: {error}") from None
    service = [os.environ.get(f"AZURE_STORAGE_{name}") for name in ("TENANT_ID", "CLIENT_ID", "CLIENT_SECRET")]
    if all(service):  # adlfs's own variables for a service principal
        return identity.ClientSecretCredential(*map(str, service))
    chosen = {"managed_identity_client_id": spec.client_id, "workload_identity_client_id": spec.client_id} if spec.client_id else {}
    return identity.DefaultAzureCredential(**chosen)


def advice(spec: CredentialSpec) -> str:
    """What to do where the store refuses the credential."""
    if spec.kind == "sas":
        what = f"put one that is valid into {spec.file or spec.env}"
        return f"is the SAS expired, or does it lack a right (read, create, write, delete, list)? {what}" + (
            " (it is read again at once)" if spec.file else " and run the same command again"
        )
    if spec.kind in ("account_key", "connection_string"):
        return f"was the key rotated? Put the new one into {spec.file or spec.env} and run the same command again"
    if spec.kind == "anonymous":
        return "anonymous access reaches public containers only; name a credential under storage.credential"
    return "give the identity the role Storage Blob Data Contributor on the container (it takes minutes to be felt), and check client_id"
