"""The flight record: what is inside an engine, readable from another process, also after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.flight import Flight
from pipeline.flight import FlightRecorder
from pipeline.flight import Tag
from pipeline.flight import forget_flight
from pipeline.flight import is_hung
from pipeline.flight import read_flight

TAG = Tag(out_uri="/out", fingerprint="f" * 64, unit=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "replica.flight"


def test_rows_inside_are_seen_and_those_that_left_are_not(path: Path) -> None:
    recorder = FlightRecorder(path, 8)
    other = Tag(out_uri="/out", fingerprint="f" * 64, unit=4)
    first, second = recorder.mark(TAG), recorder.mark(other)
    slots = [recorder.enter(first, position) for position in (0, 10, 11)]
    recorder.enter(second, 12)
    recorder.leave(slots[1])
    found = read_flight(path)
    assert found is not None
    assert (found.rows, found.num_rows) == ({TAG: frozenset({0, 11}), other: frozenset({12})}, 3)


def test_units_of_several_jobs_are_told_apart_and_a_unit_costs_no_write(path: Path) -> None:
    recorder = FlightRecorder(path, 8)
    jobs = [Tag(out_uri=out_uri, fingerprint=fingerprint, unit=0) for out_uri in ("/out", "/other ü") for fingerprint in ("f", "e")]
    for position, tag in enumerate(jobs):
        recorder.enter(recorder.mark(tag), position)
    names = path.with_suffix(".jobs.json")
    written = names.stat().st_mtime_ns, names.stat().st_ino
    later = Tag(out_uri="/out", fingerprint="e", unit=1 << 40)
    recorder.enter(recorder.mark(later), 9)
    assert (names.stat().st_mtime_ns, names.stat().st_ino) == written
    found = read_flight(path)
    assert found is not None
    assert found.rows == {**{tag: frozenset({position}) for position, tag in enumerate(jobs)}, later: frozenset({9})}


def test_a_job_whose_name_found_the_disk_full_is_written_with_the_next_unit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = FlightRecorder(path, 8)
    with monkeypatch.context() as full:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(Path, "write_text", refuse)
        recorder.enter(recorder.mark(TAG), 1)
    found = read_flight(path)
    assert found is not None
    assert not found.rows
    recorder.mark(Tag(out_uri=TAG.out_uri, fingerprint=TAG.fingerprint, unit=9))
    found = read_flight(path)
    assert found is not None
    assert found.rows == {TAG: frozenset({1})}


def test_a_record_that_is_forgotten_is_none(path: Path) -> None:
    recorder = FlightRecorder(path, 8)
    recorder.enter(recorder.mark(TAG), 1)
    forget_flight(path)
    assert read_flight(path) is None
    assert list(path.parent.iterdir()) == []
    forget_flight(path)


def test_a_slot_is_used_again_and_rows_beyond_the_slots_are_not_recorded(path: Path) -> None:
    recorder = FlightRecorder(path, 1)
    mark = recorder.mark(TAG)
    slot = recorder.enter(mark, 1)
    assert recorder.enter(mark, 2) is None
    recorder.leave(None)
    recorder.leave(slot)
    recorder.enter(mark, 5)
    found = read_flight(path)
    assert found is not None
    assert found.rows == {TAG: frozenset({5})}


def test_steps_and_finished_rows_are_counted_and_given_up_rows_are_not_finished(path: Path) -> None:
    recorder = FlightRecorder(path, 4)
    mark = recorder.mark(TAG)
    slots = [recorder.enter(mark, position) for position in range(3)]
    recorder.leave(slots[0])
    recorder.leave(slots[1], finished=False)
    before = time.monotonic()
    recorder.moved()
    found = read_flight(path)
    assert found is not None
    assert (found.steps, found.rows_finished) == (1, 1)
    assert before <= found.moved_at <= time.monotonic()


def test_an_engine_is_hung_only_with_rows_inside_and_after_the_silence() -> None:
    flight = Flight(moved_at=100.0, steps=1, rows_finished=0, rows={TAG: frozenset({1})})
    assert is_hung(flight, now=131.0, silence_s=30)
    assert not is_hung(flight, now=129.0, silence_s=30)
    assert not is_hung(Flight(moved_at=100.0, steps=1, rows_finished=0, rows={}), now=1e9, silence_s=30)


def test_the_record_of_a_killed_process_is_whole(path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.flight import FlightRecorder, Tag\n"
        f"recorder = FlightRecorder(Path({str(path)!r}), 100)\n"
        f"mark = recorder.mark(Tag(out_uri='/out', fingerprint='f' * 64, unit=3))\n"
        "for position in range(50): recorder.enter(mark, position)\n"
        "recorder.moved(); print('up', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = read_flight(path)
    assert found is not None
    assert found.rows == {TAG: frozenset(range(50))}
    assert found.steps == 1


@pytest.mark.parametrize("data", [b"", b"short"])
def test_no_record_or_half_of_one_is_none(path: Path, data: bytes) -> None:
    assert read_flight(path) is None
    FlightRecorder(path, 1)
    path.write_bytes(data)
    assert read_flight(path) is None
