"""One unit's output: built whole in memory, checked, then created once under a name that only this unit has."""

from __future__ import annotations

import io
import json
from typing import Any
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.read import open_parquet
from schemas.errors import ForeignOutput
from schemas.errors import UnitError
from schemas.manifest import META_PROVENANCE
from schemas.manifest import META_REPORT
from schemas.manifest import UnitReport

Outcome = Literal["created", "acknowledgement_lost", "race_lost", "already"]

_ROW_GROUP_ROWS = 4096


def concat(*batches: pa.RecordBatch) -> pa.RecordBatch:
    """One after the other; there must be one at least, which gives the schema."""
    columns = [pa.concat_arrays([batch.column(number) for batch in batches]) for number in range(batches[0].num_columns)]
    return pa.RecordBatch.from_arrays(columns, schema=batches[0].schema)


class PartWriter:
    """A Parquet file in memory. Nothing of it is visible before `commit`."""

    def __init__(self, schema: pa.Schema, compression: Literal["zstd", "snappy", "none"]) -> None:
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(self._buffer, schema, compression=compression, store_schema=True)
        self._schema = schema
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0
        self.num_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        self._held_rows += batch.num_rows
        self.num_rows += batch.num_rows
        if self._held_rows >= _ROW_GROUP_ROWS:
            self._flush()

    def taken(self, schema: pa.Schema) -> pa.RecordBatch:
        """The last columns of the rows taken so far, as many as the schema has and in its types. Ends the writer."""
        self._flush()
        self._writer.close()
        first = len(self._schema) - len(schema)
        parquet = pq.ParquetFile(self._buffer, pre_buffer=False)
        batches = [pa.RecordBatch.from_pylist([], schema=schema)]
        for index in range(parquet.num_row_groups):
            for batch in parquet.read_row_group(index, use_threads=False).to_batches():
                batches.append(pa.RecordBatch.from_arrays(batch.columns[first:], schema=schema))
        return concat(*batches)

    def finish(self, report: UnitReport, provenance: dict[str, Any]) -> bytes:
        """The whole file, report and provenance in its footer."""
        self._flush()
        metadata: Any = {META_REPORT: report.to_json(), META_PROVENANCE: json.dumps(provenance).encode()}
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        return self._buffer.getvalue()  # which shares the memory, as nothing is written any more

    def _flush(self) -> None:
        if self._held_rows:
            self._writer.write_table(pa.Table.from_batches(self._held, self._schema), row_group_size=_ROW_GROUP_ROWS)
        self._held, self._held_rows = [], 0


def read_report(uri: str) -> UnitReport:
    """The report in a part's footer. Raises FileNotFoundError, or ForeignOutput where there is none."""
    try:
        with open_parquet(uri) as parquet:
            metadata, rows = parquet.metadata.metadata or {}, parquet.metadata.num_rows
    except pa.ArrowException as error:
        raise ForeignOutput(f"{uri} is not one of Tokenmill's parts ({error}); remove it or choose another output") from error
    if META_REPORT not in metadata:
        raise ForeignOutput(f"{uri} carries no unit report, so Tokenmill did not write it; remove it or choose another output")
    try:
        report = UnitReport.from_json(metadata[META_REPORT])
    except (ValueError, TypeError) as error:
        raise ForeignOutput(f"{uri} carries a unit report that cannot be understood ({error}); remove it and run the job again") from None
    if report.rows != rows:
        raise ForeignOutput(f"{uri} has {rows} rows, but its report says {report.rows}; remove it, and run the job again")
    return report


def commit(uri: str, data: bytes, report: UnitReport) -> Outcome:
    """Create the part, or find out who did. Raises ForeignOutput where the name holds something else."""
    refused: BaseException | None = None
    try:
        storage.create_once(uri, data)
        return "created"
    except FileExistsError as error:
        refused = error
    except Exception as error:  # of whatever SDK: refused for good, or created and the acknowledgement lost; the store knows
        refused = error
    try:
        there = read_report(uri)
    except FileNotFoundError:
        raise UnitError(f"unit {report.unit}: cannot create {uri}: {refused}") from refused
    if there.fingerprint != report.fingerprint or there.unit != report.unit:
        raise ForeignOutput(
            f"{uri} belongs to unit {there.unit} of job {there.fingerprint[:8]}, expected unit {report.unit} of "
            f"{report.fingerprint[:8]}; choose another output"
        )
    return "acknowledgement_lost" if there.attempt == report.attempt else "race_lost"
