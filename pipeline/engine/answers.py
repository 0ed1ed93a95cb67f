"""Answers: what greedy rows have come to, so that an identical row is copied rather than generated again.

Requests in, finished choices out, by a digest of all that decides a greedy answer. The replicas of one node share one file, which
lives as long as they do. It is a convenience: where it fails, rows are generated as if it were not there. Knows no engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from array import array
from dataclasses import asdict
from pathlib import Path

from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Request

_LIMIT_BYTES = 256 << 20
_LOOK_EVERY = 1024
"""Answers between two looks at the file's size."""
_PATIENCE_S = 0.2
"""For another replica that writes at this moment."""


def answer_key(request: Request) -> bytes | None:
    """The same for two rows if, and only if, one's answer is the other's; None where an answer is one row's alone.

    Engines decide by prompt and sampling; at temperature 0 nothing is drawn. Batches change a greedy answer no more than
    they would have changed it anyway.
    """
    if request.sampling.temperature > 0:
        return None
    digest = hashlib.blake2b(array("q", request.token_ids).tobytes(), digest_size=16)
    digest.update(request.sampling.model_dump_json().encode())
    return digest.digest()


class Answers:
    """Finished answers by key. Owned by one thread; the file may be shared with other processes."""

    def __init__(self, path: Path | None = None, *, limit_bytes: int = _LIMIT_BYTES) -> None:
        """At a path on a local disk, or in memory. Holds up to `limit_bytes`; the oldest go first."""
        self._limit_bytes, self._puts = limit_bytes, 0
        self._db: sqlite3.Connection | None = None
        with contextlib.suppress(sqlite3.Error):
            db = sqlite3.connect(path or ":memory:", timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")  # a file that a crash damages is not needed any more
            db.execute("CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB UNIQUE, choices TEXT)")
            self._db = db

    def get(self, key: bytes) -> tuple[GeneratedChoice, ...] | None:
        if self._db is None:
            return None
        try:
            row = self._db.execute("SELECT choices FROM answers WHERE key = ?", (key,)).fetchone()
            return None if row is None else tuple(GeneratedChoice(**choice) for choice in json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError):
            return None

    def put(self, key: bytes, choices: tuple[GeneratedChoice, ...]) -> None:
        if self._db is None:
            return
        text = json.dumps([asdict(choice) for choice in choices], separators=(",", ":"))
        with contextlib.suppress(sqlite3.Error):  # busy, or the disk is full
            self._db.execute("INSERT OR IGNORE INTO answers (key, choices) VALUES (?, ?)", (key, text))
            self._puts += 1
            if self._puts % _LOOK_EVERY == 0:
                self._make_room(self._db)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _make_room(self, db: sqlite3.Connection) -> None:
        (pages,), (free,), (page_bytes,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * page_bytes > self._limit_bytes:
            db.execute("DELETE FROM answers WHERE id <= (SELECT (MIN(id) + MAX(id)) / 2 FROM answers)")
