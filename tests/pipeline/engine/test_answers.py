"""Answers: the same row gives the same key, an answer comes back as it was, and a file that fails is only missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.answers import Answers
from pipeline.engine.answers import answer_key
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Request
from schemas.sampling import Sampling


def request(position: int = 0, token_ids: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Request:
    return Request(position=position, token_ids=list(token_ids), sampling=Sampling(**sampling))


def choices(*token_ids: int) -> tuple[GeneratedChoice, ...]:
    return (GeneratedChoice(token_ids=list(token_ids), finish_reason="stop", text="é", logprobs=[{"token_id": 1, "logprob": -0.5}]),)


def test_where_a_row_lies_does_not_matter_and_what_it_asks_does() -> None:
    key = answer_key(request(0, max_tokens=8))
    assert key is not None
    assert key == answer_key(request(7, max_tokens=8))
    others = [request(0, (1, 2, 4), max_tokens=8), request(0, max_tokens=9), request(0, max_tokens=8, stop=["x"])]
    assert key not in [answer_key(other) for other in others]


def test_rows_that_are_drawn_have_answers_of_their_own() -> None:
    assert answer_key(request(temperature=0.5)) is None


def test_an_answer_comes_back_as_it_was_also_to_another_replica(tmp_path: Path) -> None:
    one, other = Answers(tmp_path / "answers.db"), Answers(tmp_path / "answers.db")
    assert other.get(b"key") is None
    one.put(b"key", choices(4, 5))
    assert other.get(b"key") == choices(4, 5)
    other.put(b"key", choices(6))
    assert one.get(b"key") == choices(4, 5)  # the first stays
    one.close()
    assert one.get(b"key") is None
    assert other.get(b"key") == choices(4, 5)
    other.close()


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.answers._LOOK_EVERY", 10)
    answers = Answers(tmp_path / "answers.db", limit_bytes=100_000)
    for number in range(2000):
        answers.put(number.to_bytes(16, "big"), choices(*range(20)))
    assert answers.get((1999).to_bytes(16, "big")) == choices(*range(20))
    assert answers.get((0).to_bytes(16, "big")) is None
    assert (tmp_path / "answers.db").stat().st_size < 200_000
    answers.close()


def test_where_there_can_be_no_file_nothing_is_known_and_nothing_fails(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "no-folder" / "answers.db")
    answers.put(b"key", choices(1))
    assert answers.get(b"key") is None
    answers.close()


def test_a_damaged_file_is_only_missed(tmp_path: Path) -> None:
    (tmp_path / "answers.db").write_bytes(b"no database" * 1000)
    answers = Answers(tmp_path / "answers.db")
    answers.put(b"key", choices(1))
    assert answers.get(b"key") is None
    answers.close()
