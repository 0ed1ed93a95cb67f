"""WorkUnit: rows that are generated, committed and counted together."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows [row_start, row_stop) of one input object."""

    uri: str
    identity: str
    """The object's etag, or size, mtime in ns and footer digest where the store has no etags."""
    row_start: int
    row_stop: int
    position: int
    """Of the range's first row in the whole input table, counted from 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.row_start <= self.row_stop:
            raise ValueError(f"rows [{self.row_start}, {self.row_stop}) of {self.uri} are no range")

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """Row ranges in input order, over one or several objects."""

    index: int
    ranges: tuple[RowRange, ...]
    reuse: str | None = None
    """Where, in the output, the index of answers of earlier outputs is; no part of the plan, but of what a run asks for."""
    wants_json: bool = False
    """Whether completions that are no JSON are counted; likewise."""

    @property
    def num_rows(self) -> int:
        return sum(rows.num_rows for rows in self.ranges)

    @property
    def position(self) -> int:
        """Of the unit's first row in the whole input table."""
        return self.ranges[0].position if self.ranges else 0

    def holds(self, position: object) -> bool:
        """Whether a row of the input table is one of this unit's."""
        return type(position) is int and self.position <= position < self.position + self.num_rows

    def part_name(self, fingerprint: str) -> str:
        """Sorted names are input order."""
        return part_name(self.index, fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what a run does not ask for is not in it, since the plan's digest is made of it."""
        data = asdict(self)
        if self.reuse is None:
            del data["reuse"]
        if not self.wants_json:
            del data["wants_json"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WorkUnit:
        ranges = tuple(RowRange(**rows) for rows in data["ranges"])
        return cls(index=data["index"], ranges=ranges, reuse=data.get("reuse"), wants_json=data.get("wants_json", False))


def part_name(unit: int, fingerprint: str) -> str:
    """Sorted names are input order."""
    return f"part-{unit:08d}-{fingerprint[:8]}.parquet"
