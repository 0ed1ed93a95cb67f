"""Parquet files with flipped bytes and cut ends, as inputs and as parts: refused in the project's words, or read right.

Never anything but the project's errors, and no damaged part is called complete unless every value in it is what was written.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings

from jobs.api import run
from jobs.verify import verify
from pipeline.commit import read_report
from schemas.errors import ForeignOutput
from schemas.errors import TokenmillError
from tests.fuzz.conftest import KINDS
from tests.fuzz.conftest import ROWS
from tests.fuzz.conftest import SEEDS
from tests.fuzz.conftest import Finished
from tests.fuzz.conftest import damage
from tests.fuzz.conftest import examples

_ROOT = Path(__file__).resolve().parents[2]
_FIRST_INPUT, _INPUTS = int(os.environ.get("TOKENMILL_SEED", "0")), examples(500)
_SLOW = settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
def test_damaged_inputs_are_planned_and_run_or_refused_in_the_projects_words(tiny_model: Path) -> None:
    """Arrow's own abort is counted and told; the next process goes on behind it."""
    first, stop, aborts = _FIRST_INPUT, _FIRST_INPUT + _INPUTS, []
    while first < stop:
        command = [sys.executable, "-m", "tests.fuzz.damaged_inputs", str(tiny_model), str(first), str(stop - first)]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        assert [line for line in lines if line.startswith("wrong")] == []
        seeds = [int(line.split()[1]) for line in lines if line.startswith("seed")]
        if done.returncode == 0:
            break
        assert (done.returncode, "parquet::ParquetException" in done.stderr) == (-signal.SIGABRT, True), done.stderr[-2000:]
        aborts.append(seeds[-1])
        first = seeds[-1] + 1
    print(f"\n{_INPUTS} damaged inputs; Arrow aborted at seeds {aborts}")
    assert len(aborts) <= _INPUTS // 50


@_SLOW
@given(seed=SEEDS, kind=KINDS)
def test_a_damaged_part_is_never_called_complete_unless_it_reads_as_it_was_written(finished: Finished, seed: int, kind: str) -> None:
    rows = finished.rows()
    name = finished.part_names[seed % len(finished.part_names)]
    finished.write(name, damage(finished.read(name), seed, kind))
    try:
        verdict = verify(finished.out_uri)
        if verdict.complete:
            assert finished.rows() == rows
        else:
            assert any(name.rsplit("/", 1)[-1] in problem for problem in verdict.problems)
    finally:
        finished.restore()


@_SLOW
@given(seed=SEEDS, kind=KINDS)
def test_a_damaged_parts_report_is_read_or_refused(finished: Finished, seed: int, kind: str) -> None:
    name = finished.part_names[seed % len(finished.part_names)]
    finished.write(name, damage(finished.read(name), seed, kind))
    try:
        with contextlib.suppress(ForeignOutput):
            assert read_report(f"memory:/{finished.root}/{name}").rows > 0
    finally:
        finished.restore()


@settings(_SLOW, max_examples=examples(60))
@given(seed=SEEDS, kind=KINDS)
def test_running_again_over_a_damaged_part_ends_in_the_projects_words_and_overwrites_nothing(
    finished: Finished, seed: int, kind: str
) -> None:
    name = finished.part_names[seed % len(finished.part_names)]
    damaged = damage(finished.read(name), seed, kind)
    finished.write(name, damaged)
    try:
        with contextlib.suppress(TokenmillError):
            run(finished.job(), stream=io.StringIO())
        assert finished.fs.cat_file(f"{finished.root}/{name}") == damaged
    finally:
        finished.restore()


def test_the_job_that_is_damaged_is_whole(finished: Finished) -> None:
    """The control: what is put back is complete."""
    assert verify(finished.out_uri).complete
    assert [row["id"] for row in finished.rows()] == list(range(ROWS))
    finished.write(finished.part_names[0], b"")
    assert not verify(finished.out_uri).complete
    finished.restore()
    assert verify(finished.out_uri).complete
