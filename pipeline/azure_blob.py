"""az:// and abfss:// URIs in, adlfs filesystems out: one a process, account and recipe, safe from every thread.

adlfs does the talking. What it leaves to chance is settled here: who signs, how often the SDK tries again and after what
wait, that listings say what failed instead of "empty", and that a blob's name is taken as it is written.
"""

from __future__ import annotations

import errno
import random
import re
import threading
from typing import Any
from urllib.parse import quote
from urllib.parse import urlsplit

from adlfs import AzureBlobFileSystem
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import ClientAuthenticationError
from azure.core.exceptions import HttpResponseError
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob.aio import BlobServiceClient
from azure.storage.blob.aio import ExponentialRetry

from pipeline import credentials
from schemas.errors import JobError
from schemas.storage import StorageSpec

_CLOUDS = ("core.windows.net", "core.chinacloudapi.cn", "core.usgovcloudapi.net")
"""Whose hosts may see a token; any other place has to be named as storage.endpoint."""
_ACCOUNT_HOST = re.compile(r"(?P<account>[a-z0-9]{3,24})\.(?:dfs|blob)\.(?P<cloud>.+)")
_ONE_PUT_BYTES = 64 << 20
"""Up to here an object is created by one request. The SDK's own default, written down because commits lean on it."""
_BLOCK_BYTES = 4 << 20
_TRIES_AGAIN = 6
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_SECRETS = re.compile(r"(?i)\b(sig|accountkey|sharedaccesssignature|signature|secret|bearer)([=: ]+)[^\s&;,\"'<>]+")
_MESSAGE_CHARACTERS = 400

_lock = threading.Lock()
_made: dict[tuple[str, str, str], tuple[tuple[int, ...], BlobFileSystem]] = {}


def filesystem(uri: str, spec: StorageSpec) -> tuple[BlobFileSystem, str]:
    """The filesystem and the path in it, which is container/name. Raises JobError.

    fsspec's own cache of instances is by the values given, so that a rotated key would not be seen.
    """
    account, url, path = locate(uri, spec)
    recipe = spec.model_dump_json(exclude_none=True)
    stamp = credentials.stamp(spec.credential)
    key = (account, url, recipe)
    with _lock:
        known = _made.get(key)
        # A SAS looks after itself, even in files that are open.
        if known is None or (known[0] != stamp and spec.credential.kind != "sas"):
            _made[key] = known = (stamp, BlobFileSystem(account=account, url=url, recipe=recipe))
        return known[1], path


def locate(uri: str, spec: StorageSpec) -> tuple[str, str, str]:
    """Account, URL of its blob service (both empty where the connection string says them) and container/name. Raises JobError."""
    netloc, _, name = uri.split("://", 1)[1].partition("/")
    container, at, host = netloc.partition("@")
    path = f"{container}/{name}".rstrip("/")
    if not container:
        raise JobError(f"{uri}: no container; expected az://container/path or abfss://container@account.dfs.core.windows.net/path")
    match = _ACCOUNT_HOST.fullmatch(host)
    if at and (match is None or match["cloud"] not in _CLOUDS):
        raise JobError(
            f"{uri}: {host} is not ACCOUNT.dfs.core.windows.net or another Azure cloud's; for another host give storage.account_name "
            "and storage.endpoint, and az://container/path here"
        )
    account = match["account"] if match else spec.account_name
    mine = account == (spec.account_name or account)
    if spec.credential.kind == "connection_string":
        if not mine:
            raise JobError(f"{uri}: the connection string is for account {spec.account_name}; one job reaches one account with it")
        return account or "", "", path
    if not account:
        raise JobError(
            f"{uri}: which storage account? Use abfss://{container}@ACCOUNT.dfs.core.windows.net/..., or storage.account_name, "
            "or AZURE_STORAGE_ACCOUNT_NAME"
        )
    if spec.endpoint and mine:
        return account, spec.endpoint, path
    return account, f"https://{account}.blob.{match['cloud'] if match else _CLOUDS[0]}", path


def web_address(uri: str, spec: StorageSpec) -> str:
    """The object's address, unsigned."""
    fs, path = filesystem(uri, spec)
    return f"{str(fs.service_client.url).partition('?')[0].rstrip('/')}/{quote(path)}"


