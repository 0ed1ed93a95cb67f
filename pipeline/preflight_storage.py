"""How fast a node writes and reads: the job's store, as commits do, and a local disk. A process of its own (see pipeline.child).

Everything lies under one prefix of its own, which is deleted afterwards; where this process is ended before it could, `clean` does it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from typing import Protocol

from pipeline import storage
from pipeline.child import Say
from pipeline.child import serve
from schemas.preflight import Answer
from schemas.preflight import Measurement

GB = 1e9
_LOCAL = ("file", "local")
_THREADS = 8
"""Units in flight on a node write and read at the same time."""
_FIRST_BYTES = 1 << 20
_LARGEST_BYTES, _SMALLEST_BYTES = 8 << 20, 64 << 10
_SMALL_BYTES = 1 << 10
_MAX_LARGE, _MAX_SMALL = 128, 4096
_SHARE_OF_FREE_DISK = 0.1
_PSEUDO = ("tmpfs", "ramfs")


class Place(Protocol):
    """Where objects go to."""

    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> int:
        """Its bytes."""
        ...

    def clean(self) -> None:
        """Delete all that is there, and what was made for it."""
        ...


class Store:
    """A prefix in the job's store. Writes create once, as a commit does; on a local path that includes fsync."""

    def __init__(self, uri: str, made: Sequence[str]) -> None:
        """`made` are the local folders that were not there before, innermost first."""
        self._uri, self._made = uri, [Path(folder) for folder in made]
        self._local = storage.scheme_of(uri) in _LOCAL

    def write(self, name: str, data: bytes) -> None:
        storage.create_once(storage.join(self._uri, name), data)
        if self._local:
            _forget(Path(storage.absolute(self._uri), name))

    def read(self, name: str) -> int:
        return len(storage.read_bytes(storage.join(self._uri, name)))

    def clean(self) -> None:
        with contextlib.suppress(NotADirectoryError), ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda name: storage.remove(storage.join(self._uri, name)), storage.list_names(self._uri)))
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else's files are in it by now
                folder.rmdir()


class Disk:
    """A folder on a local disk. Writes end with fsync, and reads do not come from memory: what was written is dropped from the cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _forget(self._folder / name)

    def read(self, name: str) -> int:
        return len((self._folder / name).read_bytes())

    def clean(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def missing_folders(uri: str) -> list[str]:
    """Of a local path, the folders on the way there that will have to be made, innermost first."""
    if storage.scheme_of(uri) not in _LOCAL:
        return []
    path = Path(storage.absolute(uri))
    return [str(folder) for folder in (path, *path.parents) if not folder.exists()]


def _forget(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def object_bytes(first_bytes: int, first_s: float, slice_s: float) -> int:
    """How large objects are, so that all threads finish several in their slice, if possible: as a first one of `first_bytes` took."""
    fits = first_bytes / max(first_s, 1e-9) * slice_s / (4 * _THREADS)
    return int(min(_LARGEST_BYTES, max(_SMALLEST_BYTES, fits)))


def file_system_of(folder: Path, mounts: str) -> str:
    """Its kind, out of /proc/mounts; the longest mount point on the way to the folder is the one."""
    best = ("", "unknown")
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        if (folder == Path(point) or Path(point) in folder.parents) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def measure_place(place: Place, *, group: str, where: str, seconds: float, most_bytes: int) -> list[Measurement]:
    """Large objects written and read, then small ones; a quarter of the time each. Deletes them, whatever happens."""
    slice_s = seconds / 4
    try:
        began = time.perf_counter()
        place.write("first", os.urandom(_FIRST_BYTES))
        size = object_bytes(_FIRST_BYTES, time.perf_counter() - began, slice_s)
        large, small = os.urandom(size), os.urandom(_SMALL_BYTES)
        most = max(_THREADS, min(_MAX_LARGE, most_bytes // size))
        written, write_s = _as_many(lambda number: place.write(f"large-{number}", large), most, slice_s)
        read, read_s = _as_many(lambda number: place.read(f"large-{number}"), written, slice_s)
        created, create_s = _as_many(lambda number: place.write(f"small-{number}", small), _MAX_SMALL, slice_s)
        got, get_s = _as_many(lambda number: place.read(f"small-{number}"), created, slice_s)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong first is what counts; who asked for this will clean again
            place.clean()
        raise
    place.clean()
    detail = f"{where}, {_THREADS} at a time"
    figures = (
        ("write", written * size / write_s / GB, "GB/s", f"{size / 1e6:.1f} MB objects, {detail}"),
        ("read", read * size / read_s / GB, "GB/s", f"{size / 1e6:.1f} MB objects, {detail}"),
        ("create", created / create_s, "objects/s", f"{_SMALL_BYTES} bytes each, {detail}"),
        ("get", got / get_s, "objects/s", f"{_SMALL_BYTES} bytes each, {detail}"),
    )
    measured = []
    for act, value, unit, text in figures:
        name = f"{group} {act}"
        data = {"pillar": "storage", "group": name, "name": name, "device": "node", "value": value, "unit": unit, "detail": text}
        measured.append(Measurement.model_validate(data))
    return measured


def _as_many(act: Callable[[int], object], most: int, slice_s: float) -> tuple[int, float]:
    """Act on 0, 1, 2, ... in several threads until the time is over; how many were done, numbered without a gap, and in how long."""
    began = time.perf_counter()
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        while done < most and (done == 0 or time.perf_counter() - began < slice_s):
            batch = range(done, min(most, done + 2 * _THREADS))
            list(pool.map(act, batch))
            done = batch.stop
    return done, time.perf_counter() - began


def main(data: dict[str, Any], _: Say) -> dict[str, Any]:
    """The store under `store`, where there is one, and the local folder `disk`; or, where `clean` is set, only their end."""
    store = Store(data["store"], data["made"]) if data["store"] else None
    folder = Path(data["disk"])
    if data.get("clean"):
        for place in (store, Disk(folder)):
            if place is not None:
                place.clean()
        return Answer(measurements=()).model_dump(mode="json")
    measured = []
    left_out = []
    seconds = data["seconds"] / (2 if store else 1)
    if store is None:
        left_out.append("the store: no output was named; give --output")
    else:
        where = storage.scheme_of(data["store"])
        measured += measure_place(store, group="store", where=where, seconds=seconds, most_bytes=_MAX_LARGE * _LARGEST_BYTES)
    free = shutil.disk_usage(folder.parent).free
    kind = file_system_of(folder.resolve(), Path("/proc/mounts").read_text())
    if kind in _PSEUDO:
        left_out.append(f"the local disk: {folder.parent} is {kind}, which is memory; name another folder by --disk")
    else:
        most_bytes = int(_SHARE_OF_FREE_DISK * free)
        measured += measure_place(Disk(folder), group="disk", where=f"{folder.parent}, {kind}", seconds=seconds, most_bytes=most_bytes)
    return Answer(measurements=tuple(measured), left_out=tuple(left_out)).model_dump(mode="json")


if __name__ == "__main__":
    serve(main)
