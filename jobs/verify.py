"""Prove an output: every input row there once, in order, with its columns, as committed. Compares content, not counts; streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.accept import list_parts
from jobs.accept import load_job_of
from pipeline import storage
from pipeline.commit import read_report
from pipeline.read import open_parquet
from pipeline.read import read_unit
from schemas import layout
from schemas.completions import ADDED
from schemas.completions import COMPLETION
from schemas.completions import ERROR
from schemas.completions import RowsDigest
from schemas.completions import output_schema
from schemas.errors import TokenmillError
from schemas.manifest import UnitReport
from schemas.record import JobRecord
from schemas.unit import WorkUnit

_BATCH_ROWS = 4096
_COMPLETION_COLUMN, _ERROR_COLUMN = ADDED.index(COMPLETION), ADDED.index(ERROR)  # of the added ones


@dataclass(slots=True)
class Verdict:
    """What was found. Complete only without problems."""

    rows_expected: int
    rows_proven: int = 0
    error_rows: int = 0
    units: int = 0
    problems: list[str] = field(default_factory=list)
    """Each names the object and the rows."""

    @property
    def complete(self) -> bool:
        return not self.problems and self.rows_proven == self.rows_expected


def verify(out_uri: str) -> Verdict:
    """Read inputs and parts side by side. Raises JobError where there is no job."""
    out_uri = storage.absolute(out_uri)
    record, plan = load_job_of(out_uri)
    verdict = Verdict(rows_expected=plan.num_rows, units=len(plan.units))
    if plan.digest != record.decides["plan"]:
        verdict.problems.append(f"{layout.PLAN} is not the plan that {layout.JOB} names; it was replaced or damaged")
        return verdict  # of which rows there should be, nothing is known
    manifest = _Manifest(out_uri) if _closed_by(out_uri) == record.fingerprint else None
    done, foreign = list_parts(out_uri, record.fingerprint)
    verdict.problems += foreign
    verdict.problems += [f"part of unit {index}, which the plan does not have" for index in sorted(set(done) - set(range(len(plan.units))))]
    for first, last in _runs([unit for unit in plan.units if unit.index not in done]):
        rows = f"rows {first.position} to {last.position + last.num_rows}"
        source = _source(first, last)
        verdict.problems.append(f"lost: {rows} ({source}; no part for units {first.index} to {last.index}); run the job again")
    for unit in plan.units:
        if unit.index in done:
            _verify_unit(unit, out_uri, record, manifest, verdict)
    if manifest is not None and manifest.damage is not None:
        verdict.problems.append(f"{layout.MANIFEST} cannot be read ({manifest.damage}); run the job again, which writes it anew")
    closed_by = _closed_by(out_uri)
    if not verdict.problems and closed_by != record.fingerprint:
        what = "missing" if closed_by is None else "another job's"
        verdict.problems.append(f"every row is there, but {layout.SUCCESS} is {what}; run the job again to close it")
    return verdict


def _closed_by(out_uri: str) -> str | None:
    """The fingerprint in _SUCCESS; empty where it has none, None where there is no such object."""
    try:
        said = json.loads(storage.read_bytes(storage.join(out_uri, layout.SUCCESS)))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""
    return str(said.get("fingerprint", "")) if isinstance(said, dict) else ""


def _runs(units: list[WorkUnit]) -> Iterator[tuple[WorkUnit, WorkUnit]]:
    """First and last of each run of neighbours."""
    first = 0
    for index, unit in enumerate(units):
        if index + 1 == len(units) or units[index + 1].index != unit.index + 1:
            yield units[first], unit
            first = index + 1


def _source(first: WorkUnit, last: WorkUnit) -> str:
    """Where the rows of a run of units come from."""
    if not first.ranges or not last.ranges:
        return "of no object"
    start, stop = first.ranges[0], last.ranges[-1]
    if start.uri == stop.uri:
        return f"rows {start.row_start} to {stop.row_stop} of {start.uri}"
    return f"row {start.row_start} of {start.uri} to row {stop.row_stop} of {stop.uri}"


class _Manifest:
    """What a closed job's manifest says of its parts, asked part by part in the order of units. Streams."""

    def __init__(self, out_uri: str) -> None:
        self._rows = _manifest_rows(out_uri)
        self._row: dict[str, Any] | None = {"unit": -1}
        self.damage: str | None = None
        """Why it could not be read to its end; no part is measured by it from there on."""

    def objection(self, report: UnitReport) -> str | None:
        """How a part is not the one that it names; or None."""
        if self.damage is not None:
            return None
        try:
            while self._row is not None and self._row["unit"] < report.unit:
                self._row = next(self._rows, None)
            if self._row is None or self._row["unit"] != report.unit:
                return f"{layout.MANIFEST} does not name it; run the job again, which writes that anew"
            for name, found in (("attempt", report.attempt), ("digest", report.digest)):
                if self._row[name] != found:
                    return (
                        f"changed: it has {name} {found}, and {layout.MANIFEST} names {self._row[name]}; put that part back, or run the "
                        "job again to take this one"
                    )
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            self.damage = f"{type(error).__name__}: {error}"
        return None


