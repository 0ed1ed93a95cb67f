"""How a job stands, from storage alone; and the request to drain, which lies there too."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.accept import accept
from jobs.accept import load_job_of
from jobs.accept import store
from jobs.api import run
from jobs.cluster.cluster import ReplicaState
from jobs.driver import Progress
from jobs.driver import State
from jobs.progress import Speed
from jobs.status import STALE_AFTER_S
from jobs.status import StatusReader
from jobs.status import cancel
from jobs.status import cancel_words
from jobs.status import read_status
from jobs.status import write_status
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.manifest import Totals

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]


@pytest.fixture
def begun(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> Path:
    """An output with job and plan of 40 rows in 3 units, and no part."""
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(40)])
    store(accept(make_job(name="tickets")))
    return tmp_path / "out"


def progress(state: State) -> Progress:
    return Progress(
        state=state,
        total_units=3,
        total_rows=40,
        done_before=1,
        rows_before=16,
        totals=Totals(units=1, rows=16, error_rows=2, prompt_tokens=300, completion_tokens=100),
        replicas=[ReplicaState(name="local-0", window_rows=512, rows=20)],
        failed={2: "UnitError: no"},
        began_at=1000.0,
    )


def updated_at(out: Path) -> float:
    when: float = json.loads((out / layout.STATUS).read_text())["updated_at"]
    return when


def test_a_job_that_never_ran_is_new(begun: Path) -> None:
    status = read_status(str(begun))
    assert (status.name, status.state, status.said, status.age_s) == ("tickets", "new", {}, None)
    assert (status.units_done, status.units, status.rows_done, status.rows) == (0, 3, 0, 40)


def test_status_says_what_the_driver_said_last(begun: Path) -> None:
    write_status(str(begun), progress("running"), Speed(tokens_per_s=123.45, rows_per_s=1.0, eta_s=8.4))
    status = read_status(str(begun), now=updated_at(begun) + 5)
    assert (status.state, status.age_s) == ("running", 5.0)
    said = {key: value for key, value in status.said.items() if key not in ("updated_at", "host", "pid", "replicas")}
    assert said == {
        "state": "running",
        "began_at": 1000.0,
        "units_done": 2,
        "rows_done": 32,
        "error_rows": 2,
        "errors": {},
        "examples": [],
        "prompt_tokens": 300,
        "completion_tokens": 100,
        "reused_tokens": 0,
        "output_tokens_per_s": 123.5,
        "eta_s": 8,
        "failed_units": {"2": "UnitError: no"},
        "usd": None,
        "dashboard": None,
        "metrics": [],
        "canary": "",
    }
    assert [replica["name"] for replica in status.said["replicas"]] == ["local-0"]


@pytest.mark.parametrize("state", ["starting", "running", "draining"])
def test_a_driver_that_speaks_no_more_was_interrupted(begun: Path, state: State) -> None:
    write_status(str(begun), progress(state), Speed())
    assert read_status(str(begun), now=updated_at(begun) + STALE_AFTER_S - 1).state == state
    assert read_status(str(begun), now=updated_at(begun) + STALE_AFTER_S + 1).state == "interrupted"


@pytest.mark.parametrize("state", ["complete", "failed", "limit", "drained"])
def test_an_end_stays_what_it_was(begun: Path, state: State) -> None:
    write_status(str(begun), progress(state), Speed())
    assert read_status(str(begun), now=updated_at(begun) + 9999).state == state


def test_rows_done_are_counted_by_what_lies_there(begun: Path, make_job: MakeJob) -> None:
    run(make_job(name="tickets"), stream=io.StringIO())
    sorted(begun.glob("part-*.parquet"))[0].unlink()
    status = read_status(str(begun))
    assert (status.units_done, status.rows_done) == (2, 24)


def test_a_finished_job_is_complete_without_its_drivers_word(begun: Path, make_job: MakeJob) -> None:
    run(make_job(name="tickets"), stream=io.StringIO())
    (begun / layout.STATUS).unlink()
    status = read_status(str(begun))
    assert (status.state, status.units_done, status.rows_done) == ("complete", 3, 40)


def test_a_damaged_word_of_the_driver_is_no_word(begun: Path) -> None:
    (begun / layout.STATUS).write_text('{"state": "runn')
    assert read_status(str(begun)).state == "new"


def test_status_needs_neither_inputs_nor_model(begun: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "in")
    assert read_status(str(begun)).rows == 40


# Read again and again.


def test_a_reader_believes_a_driver_that_speaks_and_lists_when_none_does(begun: Path) -> None:
    write_status(str(begun), progress("running"), Speed())
    reader, said_at = StatusReader(str(begun)), updated_at(begun)
    seen = {age_s: reader.read(now=said_at + age_s) for age_s in (1, STALE_AFTER_S + 1)}
    assert [(found.state, found.units_done, found.rows_done) for found in seen.values()] == [("running", 2, 32), ("interrupted", 0, 0)]
    assert read_status(str(begun), now=said_at + 1).rows_done == 0


@pytest.mark.parametrize("said", [{"units_done": 4}, {"rows_done": -1}, {"rows_done": 41}, {"units_done": "2"}, {"rows_done": None}])
def test_a_driver_that_says_what_cannot_be_is_not_believed(begun: Path, said: dict[str, object]) -> None:
    write_status(str(begun), progress("running"), Speed())
    (begun / layout.STATUS).write_text(json.dumps(json.loads((begun / layout.STATUS).read_text()) | said))
    found = StatusReader(str(begun)).read(now=updated_at(begun))
    assert (found.units_done, found.rows_done) == (0, 0)


def test_a_reader_says_of_a_finished_job_what_read_status_says(begun: Path, make_job: MakeJob) -> None:
    reader = StatusReader(str(begun))
    assert reader.read(now=1.0) == read_status(str(begun), now=1.0)
    run(make_job(name="tickets"), stream=io.StringIO())
    assert reader.read(now=1.0) == read_status(str(begun), now=1.0)
    sorted(begun.glob("part-*.parquet"))[0].unlink()
    assert reader.read(now=1.0) == read_status(str(begun), now=1.0)


def test_a_reader_parses_the_plan_once_and_again_when_another_job_lies_there(
    begun: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    monkeypatch.setattr("jobs.status.load_job_of", lambda uri: parsed.append(uri) or load_job_of(uri))
    reader = StatusReader(str(begun))
    assert [reader.read().name for _ in range(3)] == ["tickets"] * 3
    assert len(parsed) == 1
    shutil.rmtree(begun)
    store(accept(make_job(name="another")))
    assert reader.read().name == "another"
    assert len(parsed) == 2


def test_a_reader_is_hopeless_once_it_has_failed_for_a_minute(begun: Path) -> None:
    clock, away = [1000.0], begun.with_name("away")
    reader = StatusReader(str(begun), clock=lambda: clock[0])

    def fails_at(now: float) -> bool:
        clock[0] = now
        with pytest.raises(JobError):
            reader.read()
        return reader.hopeless

    begun.rename(away)
    assert [fails_at(1000.0), fails_at(1059.0)] == [False, False]
    away.rename(begun)
    assert reader.read().name == "tickets"
    begun.rename(away)
    assert [fails_at(1070.0), fails_at(1129.0), fails_at(1130.0)] == [False, False, True]


@pytest.mark.parametrize("state", ["starting", "running", "draining"])
def test_cancel_asks_a_job_that_runs_to_drain(begun: Path, state: State) -> None:
    write_status(str(begun), progress(state), Speed())
    assert cancel(str(begun)) == state
    assert (begun / layout.DRAIN).exists()


@pytest.mark.parametrize("state", ["complete", "failed", "drained"])
def test_cancel_leaves_a_job_that_has_ended_alone(begun: Path, state: State) -> None:
    write_status(str(begun), progress(state), Speed())
    assert cancel(str(begun)) == state
    assert not (begun / layout.DRAIN).exists()


def test_cancel_asks_also_where_nobody_seems_to_be_at_work(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_status(str(begun), progress("running"), Speed())
    ahead = time.time() + 3600
    monkeypatch.setattr("jobs.status.time", SimpleNamespace(time=lambda: ahead))  # this machine's clock, not the driver's
    assert cancel(str(begun)) == "interrupted"
    assert (begun / layout.DRAIN).exists()
    assert cancel_words("interrupted").endswith("Asked to drain, in case one is at work")


def test_an_earlier_cancel_does_not_stop_the_next_run(begun: Path, make_job: MakeJob) -> None:
    write_status(str(begun), progress("running"), Speed())
    cancel(str(begun))
    assert run(make_job(name="tickets"), stream=io.StringIO()).state == "complete"


@pytest.mark.parametrize("ask", [read_status, cancel])
@pytest.mark.parametrize("name", ["nowhere", "in"])
def test_a_folder_without_a_job_is_refused(begun: Path, tmp_path: Path, ask: Callable[[str], object], name: str) -> None:
    with pytest.raises(JobError, match=f"{tmp_path / name} holds no job"):
        ask(str(tmp_path / name))
