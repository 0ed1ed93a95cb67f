"""A request to drain what writes to an output: asked from any machine, heard by the run that it is meant for. Storage alone.

No two clocks are compared: a request counts for a run unless it lay there already when somebody asked for that run.
"""

from __future__ import annotations

import hashlib
import os
import time

from pipeline import storage
from schemas import layout

DRAIN_BEFORE = "TOKENMILL_DRAIN_BEFORE"
"""For a process that is started for one run: names the request that lay in its output when that run was asked for."""
ASKED_AT = "TOKENMILL_ASKED_AT"
"""Instead, where the process is started on the same machine: Unix seconds of the asking. Younger requests count."""
NO_DRAIN = "none"


def ask_to_drain(out_uri: str) -> None:
    """Whatever runs there, or was asked for and has not said so yet; what is asked for later does not heed it."""
    storage.replace(storage.join(storage.absolute(out_uri), layout.DRAIN), repr(time.time()).encode())


def drain_request(out_uri: str) -> str:
    """Names the request that lies there, whatever it says; NO_DRAIN where there is none. Raises OSError."""
    data = _read(out_uri)
    return NO_DRAIN if data is None else _name(data)


class DrainWatch:
    """Whether one run was asked to drain. What lies there at first was meant for an earlier one, unless the environment knows better."""

    def __init__(self, out_uri: str) -> None:
        self._out_uri = out_uri
        self._before = os.environ.get(DRAIN_BEFORE)
        self.asked()

    def asked(self) -> bool:
        """False also while the store does not answer: it is asked again in a moment."""
        try:
            data = _read(self._out_uri)
        except OSError:
            return False
        name = NO_DRAIN if data is None else _name(data)
        if self._before is None:
            self._before = NO_DRAIN if data is not None and _since_asked(data) else name
        return name not in (NO_DRAIN, self._before)


def _read(out_uri: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(out_uri, layout.DRAIN))
    except FileNotFoundError:
        return None


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _since_asked(data: bytes) -> bool:
    try:
        return float(data) >= float(os.environ[ASKED_AT])
    except (KeyError, ValueError):
        return False
