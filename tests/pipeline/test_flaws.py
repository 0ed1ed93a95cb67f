"""What is wrong with a text: the same again and again, or no JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.flaws import Flaws
from pipeline.flaws import is_json
from pipeline.flaws import is_repeated

PROSE = Path("README.md").read_text()


@pytest.mark.parametrize("text", ["The answer is 42. " * 60, "\n" * 400, "aha " * 200, "x" * 300, PROSE[:500] + " and so on" * 150])
def test_a_text_whose_end_goes_round_is_repeated(text: str) -> None:
    assert is_repeated(text)


@pytest.mark.parametrize("start", range(0, 20_000, 1000))
def test_prose_is_not(start: int) -> None:
    assert not is_repeated(PROSE[start : start + 1000])


@pytest.mark.parametrize("text", ["", "no no no", "a" * 199])
def test_a_short_text_is_not(text: str) -> None:
    assert not is_repeated(text)


def test_tables_and_lists_are_not() -> None:
    assert not is_repeated(json.dumps([{"name": f"row {row}", "value": row * 7919 % 1000} for row in range(40)]))
    assert not is_repeated("\n".join(f"{row}. question {row * 31 % 97}" for row in range(60)))


@pytest.mark.parametrize(
    ("text", "good"), [('{"a": 1}', True), (" [1, 2]\n", True), ("{'a': 1}", False), ('{"a": 1', False), ("", False), ("[" * 9999, False)]
)
def test_json_is_one_value(text: str, good: bool) -> None:
    assert is_json(text) is good


def test_flaws_are_counted_and_the_first_rows_kept() -> None:
    flaws = Flaws(wants_json=True)
    flaws.add(100, ["{}", "no", None, "x" * 300], ["stop", "length", "error", "length"])
    flaws.add(104, ["no"] * 5, ["stop"] * 5)
    assert flaws.counts == {"truncated": 2, "repeated": 1, "invalid_json": 7}
    assert flaws.flagged == {"truncated": [101, 103], "repeated": [103], "invalid_json": [101, 103, 104]}
    assert Flaws(wants_json=False).counts == {}
