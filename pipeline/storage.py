"""A URI in; list, read, create-once, replace and probe out. Knows fsspec, not what the bytes mean.

Create-once (put-if-absent) is what every commit stands on: of any number of writers of one name exactly one wins, whole.
"""

from __future__ import annotations

import functools
import io
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import BinaryIO
from typing import ParamSpec
from typing import TypeVar
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from schemas.errors import JobError
from schemas.errors import TokenmillError

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

_LOCAL = ("file", "local")
_BLOB = ("az", "abfs", "abfss")
_GLOB_CHARACTERS = frozenset("*?[")
_DATA_SUFFIXES = (".parquet", ".pq")
_TEMPORARIES = (".tmp-*", "_tokenmill/.tmp-*")
_REMOTE_BLOCK_BYTES = 4 << 20
"""Of read-ahead; adlfs's own 50 MiB, for each column of each unit in flight, would fill the memory."""
_memory_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """One stored object."""

    uri: str
    size_bytes: int
    version: str
    """The store's etag, or size and mtime in ns: changes when the object does."""


def scheme_of(uri: str) -> str:
    """`file` for plain paths."""
    scheme = urlsplit(uri).scheme
    return scheme if "://" in uri else "file"


def absolute(uri: str) -> str:
    """The same place named so that another process, in another folder, finds it."""
    if scheme_of(uri) in _LOCAL:
        path = uri.split("://", 1)[1] if "://" in uri else uri
        return os.path.abspath(os.path.expanduser(path))
    return uri.rstrip("/") if uri.count("/") > 3 else uri


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def _open(uri: str) -> tuple[Any, str]:
    """The filesystem and the path in it. Listings are never cached: another worker may have written since."""
    scheme = scheme_of(uri)
    try:
        options: dict[str, Any] = {} if scheme in (*_LOCAL, "memory") else {"use_listings_cache": False}
        fs, path = url_to_fs(uri, **options)
    except (ImportError, ValueError) as error:
        raise JobError(f"{uri}: cannot open this kind of storage ({error}); use a path, az://, abfss:// or memory://") from None
    return fs, path


def _named(fs: Any, path: str, like: str) -> str:
    """A listed path as a URI of the same form as the one that was asked for."""
    scheme = scheme_of(like)
    if scheme in _LOCAL:
        return str(path)
    parts = urlsplit(like)
    if "@" in parts.netloc:  # container@account: adlfs learns the account from here alone
        return f"{scheme}://{parts.netloc}/{str(path).split('/', 1)[1]}"
    return f"{scheme}://{str(path).lstrip('/')}"


def _info(fs: Any, details: dict[str, Any], like: str) -> ObjectInfo:
    path = str(details["name"])
    if scheme_of(like) in _LOCAL:
        stat = os.stat(path)
        return ObjectInfo(uri=path, size_bytes=stat.st_size, version=f"{stat.st_size}-{stat.st_mtime_ns}")
    version = details.get("etag") or details.get("ETag")
    if not version:
        version = f"{details['size']}-{details.get('created') or details.get('last_modified') or ''}"
    return ObjectInfo(uri=_named(fs, path, like), size_bytes=int(details["size"]), version=str(version).strip('"'))


