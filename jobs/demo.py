"""The demo job: the committed prompts as a typed Parquet table, and a job file beside it."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

_PROMPTS = Path(__file__).parent / "demo_prompts.jsonl"
_NUM_FILES = 3

DEMO_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.dictionary(pa.int32(), pa.string())),
        ("prompt", pa.string()),
        ("received_at", pa.timestamp("ms", tz="UTC")),
        ("channel", pa.string()),
        ("priority", pa.int8()),
        ("amount", pa.decimal128(12, 2)),
        ("tags", pa.list_(pa.string())),
        ("customer", pa.struct([("segment", pa.string()), ("country", pa.string()), ("tenure_months", pa.int32())])),
        ("sampling", pa.string()),
    ]
)

_JOB = """\
# yaml-language-server: $schema=job.schema.json
name: demo
model: demo
input:
  uri: {prompts}
  prompt: prompt
  sampling: sampling          # this column may override the sampling of its row
output:
  uri: {completions}
sampling:
  max_tokens: {max_tokens}
  temperature: 0
"""


def demo_table() -> pa.Table:
    """240 rows; a few are bad on purpose."""
    rows = [json.loads(line) for line in _PROMPTS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["received_at"] = datetime.datetime.fromisoformat(row["received_at"].replace("Z", "+00:00"))
        row["amount"] = None if row["amount"] is None else decimal.Decimal(row["amount"])
    return pa.Table.from_pylist(rows, schema=DEMO_SCHEMA)


def write_demo(folder: str, *, max_tokens: int) -> str:
    """Write prompts and job file where they are not there yet (a resumed demo keeps its inputs); returns the job file's path."""
    from schemas.job import json_schema

    base = Path(folder).absolute()
    prompts = base / "prompts"
    prompts.mkdir(parents=True, exist_ok=True)
    table = demo_table()
    step = -(-table.num_rows // _NUM_FILES)
    for index in range(_NUM_FILES):
        path = prompts / f"prompts-{index}.parquet"
        buffer = io.BytesIO()
        pq.write_table(table.slice(index * step, step), buffer, compression="zstd")
        with contextlib.suppress(FileExistsError):
            storage.create_once(str(path), buffer.getvalue())
    (base / "job.schema.json").write_text(json_schema())
    job_file = base / "job.yaml"
    job_file.write_text(
        _JOB.format(prompts=json.dumps(f"{prompts}/*.parquet"), completions=json.dumps(f"{base}/completions"), max_tokens=max_tokens)
    )
    return str(job_file)
