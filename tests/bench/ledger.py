"""What the engine ledger costs: one step of the engine's thread, with and without it, and one reading.

.venv/bin/python -m tests.bench.ledger
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable

from pipeline.engine.ledger import Ledger
from pipeline.feed import Feed

_ROWS = 256
_NUMBER = 200_000


def main() -> None:
    """Print nanoseconds, the best of five."""
    feed = Feed()
    book = Ledger(engine="e", batch_rows=_ROWS, spawned_at=0.0, now=time.monotonic(), blocked_s=feed.blocked_s)
    book.advance(time.monotonic(), _ROWS, lambda: 0)

    def best(call: Callable[[], object], number: int = _NUMBER) -> float:
        return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e9

    clock = best(time.monotonic)
    step = best(lambda: book.advance(time.monotonic(), _ROWS, int))

    def toggle() -> None:
        book.admit(time.monotonic())
        book.advance(time.monotonic(), _ROWS, int)
        book.advance(time.monotonic(), 0, int)

    print(f"reading the clock                                  {clock:8.0f} ns")
    print(f"a step with the batch as full as before            {step:8.0f} ns, one clock reading included")
    print(f"a batch that fills and empties (a row comes, goes) {best(toggle, _NUMBER // 10):8.0f} ns, three clock readings included")
    print(f"a row answered                                     {best(lambda: book.finish(10, 100)):8.0f} ns")
    print(f"a unit's thread turns from reading to rendering    {best(lambda: feed.move('read', 'render', 0.0)):8.0f} ns")
    reading = best(lambda: book.read(time.monotonic(), kept_tokens=0), _NUMBER // 10)
    print(f"a reading, for a heartbeat or a unit's result      {reading:8.0f} ns")


if __name__ == "__main__":
    main()
