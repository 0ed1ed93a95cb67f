"""Clock: where a thread's time goes, by kind; the feed hears of it. Knows no unit and no engine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.feed import Feed


class Clock:
    """Seconds by kind, as this unit's thread spends them."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kind: str | None = None
        self._since = time.monotonic()

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Time inside counts for `kind`, and not for what surrounds it."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, kind: str | None) -> str | None:
        now = time.monotonic()
        if self._kind is not None:
            self.seconds[self._kind] += now - self._since
        self._feed.move(self._kind, kind, now)
        previous, self._kind, self._since = self._kind, kind, now
        return previous