def _manifest_rows(out_uri: str) -> Iterator[dict[str, Any]]:
    with open_parquet(storage.join(out_uri, layout.MANIFEST)) as manifest:
        for batch in manifest.iter_batches(batch_size=_BATCH_ROWS, columns=["unit", "attempt", "digest"]):
            yield from batch.to_pylist()


def _verify_unit(unit: WorkUnit, out_uri: str, record: JobRecord, manifest: _Manifest | None, verdict: Verdict) -> None:
    name = unit.part_name(record.fingerprint)
    rows = f"rows {unit.position} to {unit.position + unit.num_rows}"
    uri = storage.join(out_uri, name)
    try:
        report = read_report(uri)
        if (report.unit, report.fingerprint) != (unit.index, record.fingerprint):
            verdict.problems.append(f"foreign: {name} ({rows}) says it is unit {report.unit} of job {report.fingerprint[:8]}")
            return
        problem = _compare(unit, uri, record, report.digest)
        if problem is None and manifest is not None:
            problem = manifest.objection(report)
    except (pa.ArrowException, OSError, TokenmillError) as error:
        problem = str(error)
    if problem is None:
        verdict.rows_proven += unit.num_rows
        verdict.error_rows += report.error_rows
    else:
        verdict.problems.append(f"{name} ({rows}): {problem}")


def _compare(unit: WorkUnit, uri: str, record: JobRecord, digest: str) -> str | None:
    """The first difference between a part and its input rows, or what was committed; or None."""
    expected_schema = output_schema(record.input_schema, record.spec)
    names = record.input_schema.names
    found_digest = RowsDigest()
    with open_parquet(uri) as part:
        if not part.schema_arrow.equals(expected_schema):
            return f"its columns are {part.schema_arrow.names}, expected {expected_schema.names} in the plan's types"
        if part.metadata.num_rows != unit.num_rows:
            kind = "doubled" if part.metadata.num_rows > unit.num_rows else "lost"
            return f"{kind} rows: it has {part.metadata.num_rows}, the plan {unit.num_rows}"
        written = _Rows(part.iter_batches(batch_size=_BATCH_ROWS))
        for position, batch in read_unit(unit, record.input_schema, _BATCH_ROWS):
            found = written.take(batch.num_rows)
            if found is None:
                return f"lost rows from {position} on"
            for number, name in enumerate(names):
                theirs, ours = found.column(number).combine_chunks(), pa.chunked_array([batch.column(number)]).combine_chunks()
                if not _same(ours, theirs):
                    row = next(index for index in range(batch.num_rows) if not _same(ours.slice(index, 1), theirs.slice(index, 1)))
                    return f"changed: column {name!r} of row {position + row} is not the input's"
            found_digest.update(found.columns[len(names) :])
            answered = found.column(len(names) + _COMPLETION_COLUMN).is_valid().to_pylist()
            failed = found.column(len(names) + _ERROR_COLUMN).is_valid().to_pylist()
            for row, (has_completion, has_error) in enumerate(zip(answered, failed, strict=True)):
                if has_completion == has_error:
                    return (
                        f"row {position + row} has {'both a completion and an error' if has_error else 'neither a completion nor an error'}"
                    )
    if not digest:
        return "its footer has no digest of its completions, which every released version writes; remove it, and run the job again"
    if found_digest.hexdigest() != digest:
        return "changed: its completions are not those that were committed"
    return None


def _same(ours: Any, theirs: Any) -> bool:
    """Equal values, NaN being equal to itself, which Arrow does not say of it; and whatever the chunks' dictionaries are."""
    if ours.equals(theirs):
        return True
    kind = ours.type
    if kind != theirs.type or len(ours) != len(theirs) or not ours.is_valid().equals(theirs.is_valid()):
        return False
    if pa.types.is_dictionary(kind):
        return _same(ours.dictionary_decode(), theirs.dictionary_decode())
    if pa.types.is_floating(kind):
        mine, other = pc.is_nan(ours), pc.is_nan(theirs)
        return bool(mine.equals(other) and ours.filter(pc.invert(mine)).equals(theirs.filter(pc.invert(other))))
    if pa.types.is_struct(kind):
        return all(_same(mine, other) for mine, other in zip(ours.flatten(), theirs.flatten(), strict=True))
    if pa.types.is_map(kind):
        return repr(ours.to_pylist()) == repr(theirs.to_pylist())
    if hasattr(ours, "flatten"):  # lists of every kind
        return bool(pc.list_value_length(ours).equals(pc.list_value_length(theirs))) and _same(ours.flatten(), theirs.flatten())
    return False


class _Rows:
    """Re-cuts a stream of batches to the sizes asked for."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._held, self._num_held = batches, list[pa.RecordBatch](), 0

    def take(self, num_rows: int) -> pa.Table | None:
        while self._num_held < num_rows:
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._held.append(batch)
            self._num_held += batch.num_rows
        table = pa.Table.from_batches(self._held)
        self._held = table.slice(num_rows).to_batches()
        self._num_held -= num_rows
        return table.slice(0, num_rows)
