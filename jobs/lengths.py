"""How long a table's prompts are and how long its completions will be, each with where it is known from. Starts no engine."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.outputs import committed
from jobs.sample import evenly
from schemas.completions import COMPLETION_TOKENS
from schemas.errors import JobError

SAMPLE_ROWS = 512
_INTERVAL = 0.8
_Z = statistics.NormalDist().inv_cdf((1 + _INTERVAL) / 2)
_DRAWS = 400
_MOST_PARTS = 16
_UNKNOWN_LOW, _UNKNOWN_MEAN = 0.25, 0.75
"""Of max_tokens, where nothing is known of completions: stated, not measured. The top of the interval is max_tokens itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean of rows, and where it lies four times in five."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Mean:
        return Mean(value=self.value * factor, low=self.low * factor, high=self.high * factor)


NO_ROWS = Mean(value=0.0, low=0.0, high=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Of one row that is generated, in tokens, and how many those are."""

    rows: int
    """Of the table, those that are not committed yet."""
    reused: Mean = NO_ROWS
    """Of those, rows that are copied from earlier outputs, and not generated."""
    unasked: Mean = NO_ROWS
    """Of those, rows that cannot be asked, and become error rows."""
    sampled: int
    """Rows that were read and tokenised, without those that cannot be asked."""
    prompt: Mean
    output: Mean
    basis: Literal["max_tokens", "history", "canary"]
    """Where the output's comes from."""

    @property
    def generated(self) -> Mean:
        """Rows that are left to engines: one at least, since a sample that is answered whole proves not that all are."""
        left, reused, unasked = float(self.rows), self.reused, self.unasked
        return Mean(
            value=max(1.0, left - reused.value - unasked.value),
            low=max(1.0, left - reused.high - unasked.high),
            high=max(1.0, left - reused.low - unasked.low),
        )


def mean_of(values: Sequence[float], *, seed: int = 0) -> Mean:
    """Of a sample, with the middle 80 % of what 400 bootstrap draws of it give. Raises ValueError where there is none."""
    if not values:
        raise ValueError("no rows")
    chance = random.Random(seed)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(_DRAWS))
    cut = round(_DRAWS * (1 - _INTERVAL) / 2)
    return Mean(value=statistics.fmean(values), low=means[cut], high=means[-1 - cut])


def share_of(count: int, sampled: int) -> Mean:
    """Of a table, of which so many of the sampled rows are; Wilson's interval, which is one at 0 and 1 too."""
    center = (count + _Z**2 / 2) / (sampled + _Z**2)
    half = _Z / (sampled + _Z**2) * math.sqrt(count * (sampled - count) / sampled + _Z**2 / 4)
    return Mean(value=count / sampled, low=max(0.0, center - half), high=min(1.0, center + half))


def unknown_output(most: Mean) -> Mean:
    """Where nobody has seen a completion, given how long completions may become."""
    return Mean(value=_UNKNOWN_MEAN * most.value, low=_UNKNOWN_LOW * most.low, high=most.high)


def earlier_outputs(output: str) -> list[int]:
    """Completion lengths of an earlier output's committed rows, from up to 16 of its parts. Raises JobError where it has none."""
    found = committed(output)
    parts = evenly(found.units, _MOST_PARTS)
    lengths = [length for length in found.read([found.added + COMPLETION_TOKENS], parts).column(0).to_pylist() if length]
    if not lengths:
        raise JobError(f"--history {output}: no completion is committed there yet")
    return lengths
