"""Where the scheduler is: a folder of numbered objects in any store, of which the highest counts. Holds addresses, never keys.

A scheduler publishes by creating the next number, which the store gives to one writer only; nothing is ever replaced or
removed. So a publisher that was slow, or whose acknowledgement was lost, can at worst leave a lower number behind, which
nobody reads any more, and a scheduler that finds a number above its own knows that it was replaced. (One object that is
rewritten would need a conditional replace, which not every store has.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from dataclasses import dataclass

from pipeline import storage
from schemas.errors import JobError

_NAME = re.compile(r"rendezvous-(\d{8})\.json")
_MAX_LOST_RACES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """One scheduler's entry."""

    number: int
    """The fencing number: a higher one replaces all below."""
    address: str
    made_at: float
    """Unix seconds, by the scheduler's clock; for people."""


def newest(names: Iterable[str]) -> int:
    """The highest number among object names, 0 where there is none; other objects do not matter."""
    return max((int(match.group(1)) for name in names if (match := _NAME.fullmatch(name))), default=0)


def name_of(number: int) -> str:
    return f"rendezvous-{number:08d}.json"


def publish(uri: str, address: str, *, now: float) -> Rendezvous:
    """Take the next number. Raises OSError, or JobError where the store cannot create once."""
    number = newest(storage.list_names(uri))
    for _ in range(_MAX_LOST_RACES):
        number += 1
        entry = Rendezvous(number=number, address=address, made_at=now)
        try:
            storage.create_once(storage.join(uri, name_of(number)), json.dumps(asdict(entry)).encode())
        except FileExistsError:
            continue  # somebody was quicker, or we were and did not hear it: either way the next number is right
        return entry
    raise OSError(f"{uri}: lost the race for {_MAX_LOST_RACES} numbers up to {number}; is something creating schedulers in a loop?")


def look_up(uri: str) -> Rendezvous | None:
    """The newest scheduler, or None where there has been none yet. Raises OSError, or JobError for an object that is not ours."""
    number = newest(storage.list_names(uri))
    if not number:
        return None
    where = storage.join(uri, name_of(number))
    try:
        entry = Rendezvous(**json.loads(storage.read_bytes(where)))
    except (ValueError, TypeError, RecursionError) as error:
        raise JobError(f"{where} is not a rendezvous of this version: {error}; remove it, or name another folder") from None
    if entry.number != number or not isinstance(entry.address, str):
        raise JobError(f"{where} says number {entry.number!r} and address {entry.address!r}; remove it, or name another folder")
    return entry


def successor(uri: str, mine: Rendezvous) -> Rendezvous | None:
    """The scheduler that replaced this one, if any. Raises as `look_up` does."""
    found = look_up(uri)
    return found if found is not None and found.number > mine.number else None