def _os_errors(call: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Stores' SDKs raise what they like; at this border it becomes OSError, so that callers can tell it from our own mistakes."""

    @functools.wraps(call)
    def guarded(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        try:
            return call(*args, **kwargs)
        except (OSError, TokenmillError):
            raise
        except Exception as error:
            if not type(error).__module__.startswith(("azure.", "aiohttp.", "msal")):
                raise
            raise OSError(f"{type(error).__name__}: {error}") from error

    return guarded


@_os_errors
def info(uri: str) -> ObjectInfo:
    """One object. Raises FileNotFoundError."""
    fs, path = _open(uri)
    return _info(fs, fs.info(path), uri)


def exists(uri: str) -> bool:
    try:
        info(uri)
    except FileNotFoundError:
        return False
    return True


@_os_errors
def list_objects(uri: str) -> list[ObjectInfo]:
    """The Parquet objects that a file's, folder's or glob's URI names, sorted by name. Hidden names are left out.

    Raises JobError where nothing is there.
    """
    fs, path = _open(uri)
    if _GLOB_CHARACTERS & set(path):
        found = fs.glob(path, detail=True).values()
        root = path[: min(path.index(c) for c in _GLOB_CHARACTERS if c in path)].rpartition("/")[0]
        kept = [details for details in found if _is_file(details, uri) and not _hidden(details["name"], below=root)]
        if not kept:
            raise JobError(f"input.uri: no file matches {uri}; check the path, or quote the glob if a shell expanded it")
    elif fs.isdir(path):
        found = fs.find(path, detail=True).values()
        kept = [d for d in found if _is_file(d, uri) and not _hidden(d["name"], below=path) and d["name"].endswith(_DATA_SUFFIXES)]
        if not kept:
            raise JobError(f"input.uri: the folder {uri} holds no .parquet file")
    else:
        try:
            kept = [fs.info(path)]
        except (FileNotFoundError, NotADirectoryError):
            raise JobError(f"input.uri: there is no {uri}") from None
    return sorted((_info(fs, details, uri) for details in kept), key=lambda item: item.uri)


def _is_file(details: dict[str, Any], like: str) -> bool:
    """Links to files count: hub caches are made of them."""
    return os.path.isfile(details["name"]) if scheme_of(like) in _LOCAL else details["type"] == "file"


def _hidden(path: str, below: str) -> bool:
    """Whether a name on the way from the folder `below` to the object starts with a dot or an underscore."""
    return any(name.startswith((".", "_")) for name in path[len(below) :].split("/"))


@_os_errors
def list_names(uri: str) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder; empty where the folder is not there."""
    fs, path = _open(uri)
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {str(d["name"]).rsplit("/", 1)[-1]: int(d["size"] or 0) for d in found if d["type"] == "file"}


@_os_errors
def read_bytes(uri: str) -> bytes:
    """A whole object. Raises FileNotFoundError."""
    fs, path = _open(uri)
    data: bytes = fs.cat_file(path)
    return data


@_os_errors
def open_read(uri: str) -> BinaryIO:
    """A seekable file. Raises FileNotFoundError."""
    fs, path = _open(uri)
    if scheme_of(uri) in _LOCAL:
        return open(path, "rb")
    if scheme_of(uri) == "memory":
        return io.BytesIO(fs.cat_file(path))  # its files share one position among all readers
    opened: BinaryIO = fs.open(path, "rb", block_size=_REMOTE_BLOCK_BYTES)
    return opened


def check_can_create(uri: str) -> None:
    """Raises JobError for a kind of storage whose put-if-absent is not known. Touches nothing."""
    scheme = scheme_of(uri)
    if scheme not in (*_LOCAL, *_BLOB, "memory"):
        raise JobError(f"output.uri: no put-if-absent is known for {scheme}:// ({uri}); use a path, az:// or abfss://")


@_os_errors
def create_once(uri: str, data: bytes) -> None:
    """Create an object whole, or raise FileExistsError and leave what is there as it is.

    A FileExistsError may also hide a create of our own whose acknowledgement was lost: compare what is there.
    """
    check_can_create(uri)
    scheme = scheme_of(uri)
    fs, path = _open(uri)
    if scheme in _LOCAL:
        _create_local(Path(path), data)
    elif scheme == "memory":
        with _memory_lock:  # fsspec's own check and write are two steps
            if fs.exists(path):
                raise FileExistsError(uri)
            fs.pipe_file(path, data)
    else:
        fs.pipe_file(path, data, mode="create")  # If-None-Match: *


def _create_local(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path.parent} is a file, expected a folder") from None
    try:
        _link_new(path, data)
    except FileNotFoundError:  # another driver closed the job and swept our temporary with those of killed writers
        _link_new(path, data)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _link_new(path: Path, data: bytes) -> None:
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # atomic, and fails where the name exists
    finally:
        temporary.unlink(missing_ok=True)


@_os_errors
def replace(uri: str, data: bytes) -> None:
    """Write an object whose history does not matter (a status). Never a commit."""
    fs, path = _open(uri)
    if scheme_of(uri) in _LOCAL:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    else:
        fs.pipe_file(path, data)


@_os_errors
def remove(uri: str) -> None:
    """Delete an object if it is there."""
    fs, path = _open(uri)
    try:
        fs.rm_file(path)
    except FileNotFoundError:
        return


def sweep_temporaries(uri: str) -> None:
    """Delete what killed writers left half-written in a local folder. Call when no writer is at work."""
    if scheme_of(uri) in _LOCAL:
        for pattern in _TEMPORARIES:
            for left in Path(absolute(uri)).glob(pattern):
                left.unlink(missing_ok=True)


def probe(uri: str) -> None:
    """Prove that this folder takes writes and that creating a name twice fails the second time. Raises JobError."""
    name = join(uri, "_tokenmill", f".probe-{uuid.uuid4().hex}")
    try:
        create_once(name, b"first")
    except JobError:
        raise
    except Exception as error:
        raise JobError(f"output.uri: cannot write to {uri}: {type(error).__name__}: {error}") from error
    try:
        create_once(name, b"second")
    except FileExistsError:
        pass
    else:
        raise JobError(f"output.uri: {uri} lets a second writer overwrite a first one's object; no row would be safe there")
    finally:
        remove(name)
