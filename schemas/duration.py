"""A length of time as people write it: 90s, 10m, 8h, 2d."""

from __future__ import annotations

import re

from schemas.errors import JobError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str, field: str) -> float:
    """In seconds, above zero. Raises JobError naming the field."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text)
    seconds = float(match.group(1)) * _SECONDS[match.group(2) or "s"] if match else 0.0
    if seconds <= 0:
        raise JobError(f"{field}: found {text!r}, expected a length of time such as 90s, 10m, 8h or 2d")
    return seconds
