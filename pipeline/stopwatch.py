"""How long a call takes: called again and again for a while, the median counts. Knows no torch: who has a GPU says how to wait for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

_BLOCK_S = 0.005
"""Calls are timed in blocks at least so long, so that neither the clock nor waiting for a GPU shows."""
_MAX_BLOCKS = 30
_GRACE = 0.5


def median_seconds(
    call: Callable[[], object],
    *,
    budget_s: float,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one call. At least two are made, the first of which does not count; `budget_s` may be passed by one block.

    `wait` returns when everything that was called is done.
    """
    end = clock() + budget_s
    call()
    wait()
    began = clock()
    call()
    wait()
    blocks = [clock() - began]
    calls = max(1, round(_BLOCK_S / max(blocks[0], 1e-9)))
    if calls > 1:  # one call alone was too short to be told from the clock
        blocks = []
    while not blocks or (clock() < end and len(blocks) < _MAX_BLOCKS):
        began = clock()
        for _ in range(calls):
            call()
        wait()
        blocks.append((clock() - began) / calls)
    return statistics.median(blocks)


class Slices:
    """Shares out a budget of seconds among things to measure; what one of them leaves, the others get.

    Half the budget may be passed, for what is only called twice: on a busy machine little would be measured otherwise.
    """

    def __init__(self, budget_s: float, num_items: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._end, self._left = clock, clock() + budget_s, num_items
        self._grace_s = _GRACE * budget_s

    def next(self) -> float | None:
        """Seconds for the next one, at least 0; None where the time is over."""
        left_s, items = self._end - self._clock(), max(1, self._left)
        self._left -= 1
        return None if left_s <= -self._grace_s else max(0.0, left_s / items)
