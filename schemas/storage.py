"""How Azure storage is reached: a recipe for credentials, never the credentials. Checked without touching anything.

A secret is named by the environment variable or the file that holds it; a literal one is refused and not repeated.
"""

from __future__ import annotations

import re
from typing import Annotated
from typing import Any
from typing import Literal
from typing import Self
from urllib.parse import urlsplit

from pydantic import ConfigDict
from pydantic import Field
from pydantic import field_validator
from pydantic import model_validator

from schemas.sampling import Frozen

CredentialKind = Literal["default", "managed_identity", "workload_identity", "sas", "account_key", "connection_string", "anonymous"]
Commit = Literal["put_if_absent", "overwrite"]
"""How an object gets its name: atomically and only if nobody has it, or last writer wins."""

_HOLDS_A_SECRET = ("sas", "account_key", "connection_string")
_TAKES_A_CLIENT_ID = ("default", "managed_identity", "workload_identity")
_LOOKS_SECRET = re.compile(r"(?i)sig=|accountkey=|sharedaccesssignature|^[A-Za-z0-9+/]{86}==$")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def looks_secret(text: str) -> bool:
    """Whether a text is, or carries, a SAS, an account key or a connection string."""
    return bool(_LOOKS_SECRET.search(text))


class CredentialSpec(Frozen):
    """Where a process finds its credential. Each process looks for itself, so nothing secret travels."""

    model_config = ConfigDict(hide_input_in_errors=True)

    kind: CredentialKind = "default"
    """default: azure-identity's DefaultAzureCredential. sas, account_key, connection_string: from `env` or `file`."""
    client_id: Annotated[str | None, Field(pattern=r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$")] = None
    """Of a user-assigned identity; needed where a machine has several."""
    env: Annotated[str | None, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")] = None
    """The NAME of the environment variable that holds the secret, on every machine that runs workers."""
    file: str | None = None
    """The path of a file that holds the secret; read again when it changes, so that it can be rotated in mid-run."""

    @model_validator(mode="before")
    @classmethod
    def _no_secret_as_a_key(cls, fields: Any) -> Any:
        """Pydantic quotes a key that it does not know."""
        if isinstance(fields, dict) and any(looks_secret(str(key)) for key in fields):
            raise ValueError("a key looks like a secret itself (not shown); expected kind, client_id, env and file")
        return fields

    @field_validator("env", "file")
    @classmethod
    def _names_and_does_not_hold(cls, value: str | None) -> str | None:
        if value is not None and looks_secret(value):
            raise ValueError("looks like a secret itself; name the environment variable (env) or the file (file) that holds it")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        named = [name for name in ("env", "file") if getattr(self, name) is not None]
        if self.kind in _HOLDS_A_SECRET and len(named) != 1:
            raise ValueError(f"kind {self.kind} needs either env or file, found {' and '.join(named) or 'neither'}")
        if self.kind not in _HOLDS_A_SECRET and named:
            raise ValueError(f"kind {self.kind} reads no secret; drop {' and '.join(named)}, or choose {', '.join(_HOLDS_A_SECRET)}")
        if self.client_id is not None and self.kind not in _TAKES_A_CLIENT_ID:
            raise ValueError(f"kind {self.kind} takes no client_id, which belongs to {', '.join(_TAKES_A_CLIENT_ID)}")
        return self


class StorageSpec(Frozen):
    """How az:// and abfss:// are reached. Without it, as the AZURE_STORAGE_* variables and DefaultAzureCredential say."""

    model_config = ConfigDict(hide_input_in_errors=True)

    account_name: Annotated[str | None, Field(pattern=r"^[a-z0-9]{3,24}$")] = None
    """For az://container/...; abfss://container@account.dfs.core.windows.net/... names its own."""
    endpoint: str | None = None
    """URL of the blob service where it is not https://ACCOUNT.blob.core.windows.net: an emulator, a private domain."""
    credential: CredentialSpec = CredentialSpec()

    @field_validator("endpoint")
    @classmethod
    def _private(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("is not a URL such as https://account.blob.core.windows.net")
        if parts.query or parts.fragment or parts.username or parts.password:
            raise ValueError("carries more than a place; secrets are named under storage.credential")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError("is http://, which lets anybody on the way read prompts and signatures; use https://")
        return endpoint.rstrip("/")

    @field_validator("credential", mode="before")
    @classmethod
    def _a_recipe(cls, value: Any) -> Any:
        """A bare string here is most likely the secret; its kind may be said shortly where it has none."""
        if isinstance(value, str):
            raise ValueError("expected a mapping such as {kind: sas, env: NAME_OF_A_VARIABLE}, found text (not shown)")
        return value
