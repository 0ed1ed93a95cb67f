"""LoadGen around a function that answers samples: every sample once, errors come out, and its thread never waits for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jobs.bench.loadgen import AccuracyEntry
from jobs.bench.loadgen import Answer
from jobs.bench.loadgen import run_loadgen
from jobs.bench.offline import check_test06


@pytest.mark.slow
def test_answers_are_logged_by_their_place_in_the_set(tmp_path: Path) -> None:
    def answer_all(indices: list[int], answer: Answer) -> None:
        for number, index in enumerate(indices):
            answer(number, [index, 2**31 - 1, *range(index)])

    run = run_loadgen("accuracy", num_samples=30, target_qps=1, min_duration_s=0, folder=tmp_path, answer_all=answer_all)
    entries = sorted(run.accuracy, key=lambda entry: entry.index)
    assert [entry.index for entry in entries] == list(range(30))
    assert [entry.token_ids for entry in entries] == [[index, 2**31 - 1, *range(index)] for index in range(30)]
    assert [entry.token_count for entry in entries] == [2 + index for index in range(30)]


@pytest.mark.slow
def test_every_run_in_a_process_has_loadgens_own_seeds(tmp_path: Path) -> None:
    issued: list[list[int]] = []

    def answer_all(indices: list[int], answer: Answer) -> None:
        issued.append(indices)
        for number in range(len(indices)):
            answer(number, [1])

    runs = [
        run_loadgen("performance", num_samples=7, target_qps=20, min_duration_s=1, folder=tmp_path / str(n), answer_all=answer_all)
        for n in range(2)
    ]
    assert issued[0] == issued[1]
    assert len(issued[0]) == 28  # 1.1 x 20 x 1 s, in whole passes
    assert all(sorted(issued[0][pass_ * 7 : pass_ * 7 + 7]) == list(range(7)) for pass_ in range(4))
    assert runs[0].detail["effective_qsl_rng_seed"] == runs[1].detail["effective_qsl_rng_seed"] == 2085463073848966840


@pytest.mark.slow
def test_an_error_comes_out_and_loadgens_thread_ends(tmp_path: Path) -> None:
    def answer_all(indices: list[int], answer: Answer) -> None:
        answer(0, [1])
        raise RuntimeError("an engine died")

    with pytest.raises(RuntimeError, match="an engine died"):
        run_loadgen("performance", num_samples=7, target_qps=20, min_duration_s=1, folder=tmp_path, answer_all=answer_all)
    assert [thread.name for thread in threading.enumerate() if thread.name == "loadgen"] == []


def test_tokens_after_an_eos_and_wrong_counts_are_found() -> None:
    entries = [
        AccuracyEntry(index=0, token_ids=[5, 6, 2], token_count=3),
        AccuracyEntry(index=1, token_ids=[5, 2, 6], token_count=3),
        AccuracyEntry(index=2, token_ids=[5, 6], token_count=3),
        AccuracyEntry(index=3, token_ids=[2, 2], token_count=2),
    ]
    assert check_test06(entries, frozenset({2})) == {
        "eos_only_at_the_end": False,
        "token_counts_match": False,
        "samples": 4,
        "first_failing_samples": [1, 2, 3],
    }
    assert check_test06(entries[:1], frozenset({2})) == {"eos_only_at_the_end": True, "token_counts_match": True, "samples": 1}
