"""Completion: one output row. The input's columns unchanged, then the columns named here and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.prompts import RowError

COMPLETION = "completion"
FINISH_REASON = "finish_reason"
PROMPT_TOKENS = "prompt_tokens"
COMPLETION_TOKENS = "completion_tokens"
ERROR = "error"
TOKEN_IDS = "token_ids"
LOGPROBS = "logprobs"
CHOICES = "choices"

ADDED = (COMPLETION, FINISH_REASON, PROMPT_TOKENS, COMPLETION_TOKENS, ERROR)
"""The added columns that every job has, in order."""
FINISH_ERROR = "error"

_TOKEN_IDS_TYPE = pa.list_(pa.int32())
_LOGPROBS_TYPE = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("logprob", pa.float32()),
            ("top", pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))),
        ]
    )
)
_ERROR_TYPE = pa.struct([("kind", pa.string()), ("message", pa.string())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of a row's n completions, as text."""

    text: str
    finish_reason: str
    token_ids: list[int]
    logprobs: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What one input row became: choices, or an error."""

    prompt_tokens: int
    choices: tuple[Choice, ...] = ()
    error: RowError | None = None

    @property
    def completion_tokens(self) -> int:
        """Summed over the choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason if self.choices else FINISH_ERROR


class RowsDigest:
    """SHA-256 over rows of added columns, whatever batches they come in. Grows."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, columns: Sequence[Any]) -> None:
        """The next rows, as Arrow arrays, one a column."""
        for row in zip(*(column.to_pylist() for column in columns), strict=True):
            self._hash.update(repr(row).encode("utf-8", "surrogatepass"))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def completion_fields(job: JobSpec) -> list[pa.Field[Any]]:
    """The added columns, in order; their types do not depend on how the rows fare."""
    prefix = job.output.prefix
    fields: list[pa.Field[Any]] = [
        pa.field(prefix + COMPLETION, pa.string()),
        pa.field(prefix + FINISH_REASON, pa.string(), nullable=False),
        pa.field(prefix + PROMPT_TOKENS, pa.int32(), nullable=False),
        pa.field(prefix + COMPLETION_TOKENS, pa.int32(), nullable=False),
        pa.field(prefix + ERROR, _ERROR_TYPE),
    ]
    extras: list[tuple[str, pa.DataType]] = []
    if job.output.token_ids:
        extras.append((TOKEN_IDS, _TOKEN_IDS_TYPE))
    if job.sampling.logprobs is not None:
        extras.append((LOGPROBS, _LOGPROBS_TYPE))
    fields += [pa.field(prefix + name, kind) for name, kind in extras]
    if job.sampling.n > 1:
        choice = pa.struct([(COMPLETION, pa.string()), (FINISH_REASON, pa.string()), *extras])
        fields.append(pa.field(prefix + CHOICES, pa.list_(choice)))
    return fields


def output_schema(input_schema: pa.Schema, job: JobSpec) -> pa.Schema:
    """The input's fields and metadata, then the added columns. Raises JobError where names clash."""
    added = completion_fields(job)
    clashes = sorted({field.name for field in added} & set(input_schema.names))
    if clashes:
        raise JobError(
            f"input.uri: the table already has {', '.join(clashes)}, which the output adds; "
            f"set output.prefix (--prefix), for example 'tm_', to name the added columns differently"
        )
    metadata: Any = input_schema.metadata
    return pa.schema([*input_schema, *added], metadata=metadata)


def completion_arrays(completions: list[Completion], job: JobSpec) -> list[pa.Array[Any]]:
    """The added columns' values, one per completion, in the order and types of `completion_fields`."""
    with_ids, with_logprobs = job.output.token_ids, job.sampling.logprobs is not None

    def extras(choice: Choice) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if with_ids:
            values[TOKEN_IDS] = choice.token_ids
        if with_logprobs:
            values[LOGPROBS] = choice.logprobs
        return values

    columns: list[list[Any]] = [
        [c.choices[0].text if c.choices else None for c in completions],
        [c.finish_reason for c in completions],
        [c.prompt_tokens for c in completions],
        [c.completion_tokens for c in completions],
        [{"kind": c.error.kind, "message": c.error.message} if c.error else None for c in completions],
    ]
    for name in ([TOKEN_IDS] if with_ids else []) + ([LOGPROBS] if with_logprobs else []):
        columns.append([extras(c.choices[0])[name] if c.choices else None for c in completions])
    if job.sampling.n > 1:
        columns.append(
            [
                [{COMPLETION: x.text, FINISH_REASON: x.finish_reason, **extras(x)} for x in c.choices] if c.choices else None
                for c in completions
            ]
        )
    return [pa.array(values, type=field.type) for values, field in zip(columns, completion_fields(job), strict=True)]
