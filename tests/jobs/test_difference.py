"""Where two answers first differ: tokens, characters, the words around them, and what counts as the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.difference import Answer
from jobs.difference import Difference
from jobs.difference import Text
from jobs.difference import around
from jobs.difference import first_difference
from schemas.prompts import RowError

_WORDS = ("The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog", " and", " sleeps", " cat")


def decode(ids: Sequence[int]) -> str:
    return "".join(_WORDS[token] for token in ids)


def answer(*ids: int, kept: bool = True, **values: Any) -> Answer:
    choice = Text(text=decode(ids), finish_reason="stop", token_ids=ids if kept else None)
    return Answer(**{"prompt_tokens": 5, "completion_tokens": len(ids), "choices": (choice,), **values})


def test_equal_answers_have_no_difference() -> None:
    assert first_difference(answer(0, 1, 2), answer(0, 1, 2), decode) is None
    assert first_difference(answer(0, 1, 2, kept=False), answer(0, 1, 2), decode) is None


def test_the_first_token_that_differs_is_named_with_words_from_both_sides() -> None:
    recorded, now = answer(*range(9)), answer(0, 1, 2, 11, *range(4, 9))
    assert first_difference(recorded, now, decode) == Difference(
        what="token_ids",
        token=3,
        character=len("The quick brown "),
        recorded="The quick brown »fox jumps over the lazy dog«",
        now="The quick brown »cat jumps over the lazy dog«",
    )


def test_without_recorded_token_ids_the_token_is_found_by_its_text() -> None:
    found = first_difference(answer(*range(9), kept=False), answer(0, 1, 2, 11, *range(4, 9)), decode)
    assert found is not None
    assert (found.what, found.token, found.character) == ("text", 3, len("The quick brown "))


def test_an_answer_that_ends_early_differs_where_it_ends() -> None:
    found = first_difference(answer(0, 1, 2, 3), answer(0, 1), decode)
    assert found is not None
    assert (found.token, found.now) == (2, "The quick»«")


def test_other_tokens_with_the_same_text_have_no_character() -> None:
    recorded = Answer(prompt_tokens=1, completion_tokens=2, choices=(Text(text="ab", finish_reason="stop", token_ids=(1, 2)),))
    now = Answer(prompt_tokens=1, completion_tokens=2, choices=(Text(text="ab", finish_reason="stop", token_ids=(1, 3)),))
    found = first_difference(recorded, now, decode)
    assert found == Difference(what="token_ids", token=1, recorded="token ids 2", now="token ids 3")


def test_an_error_is_the_same_when_its_kind_is() -> None:
    def error(kind: str) -> Answer:
        return Answer(prompt_tokens=5, error=RowError(kind=kind, message="so it is"))

    assert first_difference(error("empty_prompt"), error("empty_prompt"), decode) is None
    assert first_difference(error("rejected"), error("engine"), decode) is None  # by the engine, either way
    assert first_difference(error("empty_prompt"), error("prompt_too_long"), decode) is not None
    found = first_difference(error("kills_engine"), answer(0, 1), decode)
    assert found == Difference(what="error", recorded="kills_engine: so it is", now="a completion of 2 tokens: The quick")


def test_another_choice_or_prompt_is_named() -> None:
    one, other = (Text(text=text, finish_reason="stop") for text in ("a", "b"))
    recorded = Answer(prompt_tokens=5, completion_tokens=2, choices=(one, one))
    found = first_difference(recorded, Answer(prompt_tokens=5, completion_tokens=2, choices=(one, other)), lambda ids: "")
    assert found is not None
    assert (found.what, found.choice, found.character) == ("text", 1, 0)
    found = first_difference(answer(0), answer(0, prompt_tokens=6), decode)
    assert found == Difference(what="prompt_tokens", recorded="5", now="6")


def test_only_a_few_words_are_shown() -> None:
    text = " ".join(f"w{number}" for number in range(40))
    assert around(text, text.index("w20")) == "... w15 w16 w17 w18 w19 »w20 w21 w22 w23 w24 w25 ...«"
