"""Feed: what the threads around one engine do that its ledger has to know. Knows kinds of work, neither units nor rows."""

from __future__ import annotations

import threading
import time

_READING = frozenset({"read", "render"})
_WRITING = frozenset({"decode", "write", "commit"})


class Feed:
    """Shared by an engine and the units that feed it. Called a few times for each batch of rows, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading = self._writing = 0
        self._since, self._blocked_s = time.monotonic(), 0.0
        self._kept_tokens = 0

    def move(self, before: str | None, after: str | None, now: float) -> None:
        """A unit's thread turns from one kind of work to another."""
        with self._lock:
            self._blocked_s, self._since = self._blocked_at(now), max(self._since, now)
            self._reading += (after in _READING) - (before in _READING)
            self._writing += (after in _WRITING) - (before in _WRITING)

    def blocked_s(self, now: float) -> float:
        """Seconds until now in which some unit wrote or committed and none read or rendered. Monotonic seconds."""
        with self._lock:
            return self._blocked_at(now)

    def keep(self, num_tokens: int) -> None:
        """So many of the engine's tokens are in storage, committed or saved for a later attempt."""
        with self._lock:
            self._kept_tokens += num_tokens

    @property
    def kept_tokens(self) -> int:
        return self._kept_tokens

    def _blocked_at(self, now: float) -> float:
        return self._blocked_s + (max(0.0, now - self._since) if self._writing and not self._reading else 0.0)
