"""Segments: what an unfinished attempt leaves comes back whole to the next one of the same unit and job, and to no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.flight import Flight
from pipeline.flight import Tag
from pipeline.isolate import Death
from pipeline.segments import added_schema
from pipeline.segments import folder_of
from pipeline.segments import load_history
from pipeline.segments import record_death
from pipeline.segments import remove_segments
from pipeline.segments import save_segment
from schemas.completions import Choice
from schemas.completions import Completion
from schemas.completions import completion_arrays
from schemas.job import JobSpec
from schemas.prompts import RowError
from schemas.unit import RowRange
from schemas.unit import WorkUnit

PRINT = "ab" * 32
UNIT = WorkUnit(index=2, ranges=(RowRange(uri="x", identity="1", row_start=0, row_stop=10, position=20),))
ENGINE = {"kind": "small"}


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.fixture
def job(make_job: Callable[..., JobSpec]) -> JobSpec:
    return make_job(output={"token_ids": True})


def rows_of(job: JobSpec, *texts: str | None) -> pa.RecordBatch:
    """One row a text; None is an error row."""
    made = [
        Completion(prompt_tokens=3, error=RowError(kind="engine", message="m"))
        if text is None
        else Completion(prompt_tokens=3, choices=(Choice(text=text, finish_reason="stop", token_ids=[1, 2]),))
        for text in texts
    ]
    return pa.RecordBatch.from_arrays(completion_arrays(made, job), schema=added_schema(job))


def save(job: JobSpec, out: str, positions: list[int], texts: list[str | None], begun: dict[int, list[int]] | None = None) -> None:
    save_segment(UNIT, out, PRINT, positions=positions, rows=rows_of(job, *texts), begun=begun or {}, engine=ENGINE)


def test_a_unit_without_segments_has_no_history(job: JobSpec, out: str) -> None:
    history = load_history(UNIT, out, PRINT, job)
    assert (history.index, history.begun, history.deaths, history.rows.num_rows) == ({}, {}, (), 0)


def test_saved_rows_and_begun_rows_come_back(job: JobSpec, out: str) -> None:
    save(job, out, [20, 25], ["a", None], {21: [5, 6], 22: []})
    history = load_history(UNIT, out, PRINT, job)
    assert history.rows.equals(rows_of(job, "a", None))
    assert (history.index, history.begun, history.engines) == ({20: 0, 25: 1}, {21: (5, 6)}, (ENGINE,))


def test_the_union_of_segments_counts_each_row_once(job: JobSpec, out: str) -> None:
    save(job, out, [20, 21], ["a", "b"], {23: [1]})
    save(job, out, [21, 22], ["b", "c"], {20: [9], 23: [1, 2]})
    history = load_history(UNIT, out, PRINT, job)
    assert {position: history.rows.column(0)[row].as_py() for position, row in history.index.items()} == {20: "a", 21: "b", 22: "c"}
    assert history.rows.num_rows == 3
    assert history.begun == {23: (1, 2)}


def test_an_empty_segment_is_not_written(job: JobSpec, out: str) -> None:
    save(job, out, [], [], {21: []})
    assert storage.list_names(folder_of(out, PRINT, 2)) == {}


def test_segments_of_another_job_or_unit_and_damaged_ones_count_as_not_there(job: JobSpec, out: str) -> None:
    save(job, out, [20], ["a"])
    folder = folder_of(out, PRINT, 2)
    (name,) = storage.list_names(folder)
    data = storage.read_bytes(storage.join(folder, name))
    storage.create_once(storage.join(folder, "torn.rows.parquet"), data[: len(data) // 2])
    storage.create_once(storage.join(folder, "bad.death.json"), b'{"fingerprint": 1')
    storage.create_once(storage.join(folder_of(out, PRINT, 3), name), data)
    assert load_history(UNIT, out, PRINT, job).index == {20: 0}
    other = WorkUnit(index=3, ranges=UNIT.ranges)
    assert load_history(other, out, PRINT, job).index == {}
    assert load_history(UNIT, out, PRINT[:8] + "00" * 28, job).index == {}


def test_a_row_outside_the_unit_makes_the_segment_worthless(job: JobSpec, out: str) -> None:
    save(job, out, [19], ["a"])
    save(job, out, [30], ["a"])
    assert load_history(UNIT, out, PRINT, job).index == {}


def test_a_death_is_told_to_each_unit_that_had_rows_inside(job: JobSpec, out: str) -> None:
    rows = {
        Tag(out_uri=out, fingerprint=PRINT, unit=2): frozenset({20, 29}),
        Tag(out_uri=out, fingerprint=PRINT, unit=7): frozenset({70, 71, 72}),
    }
    record_death(Flight(moved_at=0.0, steps=1, rows_finished=0, rows=rows), "signal SIGSEGV")
    assert load_history(UNIT, out, PRINT, job).deaths == (Death(rows=frozenset({20, 29}), others=3, how="signal SIGSEGV"),)


def test_a_death_says_whether_somebody_killed_the_engine_and_an_older_one_says_nothing(job: JobSpec, out: str) -> None:
    flight = Flight(moved_at=0.0, steps=1, rows_finished=0, rows={Tag(out_uri=out, fingerprint=PRINT, unit=2): frozenset({20})})
    record_death(flight, "signal SIGKILL", True)
    said = {"fingerprint": PRINT, "unit": 2, "death": {"rows": [20], "others": 0, "how": "signal SIGKILL"}}
    storage.create_once(storage.join(folder_of(out, PRINT, 2), "older.death.json"), json.dumps(said).encode())
    assert sorted(death.killed for death in load_history(UNIT, out, PRINT, job).deaths) == [False, True]


@pytest.mark.parametrize("rows", [[19], ["20"], [True], "20", None, {"a": 1}])
def test_a_death_with_impossible_rows_counts_as_not_there(job: JobSpec, out: str, rows: object) -> None:
    said = {"fingerprint": PRINT, "unit": 2, "death": {"rows": rows, "others": 0, "how": "x"}}
    storage.create_once(storage.join(folder_of(out, PRINT, 2), "a.death.json"), json.dumps(said).encode())
    assert load_history(UNIT, out, PRINT, job).deaths == ()


def test_saved_rows_are_removed_after_the_commit_and_deaths_stay(job: JobSpec, out: str) -> None:
    save(job, out, [20], ["a"])
    record_death(Flight(moved_at=0.0, steps=1, rows_finished=0, rows={Tag(out_uri=out, fingerprint=PRINT, unit=2): frozenset({20})}), "x")
    remove_segments(UNIT, out, PRINT, load_history(UNIT, out, PRINT, job))
    history = load_history(UNIT, out, PRINT, job)
    assert (history.index, len(history.deaths)) == ({}, 1)
