"""What a job has committed, as Arrow: whole parts in input order, at any time. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from jobs.accept import committed_units
from jobs.accept import load_job_of
from pipeline import storage
from pipeline.prompts import prompt_columns
from pipeline.read import open_parquet
from schemas.completions import COMPLETION
from schemas.completions import ERROR
from schemas.completions import output_schema
from schemas.errors import JobError
from schemas.record import JobRecord
from schemas.unit import WorkUnit

_THREADS = 16
"""Parts are many and small on Blob, where each read waits for its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """The parts that are there at one moment, in input order."""

    out_uri: str
    record: JobRecord
    units: tuple[WorkUnit, ...]
    rows_planned: int

    @property
    def rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    @property
    def whole(self) -> bool:
        return self.rows == self.rows_planned

    @property
    def schema(self) -> pa.Schema:
        return output_schema(self.record.input_schema, self.record.spec)

    @property
    def added(self) -> str:
        """The prefix of the columns that a job adds."""
        return self.record.spec.output.prefix

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        return tuple(prompt_columns(self.record.spec.input))

    def read(self, columns: Sequence[str] | None = None, units: Sequence[WorkUnit] | None = None) -> pa.Table:
        """All rows, or those of some units. Raises JobError naming an unknown column and those there are."""
        unknown = [name for name in columns or () if name not in self.schema.names]
        if unknown:
            raise JobError(f"columns: found {', '.join(unknown)}; this output has {', '.join(self.schema.names)}")
        wanted = self.units if units is None else tuple(units)
        with ThreadPoolExecutor(_THREADS) as pool:
            tables = list(pool.map(lambda unit: self._part(unit, columns), wanted))
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        return pa.concat_tables([table.cast(schema) for table in tables]) if tables else schema.empty_table()

    def spread(self, count: int, columns: Sequence[str]) -> list[dict[str, object]]:
        """So many rows at most, from all over what is there, each with its position in the input as `row`."""
        if not self.rows or count < 1:
            return []
        count = min(count, self.rows)
        wanted = [index * self.rows // count for index in range(count)]
        found: list[dict[str, object]] = []
        start = 0
        for unit in self.units:
            inside = [row - start for row in wanted if start <= row < start + unit.num_rows]
            if inside:
                rows = self._part(unit, columns).take(inside).to_pylist()
                found += [{"row": unit.position + index, **row} for index, row in zip(inside, rows, strict=True)]
            start += unit.num_rows
        return found

    def errors(self) -> pa.Table:
        """The rows that came out as errors, with all columns."""
        table = self.read()
        return table.filter(table.column(self.added + ERROR).is_valid())

    def _part(self, unit: WorkUnit, columns: Sequence[str] | None) -> pa.Table:
        uri = storage.join(self.out_uri, unit.part_name(self.record.fingerprint))
        with open_parquet(uri) as parquet:
            return parquet.read(columns=None if columns is None else list(columns), use_threads=False).replace_schema_metadata(None)


def committed(output: str) -> Committed:
    """Raises JobError where there is no job."""
    out_uri = storage.absolute(output)
    record, plan = load_job_of(out_uri)
    done = committed_units(out_uri, record.fingerprint)
    units = tuple(unit for unit in plan.units if unit.index in done)
    return Committed(out_uri=out_uri, record=record, units=units, rows_planned=plan.num_rows)


def shown_columns(found: Committed) -> list[str]:
    """What a person wants to see of a row: what was asked and what came."""
    names = [*found.prompt_columns, found.added + COMPLETION, found.added + ERROR]
    return [name for name in dict.fromkeys(names) if name in found.schema.names]
