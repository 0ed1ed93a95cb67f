"""A table of prompts and good answers in, rows that judge and rows that calibrate out, in a model's token ids. Knows no engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.model import Model
from pipeline.prompts import check_columns
from pipeline.prompts import read_prompts
from pipeline.read import open_parquet
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from schemas.errors import JobError
from schemas.job import parse_job

_JUDGED_ROWS = 128
_CALIBRATION_ROWS = 32
_LEAST_ROWS = 16
_LEAST_CALIBRATION_ROWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row that judges or calibrates."""

    prompt_ids: list[int]
    reference_ids: list[int]
    reference: str


def split_rows(rows: list[Row], asked: int | None) -> tuple[list[Row], list[Row]]:
    """Those that judge and, after them, those that calibrate; none does both. Raises JobError where there are too few."""
    if len(rows) < _LEAST_ROWS:
        raise JobError(
            f"--table: {len(rows)} rows have a prompt and a reference that fit the model, expected {_LEAST_ROWS} at least; "
            "give a larger table"
        )
    judging = asked or min(_JUDGED_ROWS, len(rows) - min(_CALIBRATION_ROWS, len(rows) // 4))
    calibrating = min(_CALIBRATION_ROWS, len(rows) - judging)
    if calibrating < _LEAST_CALIBRATION_ROWS:
        raise JobError(f"--rows {asked}: the table has {len(rows)} usable rows, and {_LEAST_CALIBRATION_ROWS} more are needed to calibrate")
    return rows[:judging], rows[judging : judging + calibrating]


def read_rows(
    model: Model, name: str, *, table: str | list[str], prompt: Any, reference: str, at_most: int | None, max_tokens: int
) -> list[Row]:
    """As many usable rows as can be needed, in the table's order. Raises JobError naming what the table lacks."""
    job = parse_job(
        {
            "model": name,
            "input": {"uri": table, "prompt": prompt},
            "output": {"uri": "nowhere"},
            "sampling": {"max_tokens": max_tokens},
        }
    )
    tokenizer = load_tokenizer(model.path)
    renderer = Renderer(tokenizer, job, max_model_len=model.max_position_embeddings, seed_base="")
    wanted = (at_most or _JUDGED_ROWS) + _CALIBRATION_ROWS
    rows: list[Row] = []
    seen = blank = 0
    for batch in _batches(table):
        check_columns(batch.schema, job.input)
        references = _references(batch, reference)
        seen += batch.num_rows
        for request, answer in zip(renderer.render(read_prompts(batch, 0, job)), references, strict=True):
            blank += answer is None
            if answer is None or isinstance(request, tuple):
                continue
            ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
            if ids and len(request.token_ids) + len(ids) < model.max_position_embeddings:
                rows.append(Row(prompt_ids=request.token_ids, reference_ids=ids, reference=answer))
        if len(rows) >= wanted:
            return rows[:wanted]
    if not rows:
        what = "their references are empty" if blank == seen else "none has a prompt and a reference that fit the model"
        raise JobError(f"--reference {reference}: of {seen} rows in {table}, {what}; nothing could be compared")
    return rows


def _batches(table: str | list[str]) -> Iterator[pa.RecordBatch]:
    for uri in [table] if isinstance(table, str) else table:
        for found in storage.list_objects(uri):
            try:
                with open_parquet(found.uri) as parquet:
                    yield from parquet.iter_batches(batch_size=256)
            except pa.ArrowException as error:
                raise JobError(f"--table: {found.uri} cannot be read as Parquet: {error}") from None


def _references(batch: pa.RecordBatch, column: str) -> list[str | None]:
    if column not in batch.schema.names:
        raise JobError(f"--reference: the table has no column {column!r}; it has {', '.join(batch.schema.names)}")
    kind = batch.schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise JobError(f"--reference: column {column!r} is {kind}, expected text")
    return [value if value and value.strip() else None for value in batch.column(column).to_pylist()]


def rows_digest(rows: list[Row]) -> str:
    """Of all that a model is shown of them."""
    return hashlib.sha256(json.dumps([[row.prompt_ids, row.reference_ids] for row in rows]).encode()).hexdigest()
