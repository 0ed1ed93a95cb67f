"""A URI in; list, read, create-once, replace and probe out. Knows fsspec, not what the bytes mean.

Create-once (put-if-absent) is what every commit stands on: of any number of writers of one name exactly one wins, whole.
How each store does it:

local           a temporary file beside the object, fsync, os.link to its name, fsync of the folder
memory          a lock of this module
az, abfss       If-None-Match: * on one Put Blob (up to 64 MiB, the SDK's limit), above that on Put Block List, whose blocks
                have random names, so that the blocks of two writers do not mix
s3, gs          what s3fs and gcsfs offer: If-None-Match: *, and ifGenerationMatch=0
any other       refused; or, where output.commit says overwrite, a look whether the name is free and then a write: of two
                writers at the same moment the last one wins
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from typing import BinaryIO
from typing import Concatenate
from typing import ParamSpec
from typing import TypeVar
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from pipeline import credentials
from pipeline.credentials import use as use
from schemas.errors import JobError
from schemas.errors import TokenmillError
from schemas.storage import Commit

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

_LOCAL = ("file", "local")
_BLOB = ("az", "abfs", "abfss")
_NATIVE = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""Stores whose fsspec package creates under a condition, and that package."""
_SDKS = ("azure.", "aiohttp.", "msal", "botocore.", "aiobotocore.", "gcsfs.", "google.")
_GLOB_CHARACTERS = frozenset("*?[")
_DATA_SUFFIXES = (".parquet", ".pq")
_TEMPORARIES = (".tmp-*", "_tokenmill/.tmp-*")
_READ_AHEAD_BYTES = 1 << 20
"""Of each remote file that is open. Parquet columns are read in pieces of this size (see read.py), each one request."""
_COMMIT = "TOKENMILL_COMMIT"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
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
    if scheme not in _LOCAL and {".", ".."} & set(uri.split("://", 1)[1].split("/")):
        raise JobError(f"{uri}: '.' and '..' are plain names to some stores and steps to others; write the path out")
    if scheme in _BLOB:
        from pipeline.azure_blob import filesystem  # a second of imports

        return filesystem(uri, credentials.current())
    try:
        options: dict[str, Any] = {} if scheme in (*_LOCAL, "memory") else {"use_listings_cache": False}
        fs, path = url_to_fs(uri, **options)
    except (ImportError, ValueError) as error:
        how = f"pip install {_NATIVE[scheme]}" if scheme in _NATIVE else "use a path, az://, abfss:// or memory://"
        raise JobError(f"{uri}: cannot open this kind of storage ({error}); {how}") from None
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
    if details["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), _named(fs, path, like))
    if scheme_of(like) in _LOCAL:
        stat = os.stat(path)
        return ObjectInfo(uri=path, size_bytes=stat.st_size, version=f"{stat.st_size}-{stat.st_mtime_ns}")
    version = details.get("etag") or details.get("ETag")
    if not version:
        when = details.get("created") or details.get("last_modified") or ""
        version = f"{details['size']}-{when.timestamp() if isinstance(when, datetime) else when}"  # fsspec's memory gives both
    return ObjectInfo(uri=_named(fs, path, like), size_bytes=int(details["size"]), version=str(version).strip('"'))


def _os_errors(call: Callable[Concatenate[str, Given], Answer]) -> Callable[Concatenate[str, Given], Answer]:
    """Stores' SDKs raise what they like; at this border it becomes OSError, so that callers can tell it from our own mistakes.

    It has a number, as every error of a store and none of Arrow's has. What the SDK said is quoted without secrets, and its
    own exception, which may carry a signed URL, is left behind.
    """

    @functools.wraps(call)
    def guarded(uri: str, /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        try:
            return call(uri, *args, **kwargs)
        except (OSError, TokenmillError) as error:
            failure: Exception = error
        except Exception as error:
            if not type(error).__module__.startswith(_SDKS):
                raise
            failure = _as_os_error(error, uri)
        if scheme_of(uri) not in (*_LOCAL, "memory"):
            # `from None` only hides it: Dask's pickles carry all that an error came from, requests with their signatures too.
            failure.__cause__ = failure.__context__ = None
        try:
            raise failure
        finally:
            del failure  # it holds this frame, which holds it

    return guarded


def _as_os_error(error: Exception, uri: str) -> OSError:
    if scheme_of(uri) in _BLOB:
        from pipeline.azure_blob import as_os_error

        return as_os_error(error, uri, credentials.current())
    return OSError(errno.EIO, f"{type(error).__name__}: {error}", uri)


@_os_errors
def web_address(uri: str) -> str:
    """An Azure object as its https:// address, without any signature. Raises JobError for other stores."""
    if scheme_of(uri) not in _BLOB:
        raise JobError(f"{uri}: only az:// and abfss:// have a web address that Azure Batch can use")
    from pipeline.azure_blob import web_address as of_blob

    return of_blob(uri, credentials.current())


@_os_errors
def info(uri: str) -> ObjectInfo:
    """One object. Raises FileNotFoundError, or IsADirectoryError where objects lie below that name and none has it."""
    fs, path = _open(uri)
    return _info(fs, fs.info(path), uri)


def exists(uri: str) -> bool:
    """Whether there is an object of that name; a folder is none."""
    try:
        info(uri)
    except (FileNotFoundError, IsADirectoryError):
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
    elif _is_folder(fs, path, uri):
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


def _is_folder(fs: Any, path: str, uri: str) -> bool:
    """fsspec's own isdir takes whatever went wrong for a no."""
    if scheme_of(uri) in _LOCAL:
        return os.path.isdir(path)
    if "/" not in path:  # a container; asking for its properties needs rights that a container's SAS never has
        return True
    try:
        return bool(fs.info(path)["type"] == "directory")
    except FileNotFoundError:
        return False


def _is_file(details: dict[str, Any], like: str) -> bool:
    """Links to files count: hub caches are made of them."""
    return os.path.isfile(details["name"]) if scheme_of(like) in _LOCAL else details["type"] == "file"


def _hidden(path: str, below: str) -> bool:
    """Whether a name on the way from the folder `below` to the object starts with a dot or an underscore."""
    return any(name.startswith((".", "_")) for name in path[len(below) :].split("/"))


@_os_errors
def list_names(uri: str) -> dict[str, int]:
    """Names and sizes in bytes of the files directly in a folder; empty where the folder is not there.

    Raises FileNotFoundError where an Azure container is not there: that is no empty folder.
    """
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
    size_bytes = _info(fs, fs.info(path), uri).size_bytes
    return io.BufferedReader(_Remote(uri, size_bytes), _READ_AHEAD_BYTES)


class _Remote(io.RawIOBase):
    """A remote object as a file: each read is one ranged request, with the credential of its moment."""

    def __init__(self, uri: str, size_bytes: int) -> None:
        super().__init__()
        self._uri, self._size_bytes, self._position = uri, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._uri}: position {base + offset} lies before the object")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        stop = min(self._position + len(view), self._size_bytes)
        if stop <= self._position:
            return 0
        data = _read_range(self._uri, self._position, stop)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


@_os_errors
def _read_range(uri: str, start: int, stop: int) -> bytes:
    fs, path = _open(uri)
    data: bytes = fs.cat_file(path, start=start, end=stop)
    if len(data) != stop - start:
        raise OSError(errno.EIO, f"bytes [{start}, {stop}) asked for, {len(data)} bytes came; was the object cut short just now?", uri)
    return data


def commit_as(commit: Commit) -> None:
    """What a job says under output.commit, for this process and those that it starts from now on."""
    if commit == "overwrite":
        os.environ[_COMMIT] = commit
    else:
        os.environ.pop(_COMMIT, None)


def check_can_create(uri: str) -> Commit:
    """How objects are created there. Raises JobError where no way is known that is safe and allowed. Touches nothing."""
    scheme = scheme_of(uri)
    if scheme in _BLOB or scheme == "memory":
        return "put_if_absent"  # no reason to do with less
    if os.environ.get(_COMMIT) == "overwrite":
        return "overwrite"
    if scheme not in (*_LOCAL, *_NATIVE):
        raise JobError(
            f"output.uri: no put-if-absent is known for {scheme}:// ({uri}), so two writers of one part could both win; use a path, az://, "
            "abfss://, s3:// or gs://, or accept that with output.commit: overwrite"
        )
    return "put_if_absent"


@_os_errors
def create_once(uri: str, data: bytes) -> None:
    """Create an object whole, or raise FileExistsError and leave what is there as it is.

    A FileExistsError may also hide a create of our own whose acknowledgement was lost: compare what is there.
    """
    scheme = scheme_of(uri)
    if check_can_create(uri) == "overwrite":
        if exists(uri):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), uri)
        replace(uri, data)
        return
    fs, path = _open(uri)
    if scheme in _LOCAL:
        _create_local(Path(path), data)
    elif scheme == "memory":
        with _memory_lock:  # fsspec's own check and write are two steps
            if fs.exists(path):
                raise FileExistsError(uri)
            fs.pipe_file(path, data)
    else:
        _create_remote(fs, path, data, uri)