class BlobFileSystem(AzureBlobFileSystem):  # type: ignore[misc]
    """adlfs with credentials from a recipe. What it is made from is not secret, and so neither are its pickles."""

    cachable = False

    def __init__(self, *, account: str, url: str, recipe: str) -> None:
        self._account, self._url, self.spec = account, url, StorageSpec.model_validate_json(recipe)
        super().__init__(account_name=account or "-", anon=True, use_listings_cache=False)
        self.account_key = self.sas_token = self.connection_string = self.client_secret = None  # read from the environment

    def do_connect(self) -> None:
        """Called by adlfs."""
        spec = self.spec.credential
        options: dict[str, Any] = {
            "retry_policy": _Patience(
                retry_total=_TRIES_AGAIN, retry_connect=_TRIES_AGAIN, retry_read=_TRIES_AGAIN, retry_status=_TRIES_AGAIN
            ),
            "max_single_put_size": _ONE_PUT_BYTES,
            "max_block_size": _BLOCK_BYTES,
            "user_agent": "tokenmill",
        }
        if spec.kind == "connection_string":
            try:
                self.service_client = BlobServiceClient.from_connection_string(credentials.secret(spec), **options)
            except ValueError:  # its message is not needed, and might quote
                raise JobError(f"storage.credential: what {spec.env or spec.file} holds is not a connection string (not shown)") from None
            return
        credential: Any = None
        if spec.kind == "account_key":
            credential = AzureNamedKeyCredential(self._account, credentials.secret(spec))
        elif spec.kind == "sas":
            credential = credentials.sas(spec)
        elif spec.kind != "anonymous":
            self.credential = credential = credentials.token(spec)  # adlfs closes it
        self.service_client = BlobServiceClient(self._url, credential=credential, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """adlfs reads a path as a URL and loses what follows a tab or a newline in a name."""
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        return str(path).lstrip("/")

    def split_path(self, path: str, delimiter: str = "/", **options: Any) -> tuple[str, str, None]:
        container, _, name = path.lstrip("/").partition(delimiter)
        return container, name, None

    async def _find(self, path: str, withdirs: bool = False, prefix: str = "", **options: Any) -> dict[str, dict[str, Any]]:
        """Every blob below a folder, with details. Raises FileNotFoundError where there is no such container.

        adlfs's own gives nothing for a missing container, and another type where a blob has the folder's name.
        """
        container, folder, _ = self.split_path(path.rstrip("/") + "/")
        async with self.service_client.get_container_client(container) as client:
            listed = [blob async for blob in client.list_blobs(name_starts_with=folder + prefix, include=["metadata"])]
        found = {details["name"]: details for details in await self._details(listed)}
        return {name: details for name, details in found.items() if withdirs or details["type"] == "file"}

    async def _ls(self, path: str, detail: bool = True, **options: Any) -> list[dict[str, Any]]:
        """What lies directly in a folder; empty where nothing does. Raises FileNotFoundError where there is no such container.

        adlfs's own also walks every folder whose name only begins like this one.
        """
        container, folder, _ = self.split_path(path.rstrip("/") + "/")
        async with self.service_client.get_container_client(container) as client:
            listed = [blob async for blob in client.walk_blobs(name_starts_with=folder, include=["metadata"], delimiter="/")]
        return list(await self._details(listed))


class _Patience(ExponentialRetry):
    """Waits of about 1, 2, 4, ... s between tries, or what the store asks for. The SDK's own first one is 18 s."""

    def increment(self, settings: dict[str, Any], request: Any, response: Any = None, error: Any = None) -> bool:
        """Whether to try again; not for a token that is refused: azure-identity has tried again already, where that may help."""
        if isinstance(error, ClientAuthenticationError):
            return False
        return bool(super().increment(settings, request, response, error))

    def get_backoff_time(self, settings: dict[str, Any]) -> float:
        wait_s = _FIRST_WAIT_S * 2 ** settings["count"] * random.uniform(0.5, 1.0)
        response = settings["history"][-1].http_response if settings["history"] else None
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        return float(min(max(wait_s, float(asked) if asked.isdigit() else 0.0), _LONGEST_WAIT_S))


def as_os_error(error: Exception, uri: str, spec: StorageSpec) -> OSError:
    """What the SDK raised, as an OSError with a number: the store failed, whatever the object is. Quotes no secret."""
    code = getattr(error, "error_code", None)
    name = str(getattr(code, "value", code) or type(error).__name__)
    said = _SECRETS.sub(r"\1\2(not shown)", " ".join(str(error).split()))[:_MESSAGE_CHARACTERS]
    status = error.status_code if isinstance(error, HttpResponseError) else None
    container = urlsplit(uri).netloc.partition("@")[0]
    if name == "ContainerNotFound":
        return FileNotFoundError(errno.ENOENT, f"there is no container {container!r}; create it, or correct the URI", uri)
    if name == "ContainerBeingDeleted":
        return OSError(errno.EIO, f"the container {container!r} is being deleted; create it again once it is gone", uri)
    if isinstance(error, ResourceNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", uri)
    if status in (401, 403) or isinstance(error, ClientAuthenticationError):
        what = "the store refused the credential" if status in (401, 403) else "no token for the store was to be had"
        advice = credentials.advice(spec.credential)
        return PermissionError(errno.EACCES, f"{what} ({spec.credential.kind}): {advice}. It said: {said}", uri)
    return OSError(errno.EIO, f"{type(error).__name__}: {said}", uri)
