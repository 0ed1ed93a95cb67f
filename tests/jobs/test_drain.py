"""A request to drain: which run hears it, whatever the clocks of the machines say."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.drain import ASKED_AT
from jobs.drain import DRAIN_BEFORE
from jobs.drain import NO_DRAIN
from jobs.drain import DrainWatch
from jobs.drain import ask_to_drain
from jobs.drain import drain_request
from pipeline import storage
from schemas import layout


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def ask(out: str, monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    """From a machine whose clock is so far ahead."""
    now = time.time() + off_s
    with monkeypatch.context() as patched:
        patched.setattr("jobs.drain.time", SimpleNamespace(time=lambda: now))
        ask_to_drain(out)


@pytest.mark.parametrize("off_s", [-3600.0, 0.0, 3600.0])
def test_a_request_is_heard_by_the_run_that_is_at_work_and_by_no_later_one(out: str, monkeypatch: pytest.MonkeyPatch, off_s: float) -> None:
    first = DrainWatch(out)
    assert not first.asked()
    ask(out, monkeypatch, off_s)
    assert first.asked()
    second = DrainWatch(out)
    assert not second.asked()
    ask(out, monkeypatch, off_s)
    assert [first.asked(), second.asked()] == [True, True]


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_a_process_that_begins_after_the_request_hears_it_where_its_run_was_asked_for_before(
    out: str, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    ask(out, monkeypatch, 0.0)  # of an earlier run
    monkeypatch.setenv(DRAIN_BEFORE, drain_request(out))
    assert not DrainWatch(out).asked()
    ask(out, monkeypatch, off_s)
    assert [DrainWatch(out).asked() for _ in range(2)] == [True, True]  # however often it is started again


def test_no_request_has_a_name_too(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drain_request(out) == NO_DRAIN
    monkeypatch.setenv(DRAIN_BEFORE, NO_DRAIN)
    ask_to_drain(out)
    assert DrainWatch(out).asked()


def test_on_the_machine_where_a_run_was_asked_for_its_clock_tells(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(out, monkeypatch, -10.0)
    monkeypatch.setenv(ASKED_AT, repr(time.time()))
    assert not DrainWatch(out).asked()
    ask(out, monkeypatch, 10.0)
    assert DrainWatch(out).asked()


@pytest.mark.parametrize("data", [b"", b"soon", b"nan", b"\xff", b"9" * 5000])
def test_a_request_of_any_content_is_one(out: str, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    watch = DrainWatch(out)
    storage.replace(storage.join(out, layout.DRAIN), data)
    assert watch.asked()
    monkeypatch.setenv(ASKED_AT, repr(time.time()))
    DrainWatch(out)  # nor is one of those a crash


def test_a_store_that_does_not_answer_says_nothing(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_to_drain(out)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", lambda _: (_ for _ in ()).throw(OSError("away")))
        watch = DrainWatch(out)
        assert not watch.asked()
    assert not watch.asked()  # what lies there when it answers is an earlier run's
    ask_to_drain(out)
    assert watch.asked()
