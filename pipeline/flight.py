"""Flight: which rows are inside an engine and when it last moved, in a file that outlives the engine's process.

Written by the engine's own thread through shared memory (no system call for a row); read by whoever looks after the process,
also when that was killed, stopped or hangs. Knows where a row stands, never what is in it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_HEADER = struct.Struct("<dqq")  # monotonic seconds of the last move (one clock for all processes of a machine), moves, rows finished
_SLOT = struct.Struct("<qqq")  # number of the job, from 1; unit; position in the input table. All zero: empty
_JOBS = ".jobs.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """Whose rows they are."""

    out_uri: str
    fingerprint: str
    unit: int


class Mark(NamedTuple):
    """A tag as it stands in a slot."""

    job: int
    unit: int


NOBODY = Mark(0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flight:
    """What was in an engine at one moment."""

    moved_at: float
    """Monotonic seconds of when a row last came in or out, or a token more was counted."""
    steps: int
    """Those that moved something."""
    rows_finished: int
    """Since the engine came up."""
    rows: Mapping[Tag, frozenset[int]]
    """Positions of the rows inside, by whose they are."""

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.rows.values()))


def is_hung(flight: Flight, *, now: float, silence_s: float) -> bool:
    """Whether rows are inside and for so long none came in or out, and none got a token, whatever steps were made."""
    return flight.num_rows > 0 and now - flight.moved_at > silence_s


class FlightRecorder:
    """Writes the record. Rows and moves come from one thread, marks are asked for by any."""

    def __init__(self, path: Path, num_slots: int) -> None:
        """Rows beyond `num_slots` at a time are not recorded. Raises OSError where the disk is full."""
        self._path = path
        size_bytes = _HEADER.size + num_slots * _SLOT.size
        with path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # a hole that cannot be filled later would kill the process
            self._map = mmap.mmap(file.fileno(), size_bytes)
        self._free = list(range(num_slots))
        self._steps = self._finished = 0
        self._jobs: dict[tuple[str, str], int] = {}
        """Their numbers. Only a job that was never here before is worth a write: units come by the hundred a second."""
        self._written = 0
        """Of them, those that stand in the file: on a full disk fewer than there are."""
        self._lock = threading.Lock()
        self._write_jobs()

    def mark(self, tag: Tag) -> Mark:
        """For the rows of one unit."""
        job = (tag.out_uri, tag.fingerprint)
        with self._lock:
            number = self._jobs.setdefault(job, len(self._jobs) + 1)
            if self._written < len(self._jobs):
                self._write_jobs()
            return Mark(number, tag.unit)

    def enter(self, mark: Mark, position: int) -> int | None:
        """A row goes in. Returns its slot, if there was one."""
        if not self._free:
            return None
        slot = self._free.pop()
        _SLOT.pack_into(self._map, _HEADER.size + slot * _SLOT.size, *mark, position)
        return slot

    def leave(self, slot: int | None, *, finished: bool = True) -> None:
        """A row comes out, finished or given up."""
        self._finished += finished
        if slot is not None:
            _SLOT.pack_into(self._map, _HEADER.size + slot * _SLOT.size, *NOBODY, 0)
            self._free.append(slot)

    def moved(self) -> None:
        """Rows came in or out, or tokens were made."""
        self._steps += 1
        _HEADER.pack_into(self._map, 0, time.monotonic(), self._steps, self._finished)

    def _write_jobs(self) -> None:
        target = self._path.with_suffix(_JOBS)
        temporary = target.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # on a full disk rows go unrecorded; that must not cost them
            temporary.write_text(json.dumps(list(self._jobs)))
            temporary.replace(target)
            self._written = len(self._jobs)


def forget_flight(path: Path) -> None:
    """Nobody reads an earlier process's record for this one's."""
    for part in (path, path.with_suffix(_JOBS)):
        part.unlink(missing_ok=True)


def read_flight(path: Path) -> Flight | None:
    """The record as it stands; None where the engine never came up."""
    try:
        data = path.read_bytes()
        jobs = [(out_uri, fingerprint) for out_uri, fingerprint in json.loads(path.with_suffix(_JOBS).read_text())]
    except (OSError, ValueError):
        return None
    if len(data) < _HEADER.size:
        return None
    moved_at, steps, finished = _HEADER.unpack_from(data)
    rows: defaultdict[Tag, set[int]] = defaultdict(set)
    for job, unit, position in _SLOT.iter_unpack(data[_HEADER.size :]):
        if 0 < job <= len(jobs):
            out_uri, fingerprint = jobs[job - 1]
            rows[Tag(out_uri=out_uri, fingerprint=fingerprint, unit=unit)].add(position)
    return Flight(
        moved_at=moved_at, steps=steps, rows_finished=finished, rows={tag: frozenset(positions) for tag, positions in rows.items()}
    )
