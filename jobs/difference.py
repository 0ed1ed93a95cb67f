"""Where two answers to one row first differ, with a few words around it. Pure: values in, a value out; reads and starts nothing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from schemas.prompts import RowError

_WORDS = 6
"""Shown before and after the place."""
_SHOWN_CHARACTERS = 120
_OF_THE_ENGINE = ("rejected", "engine", "kills_engine")
"""Kinds of error that an engine gives a row: which of them depends on who watches the engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One choice of an answer."""

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] | None = None
    """None where the output did not keep them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a row came to."""

    prompt_tokens: int
    completion_tokens: int = 0
    choices: tuple[Text, ...] = ()
    error: RowError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first one. `recorded` and `now` are what stands there on either side."""

    what: Literal["error", "prompt_tokens", "completion_tokens", "choices", "token_ids", "text", "finish_reason"]
    recorded: str
    now: str
    choice: int = 0
    token: int | None = None
    """Of the completion, from 0; where the output kept no token ids, the token of what came now in which the texts part."""
    character: int | None = None
    """Of the completion, from 0."""


def first_difference(recorded: Answer, now: Answer, decode: Callable[[Sequence[int]], str]) -> Difference | None:
    """None where they are the same; `decode` gives token ids' text."""
    if recorded.error is not None or now.error is not None:
        if _same_error(recorded.error, now.error):
            return None
        return Difference(what="error", recorded=_outcome(recorded), now=_outcome(now))
    if recorded.prompt_tokens != now.prompt_tokens:
        return Difference(what="prompt_tokens", recorded=str(recorded.prompt_tokens), now=str(now.prompt_tokens))
    if len(recorded.choices) != len(now.choices):
        return Difference(what="choices", recorded=str(len(recorded.choices)), now=str(len(now.choices)))
    for number, (theirs, ours) in enumerate(zip(recorded.choices, now.choices, strict=True)):
        if found := _in_choice(number, theirs, ours, decode):
            return found
    if recorded.completion_tokens != now.completion_tokens:
        return Difference(what="completion_tokens", recorded=str(recorded.completion_tokens), now=str(now.completion_tokens))
    return None


def _same_error(recorded: RowError | None, now: RowError | None) -> bool:
    if recorded is None or now is None:
        return False
    return recorded.kind == now.kind or (recorded.kind in _OF_THE_ENGINE and now.kind in _OF_THE_ENGINE)


def _outcome(answer: Answer) -> str:
    if answer.error is not None:
        return f"{answer.error.kind}: {answer.error.message}"
    return f"a completion of {answer.completion_tokens} tokens: {_cut(answer.choices[0].text if answer.choices else '')}"


def _in_choice(number: int, theirs: Text, ours: Text, decode: Callable[[Sequence[int]], str]) -> Difference | None:
    ids = ours.token_ids or ()
    if theirs.token_ids is not None and theirs.token_ids != ids:
        token = parting(theirs.token_ids, ids)
        # Different tokens may spell the same: then there is a token that differs and no character.
        character = parting(theirs.text, ours.text) if theirs.text != ours.text else None
        if character is None:
            sides = (f"token ids {_ids(theirs.token_ids, token)}", f"token ids {_ids(ids, token)}")
        else:
            sides = (around(theirs.text, character), around(ours.text, character))
        return Difference(what="token_ids", choice=number, token=token, character=character, recorded=sides[0], now=sides[1])
    if theirs.text != ours.text:
        character = parting(theirs.text, ours.text)
        token = _token_at(ids, character, decode)
        sides = (around(theirs.text, character), around(ours.text, character))
        return Difference(what="text", choice=number, token=token, character=character, recorded=sides[0], now=sides[1])
    if theirs.finish_reason != ours.finish_reason:
        return Difference(what="finish_reason", choice=number, recorded=theirs.finish_reason, now=ours.finish_reason)
    return None


def parting(one: Sequence[object], other: Sequence[object]) -> int:
    """How long their common beginning is."""
    short = min(len(one), len(other))
    return next((index for index in range(short) if one[index] != other[index]), short)


def around(text: str, at: int) -> str:
    """A few words on either side of a character, which stands between » and «."""
    before, after = text[:at].split(" "), text[at:].split(" ")
    left = ("... " if len(before) > _WORDS else "") + " ".join(before[-_WORDS:])[-_SHOWN_CHARACTERS:]
    right = " ".join(after[:_WORDS])[:_SHOWN_CHARACTERS] + (" ..." if len(after) > _WORDS else "")
    return f"{left}»{right}«"


def _token_at(ids: Sequence[int], character: int, decode: Callable[[Sequence[int]], str]) -> int:
    """The token that holds a character; their number where the text ends before it."""
    return max(0, bisect_right(range(len(ids) + 1), character, key=lambda count: len(decode(ids[:count]))) - 1)


def _ids(ids: Sequence[int], at: int) -> str:
    return " ".join(map(str, ids[at : at + _WORDS])) or "(none: it ends here)"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
