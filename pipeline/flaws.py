"""What is wrong with a completion's text, told without a model: the same again and again, or no JSON. Pure."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

MAX_FLAGGED = 3
"""Rows kept for each flaw and unit."""
_LEAST_CHARACTERS = 200
_TAIL_CHARACTERS = 1000
_COMPRESSED_SHARE = 8
"""English and code compress to a third or a fourth at this length, one sentence over and over to a tenth and less."""


def is_repeated(text: str) -> bool:
    """Whether its end says the same again and again."""
    tail = text[-_TAIL_CHARACTERS:].encode()
    return len(text) >= _LEAST_CHARACTERS and len(zlib.compress(tail, 6)) * _COMPRESSED_SHARE < len(tail)


def is_json(text: str) -> bool:
    """Whether it is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(slots=True)
class Flaws:
    """Counts over rows, and the first rows of each kind. Grows."""

    wants_json: bool
    counts: Counter[str] = field(default_factory=Counter)
    flagged: dict[str, list[int]] = field(default_factory=dict)
    """Positions in the input table, by flaw."""

    def add(self, position: int, texts: Sequence[str | None], finish_reasons: Sequence[str]) -> None:
        """The next rows; a row without text is an error, and counted elsewhere."""
        for row, (text, reason) in enumerate(zip(texts, finish_reasons, strict=True), start=position):
            if text is None:
                continue
            if reason == "length":
                self._flag("truncated", row)
            if is_repeated(text):
                self._flag("repeated", row)
            if self.wants_json and not is_json(text):
                self._flag("invalid_json", row)

    def _flag(self, flaw: str, row: int) -> None:
        self.counts[flaw] += 1
        rows = self.flagged.setdefault(flaw, [])
        if len(rows) < MAX_FLAGGED:
            rows.append(row)
