"""Spread: min, max, mean, median and sum over replicas, as Azure's table of its virtual machines has them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

STATISTICS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "mean": statistics.mean,
    "median": statistics.median,
    "sum": sum,
}
_DIGITS = 3


def spread(columns: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Of each column that has values, every statistic."""
    return {
        column: {name: round(reduce(values), _DIGITS) for name, reduce in STATISTICS.items()}
        for column, values in columns.items()
        if values
    }
