"""How a job's own process ended, in words: what it said, what a signal means, what to do next; and how its job stands till then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.started import as_of
from jobs.started import why_it_ended
from jobs.status import Status

_LOG = Path("/cache/log")


def test_a_refusal_is_told_whole_in_its_own_words() -> None:
    log = ["job tickets: 3 rows", "tokenmill: output.uri: begun by another job. What differs:", "  sampling: 3, not 4"]
    assert why_it_ended(2, log, _LOG) == "output.uri: begun by another job. What differs:\n  sampling: 3, not 4\nits log: /cache/log"


@pytest.mark.parametrize(
    ("exit_code", "how"),
    [
        (-9, "the job's process was killed (SIGKILL), as Linux does where memory runs out"),
        (-11, "the job's process was ended by a signal (SIGSEGV)"),
        (-63, "the job's process was ended by signal 63"),
        (1, "not all of the job is done (exit code 1)"),
        (7, "the job's process ended with exit code 7"),
    ],
)
def test_an_end_that_is_none_says_how_it_came_and_what_to_do(exit_code: int, how: str) -> None:
    assert why_it_ended(exit_code, ["40%", "50%"], _LOG) == (
        f"{how}; what was committed stays: run the same again, it goes on from there\n40%\n50%\nits log: /cache/log"
    )


def test_only_the_last_lines_of_a_long_log_are_told() -> None:
    assert why_it_ended(-9, [f"line {number}" for number in range(100)], _LOG).splitlines()[1:] == [
        *(f"line {number}" for number in range(92, 100)),
        "its log: /cache/log",
    ]


def test_a_refusal_without_a_word_still_says_its_code() -> None:
    assert "ended with exit code 2" in why_it_ended(2, [], _LOG)


# What storage says, and what is known of the process.

WORD = Status(
    name="job", fingerprint="f", out_uri="out", state="drained", units_done=5, units=10, rows_done=500, rows=1000,
    said={"state": "drained", "began_at": 100.0}, age_s=900.0,
)  # fmt: skip


def test_an_earlier_runs_last_word_is_not_that_of_one_that_was_just_started() -> None:
    assert as_of(WORD, asked_at=100.5, over=False) == replace(WORD, state="starting", said={}, age_s=None)
    assert as_of(WORD, asked_at=100.0, over=False) == WORD


def test_a_process_that_is_there_was_not_interrupted_however_silent_its_driver() -> None:
    silent = replace(WORD, state="interrupted", said={"state": "running", "began_at": 100.0})
    assert as_of(silent, asked_at=99.0, over=False).state == "running"


@pytest.mark.parametrize("state", ["starting", "running", "draining"])
def test_a_process_that_is_gone_does_not_run_however_fresh_its_word(state: str) -> None:
    assert as_of(replace(WORD, state=state), asked_at=99.0, over=True).state == "interrupted"
