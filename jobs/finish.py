"""Close a job: check every part, write the manifest, and only then _SUCCESS."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.accept import Accepted
from jobs.accept import committed_units
from jobs.plan import Plan
from pipeline import storage
from pipeline.commit import read_report
from schemas import layout
from schemas.errors import ForeignOutput
from schemas.errors import UnitError
from schemas.manifest import UnitReport
from schemas.manifest import manifest_table
from schemas.record import JobRecord

_THREADS = 16


def read_reports(accepted: Accepted) -> Iterator[tuple[UnitReport, str, int]]:
    """Every committed part's report, name and size in bytes, by unit. Raises ForeignOutput where a part is not what its name says."""
    sizes = committed_units(accepted.out_uri, accepted.record.fingerprint)
    yield from part_reports(accepted.out_uri, accepted.record, accepted.plan, sizes)


def part_reports(out_uri: str, record: JobRecord, plan: Plan, sizes: Mapping[int, int]) -> Iterator[tuple[UnitReport, str, int]]:
    """The same of these parts, given by unit with their sizes."""
    units = {unit.index: unit for unit in plan.units}
    fingerprint = record.fingerprint  # a digest over the whole record, each time it is asked for

    def read(index: int) -> tuple[UnitReport, str, int]:
        name = units[index].part_name(fingerprint)
        report = read_report(storage.join(out_uri, name))
        expected = (index, fingerprint, units[index].num_rows)
        if (report.unit, report.fingerprint, report.rows) != expected:
            raise ForeignOutput(
                f"{name} says unit {report.unit} of job {report.fingerprint[:8]} with {report.rows} rows; the plan has unit {index} "
                f"of {fingerprint[:8]} with {units[index].num_rows}; remove it and run the job again"
            )
        return report, name, sizes[index]

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(read, sorted(set(sizes) & set(units)))


def finish(accepted: Accepted) -> list[UnitReport]:
    """Every unit's report. Raises UnitError where a unit has no part, ForeignOutput where a part is not what its name says."""
    parts = list(read_reports(accepted))
    missing = sorted({unit.index for unit in accepted.plan.units} - {report.unit for report, _, _ in parts})
    if missing:
        raise UnitError(f"{len(missing)} units have no part, the first is unit {missing[0]}; run the job again")
    metadata = {
        b"tokenmill.fingerprint": accepted.record.fingerprint.encode(),
        b"tokenmill.decides": json.dumps(accepted.record.decides).encode(),
        b"tokenmill.version": accepted.record.tool_version.encode(),
        b"tokenmill.commit": storage.check_can_create(accepted.out_uri).encode(),
    }
    table = manifest_table(parts, metadata)
    storage.sweep_temporaries(accepted.out_uri)
    _write_manifest(storage.join(accepted.out_uri, layout.MANIFEST), table)
    success = json.dumps({"fingerprint": accepted.record.fingerprint, "units": len(parts), "rows": accepted.plan.num_rows})
    _write_success(storage.join(accepted.out_uri, layout.SUCCESS), success.encode())
    return [report for report, _, _ in parts]


def _write_success(uri: str, data: bytes) -> None:
    """Created once; replaced only where it was damaged since, for every part has been checked."""
    try:
        storage.create_once(uri, data)
    except FileExistsError:
        if storage.read_bytes(uri) != data:
            storage.replace(uri, data)


def _write_manifest(uri: str, table: pa.Table) -> None:
    """Created once; replaced only where a part was lost and made again since, for the parts are the truth."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    try:
        storage.create_once(uri, buffer.getvalue())
    except FileExistsError:
        if not _holds(storage.read_bytes(uri), table):
            storage.replace(uri, buffer.getvalue())


def _holds(data: bytes, table: pa.Table) -> bool:
    """Whether these bytes are that table; what cannot be read is not."""
    try:
        return bool(pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False).equals(table))
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return False
