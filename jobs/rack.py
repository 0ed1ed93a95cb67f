"""The record's rack in numbers: how fast its nodes are, how long its rows become, how much slower this machine must go. Pure.

Source, unless said otherwise: Azure HPC blog, 3 Nov 2025, "Breaking the Million-Token Barrier" (ND GB300 v6, one NVL72 rack,
Llama 2 70B in FP4, MLPerf Inference v5.1 Offline, unverified).
"""

from __future__ import annotations

import math

RECORD_TOKENS_PER_S = 1_100_948.3
"""Output tokens, 18 nodes of 4 GPUs together."""
NODE_ENGINES = 4
ENGINE_TOKENS_PER_S = RECORD_TOKENS_PER_S / 18 / NODE_ENGINES
"""15,291."""
_MIN, _MEAN, _MEDIAN, _MAX = 57_599.1, 61_163.8, 61_759.1, 62_803.9
"""Tokens/s of one node, over the 18."""
MEAN_TOKENS = 294.45
"""Output tokens a row in MLPerf's Llama 2 70B (OpenOrca, at most 1,024): mlcommons/inference, reference accuracy log."""
_MACHINE_S_PER_ROW = 1.9e-3
"""CPU of a worker and its simulated engine for one such row, as this command measures it on the project's x86 machine."""
_CARRIED_SHARE = 0.6
"""Of this machine's cores that workers may need, so that what happens in a node still happens at once."""


def node_speeds(num_nodes: int) -> list[float]:
    """Tokens/s of each node, slowest first, with the min, mean, median and max of Azure's 18.

    Evenly spaced points of a curve from min over median to max, straight above the median and bent below it so that the mean is right.
    One node has the mean; of two or three it cannot be met.
    """
    if num_nodes == 1:
        return [_MEAN]
    low, high = 0.01, 100.0
    for _ in range(60):
        bend = (low + high) / 2
        if sum(_curve(num_nodes, bend)) / num_nodes < _MEAN:
            low = bend
        else:
            high = bend
    return _curve(num_nodes, (low + high) / 2)


def _curve(num_nodes: int, bend: float) -> list[float]:
    # The two points around an even number's middle must have the median between them, so the curve is flat from one to the other.
    middle = (num_nodes - 1) / 2
    below, above = math.floor(middle), math.ceil(middle)
    speeds = []
    for index in range(num_nodes):
        if index < below:
            speeds.append(_MEDIAN - (_MEDIAN - _MIN) * ((below - index) / below) ** bend)
        elif index > above:
            speeds.append(_MEDIAN + (_MAX - _MEDIAN) * (index - above) / (num_nodes - 1 - above))
        else:
            speeds.append(_MEDIAN if num_nodes > 2 else (_MIN, _MAX)[index])
    return speeds


def length_scale(max_tokens: int) -> float:
    """The mean that lengths would have without the cut at `max_tokens`, so that with it they have MEAN_TOKENS, or half the cut.

    Lengths fall off exponentially: min(max_tokens, scale * -ln(u)) has the mean scale * (1 - exp(-max_tokens / scale)).
    """
    wanted = min(MEAN_TOKENS, max_tokens / 2)
    low, high = wanted, 100.0 * max_tokens
    for _ in range(100):
        scale = (low + high) / 2
        if scale * (1 - math.exp(-max_tokens / scale)) < wanted:
            low = scale
        else:
            high = scale
    return (low + high) / 2


def length_of(number: int, scale: float, max_tokens: int) -> int:
    """A row's output tokens, out of 32 bits that are spread evenly."""
    return max(1, min(max_tokens, round(scale * -math.log((number + 0.5) / 2**32))))


def slow_down_for(num_nodes: int, cores: int) -> float:
    """How many times slower this machine must run so many nodes."""
    rows_per_s = num_nodes * _MEAN / MEAN_TOKENS
    return float(max(1, math.ceil(rows_per_s * _MACHINE_S_PER_ROW / (_CARRIED_SHARE * cores))))


def rows_for(num_engines: int) -> int:
    """A table that fills every engine three times, its batch of 1,024 and as many rows that wait: two of them are a steady state."""
    return 3 * 2 * 1024 * num_engines
