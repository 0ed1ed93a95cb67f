"""Evidence: all that storage knows of a job, read for its report. Reads footers and three columns; never a prompt or a completion."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.accept import committed_units
from jobs.accept import load_job_of
from jobs.finish import part_reports
from jobs.plan import Plan
from jobs.report import Report
from jobs.report import report
from jobs.status import Status
from jobs.status import read_status
from pipeline import storage
from pipeline.read import open_parquet
from schemas import layout
from schemas.completions import COMPLETION_TOKENS
from schemas.completions import FINISH_ERROR
from schemas.completions import FINISH_REASON
from schemas.completions import PROMPT_TOKENS
from schemas.manifest import UnitReport
from schemas.record import JobRecord

MAX_SAMPLED_PARTS = 200
"""Whose lengths are read; each is a request or three where the store is remote."""
_THREADS = 16
_JSON = frozenset(field.name for field in fields(UnitReport) if field.default_factory in (dict, list))
"""Fields that the manifest holds as JSON text."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of rows that have a completion, out of some parts."""

    prompt: Counts
    completion: Counts
    num_parts: int
    of_parts: int
    """Committed ones; the lengths are a sample where these are more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a report is made of."""

    account: Report
    status: Status
    record: JobRecord
    num_objects: int
    skipped: tuple[tuple[str, str], ...]
    units: tuple[UnitReport, ...]
    """Committed, in the order of the plan."""
    size_bytes: int
    """Of their parts."""
    lengths: Lengths
    read_at: float
    """Unix seconds."""
    usd_per_hour: Mapping[str, float | None]
    """What a node costs, by run."""


def gather(out_uri: str, *, account: Report | None = None, now: float | None = None, usd_per_hour: float | None = None) -> Evidence:
    """Read it; the account, where nobody has read it before. The price of a node, where it is given, is that of every run.

    Raises JobError where there is no job or no account of a run; ForeignOutput where a part is not what its name says.
    """
    out_uri = storage.absolute(out_uri)
    account = account or report(out_uri)
    record, plan = load_job_of(out_uri)
    fingerprint = record.fingerprint  # a digest over the whole record, each time it is asked for
    sizes = {unit: size for unit, size in committed_units(out_uri, fingerprint).items() if unit < len(plan.units)}
    names = [plan.units[unit].part_name(fingerprint) for unit in sorted(sizes)]
    units = _from_manifest(out_uri, fingerprint, sizes)
    if units is None:
        units = [unit for unit, _, _ in part_reports(out_uri, record, plan, sizes)]
    limits = record.spec.limits
    return Evidence(
        account=account,
        status=read_status(out_uri, now=now),
        record=record,
        num_objects=_num_objects(plan),
        skipped=plan.skipped,
        units=tuple(units),
        size_bytes=sum(sizes.values()),
        lengths=read_lengths(out_uri, names, prefix=record.spec.output.prefix),
        read_at=now or time.time(),
        usd_per_hour={run.run: usd_per_hour or run.usd_per_hour or limits.usd_per_hour for run in account.runs},
    )


def _num_objects(plan: Plan) -> int:
    return len(plan.objects.keys() - {""})


def _from_manifest(out_uri: str, fingerprint: str, sizes: Mapping[int, int]) -> list[UnitReport] | None:
    """Every unit's report in one read, where the manifest is of exactly the parts that are there."""
    try:
        data = storage.read_bytes(storage.join(out_uri, layout.MANIFEST))
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        if (table.schema.metadata or {}).get(b"tokenmill.fingerprint") != fingerprint.encode():
            return None
        rows = table.to_pylist()
        if {row["unit"]: row["size_bytes"] for row in rows} != sizes:
            return None
        made = []
        for row in rows:
            values = {key: json.loads(value) if key in _JSON else value for key, value in row.items() if key not in ("part", "size_bytes")}
            made.append(UnitReport(fingerprint=fingerprint, **values))
        return made
    except FileNotFoundError:
        return None
    except (pa.ArrowException, UnicodeDecodeError, ValueError, TypeError, KeyError):
        return None  # of another version, or damaged: the parts are the truth


def read_lengths(out_uri: str, names: list[str], *, prefix: str, most: int = MAX_SAMPLED_PARTS) -> Lengths:
    """Of these parts, or of `most` of them evenly over the table, the first and the last among them."""
    count = min(most, len(names))
    picked = [names[index * (len(names) - 1) // max(1, count - 1)] for index in range(count)]
    wanted = [prefix + name for name in (FINISH_REASON, PROMPT_TOKENS, COMPLETION_TOKENS)]

    def read(name: str) -> tuple[Counts, Counts]:
        with open_parquet(storage.join(out_uri, name)) as parquet:
            table = parquet.read(columns=wanted, use_threads=False)
        answered = table.filter(pc.not_equal(table.column(wanted[0]), pa.scalar(FINISH_ERROR)))
        prompt, completion = (answered.column(column).to_numpy().astype(np.int64) for column in wanted[1:])
        return prompt, completion

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(read, picked))
    none: Counts = np.zeros(0, dtype=np.int64)
    return Lengths(
        prompt=np.concatenate([none, *(prompt for prompt, _ in found)]),
        completion=np.concatenate([none, *(completion for _, completion in found)]),
        num_parts=len(picked),
        of_parts=len(names),
    )
