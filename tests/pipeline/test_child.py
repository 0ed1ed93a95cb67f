"""Work in a process of its own: it may hang."""

from __future__ import annotations

import time

import pytest

from pipeline.child import run_child
from schemas.errors import JobError


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_what_it_started_and_the_end_of_its_log_is_told() -> None:
    began = time.monotonic()
    with pytest.raises(JobError) as raised:
        run_child("tests.pipeline.hanging_child", {"words": "waiting for a lost GPU"}, environment={}, say=print, limit_s=8)
    assert "tests.pipeline.hanging_child gave no answer within 8 s and was ended. The end of its log:\nwaiting for a lost GPU" in str(
        raised.value
    )
    assert time.monotonic() - began < 600  # it would hang for an hour


def test_a_process_that_answers_in_time_is_not_touched() -> None:
    answer = run_child("tests.pipeline.hanging_child", {"words": "", "answer": 7}, environment={}, say=print, limit_s=60)
    assert answer == {"answer": 7}
