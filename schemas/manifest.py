"""What one unit of work came to (UnitReport) and what the whole job came to (Manifest)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pyarrow as pa

# Keys of a part's Parquet footer.
META_REPORT = b"tokenmill.report"
META_PROVENANCE = b"tokenmill.provenance"

MAX_EXAMPLES = 3
"""Error examples kept per unit, so that a report stays under a KiB on its way through the scheduler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitReport:
    """One committed unit; it lies in the part's footer, so the parts alone can rebuild the manifest."""

    unit: int
    fingerprint: str
    attempt: str
    """Unique per try; tells a lost acknowledgement from a lost race."""
    worker: str
    rows: int
    error_rows: int
    prompt_tokens: int
    completion_tokens: int
    started_at: float
    """Unix seconds, the unit's first read."""
    finished_at: float
    """Unix seconds, just before its commit."""
    finish_reasons: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    """Error rows by kind."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """A few error rows: position in the input table, kind, message."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Thread seconds by kind: read, render, generate (waiting for the engine), decode, write, commit."""
    digest: str = ""
    """SHA-256 over the added columns of all rows; see completions.RowsDigest."""
    resumed_rows: int = 0
    """Rows that earlier attempts had finished and saved."""
    resumed_tokens: int = 0
    """Their completion tokens."""
    copied_rows: int = 0
    """Rows answered with what was generated for an identical greedy row."""
    copied_tokens: int = 0
    """Their completion tokens."""
    cached_prompt_tokens: int = 0
    """Prompt tokens that engines had in their prefix caches, for rows that begin like others."""
    reused_rows: int = 0
    """Rows whose request an earlier output had answered."""
    reused_tokens: int = 0
    """Their completion tokens."""
    flaws: dict[str, int] = field(default_factory=dict)
    """Rows by what is wrong with their text; see pipeline.flaws."""
    flagged: dict[str, list[int]] = field(default_factory=dict)
    """The first of them: positions in the input table."""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> UnitReport:
        return cls(**json.loads(data))


_FIELDS: list[pa.Field[Any]] = [
    pa.field("unit", pa.int64()),
    pa.field("part", pa.string()),
    pa.field("size_bytes", pa.int64()),
    pa.field("rows", pa.int64()),
    pa.field("error_rows", pa.int64()),
    pa.field("prompt_tokens", pa.int64()),
    pa.field("completion_tokens", pa.int64()),
    pa.field("worker", pa.string()),
    pa.field("attempt", pa.string()),
    pa.field("started_at", pa.float64()),
    pa.field("finished_at", pa.float64()),
    pa.field("finish_reasons", pa.string()),
    pa.field("errors", pa.string()),
    pa.field("examples", pa.string()),
    pa.field("seconds", pa.string()),
    pa.field("digest", pa.string()),
    pa.field("resumed_rows", pa.int64()),
    pa.field("resumed_tokens", pa.int64()),
    pa.field("copied_rows", pa.int64()),
    pa.field("copied_tokens", pa.int64()),
    pa.field("cached_prompt_tokens", pa.int64()),
    pa.field("reused_rows", pa.int64()),
    pa.field("reused_tokens", pa.int64()),
    pa.field("flaws", pa.string()),
    pa.field("flagged", pa.string()),
]
MANIFEST_SCHEMA = pa.schema(_FIELDS)
"""One row a unit; the dicts as JSON text. The file's metadata holds the fingerprint and what it covers."""


def manifest_table(parts: Iterable[tuple[UnitReport, str, int]], metadata: dict[bytes, bytes]) -> pa.Table:
    """The manifest of (report, part name, size in bytes), ordered by unit."""
    rows = []
    for report, name, size in sorted(parts, key=lambda part: part[0].unit):
        row = asdict(report)
        row.pop("fingerprint")
        for key in ("finish_reasons", "errors", "examples", "seconds", "flaws", "flagged"):
            row[key] = json.dumps(row[key])
        rows.append({**row, "part": name, "size_bytes": size})
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA).replace_schema_metadata(metadata)


@dataclass(slots=True)
class Totals:
    """Sums over unit reports. The one mutable value here: owned by whoever counts."""

    units: int = 0
    rows: int = 0
    error_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    copied_rows: int = 0
    copied_tokens: int = 0
    cached_prompt_tokens: int = 0
    reused_rows: int = 0
    reused_tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    flaws: dict[str, int] = field(default_factory=dict)
    flagged: dict[str, list[int]] = field(default_factory=dict)
    started_at: float | None = None
    finished_at: float | None = None

    def add(self, report: UnitReport) -> None:
        self.units += 1
        self.rows += report.rows
        self.error_rows += report.error_rows
        self.prompt_tokens += report.prompt_tokens
        self.completion_tokens += report.completion_tokens
        self.copied_rows += report.copied_rows
        self.copied_tokens += report.copied_tokens
        self.cached_prompt_tokens += report.cached_prompt_tokens
        self.reused_rows += report.reused_rows
        self.reused_tokens += report.reused_tokens
        pairs = ((self.errors, report.errors), (self.finish_reasons, report.finish_reasons), (self.flaws, report.flaws))
        for mine, theirs in pairs:
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        for key, seconds in report.seconds.items():
            self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        for flaw, rows in report.flagged.items():
            self.flagged[flaw] = [*self.flagged.get(flaw, []), *rows][:MAX_EXAMPLES]
        # One example a kind: the summary shows what each kind looks like, not a list of rows.
        seen = {example["kind"] for example in self.examples}
        for example in report.examples:
            if example["kind"] not in seen:
                seen.add(example["kind"])
                self.examples.append(example)
        self.started_at = min(x for x in (self.started_at, report.started_at) if x is not None)
        self.finished_at = max(x for x in (self.finished_at, report.finished_at) if x is not None)
