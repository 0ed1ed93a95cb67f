"""How a job's own process ended, in words: what it said, what a signal means, what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.started import why_it_ended

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
