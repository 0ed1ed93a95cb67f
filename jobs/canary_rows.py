"""The rows that ran first, to look at: what is committed of them, from storage alone. For screens; a log gets the note without rows."""

from __future__ import annotations

from dataclasses import replace

from jobs.accept import load_job_of
from jobs.outputs import Committed
from jobs.outputs import committed
from jobs.outputs import shown_columns
from jobs.plan import canary_units
from pipeline import storage
from pipeline.commit import read_report
from schemas.manifest import Totals

_SPREAD = 5


def canary_of(output: str) -> Committed:
    """What is committed of it. Raises JobError where there is no job."""
    record, plan = load_job_of(storage.absolute(output))
    first, found = canary_units(plan, record.spec.canary), committed(output)
    return replace(found, units=tuple(unit for unit in found.units if unit.index in first))


def some_of(canary: Committed) -> list[dict[str, object]]:
    """The first bad rows of each kind, and a few from all over it: what was asked and what came."""
    columns, bad, rows = shown_columns(canary), _bad(canary), []
    for unit in canary.units:
        inside = [row - unit.position for row in bad if unit.holds(row)]
        if inside:
            found = canary.read(columns, [unit]).take(inside).to_pylist()
            rows += [{"row": unit.position + index, **row} for index, row in zip(inside, found, strict=True)]
    return rows + [row for row in canary.spread(_SPREAD, columns) if row["row"] not in bad]


def where(canary: Committed) -> str:
    """How many rows there are, one at least, and in which parts; no word of theirs."""
    first, *more = [unit.part_name(canary.record.fingerprint) for unit in canary.units]
    return f"canary: {canary.rows:,} rows are done, in {first}" + (f" and {len(more)} more" if more else "")


def _bad(canary: Committed) -> list[int]:
    """Positions of rows that its parts name as bad."""
    totals = Totals()
    for unit in canary.units:
        totals.add(read_report(storage.join(canary.out_uri, unit.part_name(canary.record.fingerprint))))
    return sorted({*(row for rows in totals.flagged.values() for row in rows), *(example["row"] for example in totals.examples)})