def _create_remote(fs: Any, path: str, data: bytes, uri: str) -> None:
    """Under a condition that the store checks. Of fsspec's two ways, open("xb") also publishes what an exception cut short."""
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError as error:
        cause = error.__context__
        if getattr(cause, "error_code", None) in (None, "BlobAlreadyExists"):
            raise
        assert isinstance(cause, Exception)
        raise _as_os_error(cause, uri) from None  # the SDK says "exists" of a container that is being deleted, too


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
        try:
            os.link(temporary, path)  # atomic, and fails where the name exists
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise OSError(
                error.errno, f"{path.parent} has no hard links, which put-if-absent needs; use another folder, or output.commit: overwrite"
            ) from error
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
    name, first = join(uri, "_tokenmill", f".probe-{uuid.uuid4().hex}"), uuid.uuid4().bytes
    try:
        with contextlib.suppress(FileExistsError):  # ours, whose acknowledgement was lost; what is there will tell
            create_once(name, first)
        survived = read_bytes(name) == first
        second_failed = False
        try:
            create_once(name, b"second")
        except FileExistsError:
            second_failed = True
        survived = survived and read_bytes(name) == first
    except OSError as error:
        raise JobError(f"output.uri: cannot write to {uri}: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # a hidden file of 16 bytes, where nothing may be deleted
            remove(name)
    if not (second_failed and survived):
        raise JobError(
            f"output.uri: {uri} lets a second writer overwrite a first one's object; no row would be safe there. Choose another store, "
            "or accept that with output.commit: overwrite"
        )
