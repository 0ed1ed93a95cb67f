"""Clock: where a thread's time goes, by kind. Knows no unit and no engine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by kind, as this unit's thread spends them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._kind: str | None = None
        self._since = time.perf_counter()

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Time inside counts for `kind`, and not for what surrounds it."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, kind: str | None) -> str | None:
        now = time.perf_counter()
        if self._kind is not None:
            self.seconds[self._kind] += now - self._since
        previous, self._kind, self._since = self._kind, kind, now
        return previous
