"""Which rows to try next, and which are proven to kill engines, from what was in the engines that died. Pure: no I/O, no clock.

A row that was inside two engines when they died is a suspect. First everything else is finished; then the suspects run with nobody
else in the engine, and each time that it dies the smallest set that killed one is halved. A row that was alone in two dying
engines is guilty: once may have been the machine's fault. Of engines that somebody killed, as the system does where memory runs out,
it takes four. Rows that come through are innocent, whatever they were inside of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import dataclass

_SUSPECT_AFTER = 2
_GUILTY_FROM = 4
"""What the deaths that a row was alone in have to weigh together."""
_OWN_WEIGHT, _KILLED_WEIGHT = 2, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """One dead engine, as one unit sees it."""

    rows: frozenset[int]
    """Positions of the unit's rows that were inside."""
    others: int
    """Rows of other units that were inside with them."""
    how: str
    """What is known of the end, without a word of any prompt."""
    killed: bool = False
    """Whether its process got SIGKILL from somebody else than its supervisor. Any other end is the engine's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Rows to generate and save before anything else of their unit."""

    rows: frozenset[int]
    alone: bool
    """With no other unit's rows in the engine."""


def guilty(deaths: Sequence[Death]) -> dict[int, list[str]]:
    """Rows that are proven to kill engines, with how each of those that they were alone in ended."""
    alone: dict[int, list[Death]] = {}
    for death in deaths:
        if len(death.rows) == 1 and not death.others:
            (row,) = death.rows
            alone.setdefault(row, []).append(death)
    return {row: [death.how for death in ends] for row, ends in alone.items() if sum(map(_weight, ends)) >= _GUILTY_FROM}


def _weight(death: Death) -> int:
    """As evidence against the row that was alone in the engine."""
    return _KILLED_WEIGHT if death.killed else _OWN_WEIGHT


def next_trial(left: Collection[int], deaths: Sequence[Death]) -> Trial | None:
    """The rows to try next of those that are `left` (neither finished nor guilty), or None where there is nobody to suspect."""
    counted = Counter(row for death in deaths for row in death.rows)
    suspects = frozenset(row for row in left if counted[row] >= _SUSPECT_AFTER)
    if not suspects:
        return None
    calm = frozenset(left) - suspects
    if calm:
        return Trial(rows=calm, alone=False)
    deadly = [death.rows & suspects for death in deaths if not death.others and death.rows & suspects]
    if not deadly:
        return Trial(rows=suspects, alone=True)
    smallest = min(deadly, key=len)
    return Trial(rows=frozenset(sorted(smallest)[: max(1, len(smallest) // 2)]), alone=True)
