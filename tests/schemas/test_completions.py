"""The output's columns: names, types that never depend on the rows, values."""

from __future__ import annotations

import decimal
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.completions import Choice
from schemas.completions import Completion
from schemas.completions import completion_arrays
from schemas.completions import completion_fields
from schemas.completions import output_schema
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.prompts import RowError

LOGPROBS = [{"token_id": 7, "logprob": -0.5, "top": [{"token_id": 8, "logprob": -1.5}]}]
LOGPROBS_TYPE = pa.list_(
    pa.struct(
        [
            ("token_id", pa.int32()),
            ("logprob", pa.float32()),
            ("top", pa.list_(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())]))),
        ]
    )
)
BAD = Completion(prompt_tokens=0, error=RowError(kind="empty_prompt", message="it is null"))


def job_with(*, sampling: dict[str, Any] | None = None, **output: Any) -> JobSpec:
    return parse_job({"model": "m", "input": {"uri": "i", "prompt": "p"}, "output": {"uri": "o", **output}, "sampling": sampling or {}})


def good(*texts: str) -> Completion:
    choices = tuple(Choice(text=text, finish_reason="stop", token_ids=[7], logprobs=LOGPROBS) for text in texts)
    return Completion(prompt_tokens=3, choices=choices)


def table_of(completions: list[Completion], job: JobSpec) -> pa.Table:
    return pa.Table.from_arrays(completion_arrays(completions, job), schema=pa.schema(completion_fields(job)))


def test_the_plain_columns_have_these_names_and_types() -> None:
    assert pa.schema(completion_fields(job_with())) == pa.schema(
        [
            pa.field("completion", pa.string()),
            pa.field("finish_reason", pa.string(), nullable=False),
            pa.field("prompt_tokens", pa.int32(), nullable=False),
            pa.field("completion_tokens", pa.int32(), nullable=False),
            pa.field("error", pa.struct([("kind", pa.string()), ("message", pa.string())])),
        ]
    )


@pytest.mark.parametrize("completions", [[], [BAD, BAD], [good("a"), good("b")], [BAD, good("a")]], ids=["none", "bad", "good", "mixed"])
@pytest.mark.parametrize(
    "job",
    [job_with(), job_with(token_ids=True, sampling={"n": 2, "temperature": 1.0, "logprobs": 1})],
    ids=["plain", "everything"],
)
def test_types_are_the_same_however_the_rows_fare(completions: list[Completion], job: JobSpec) -> None:
    fields = completion_fields(job)
    arrays = completion_arrays(completions, job)
    assert [array.type for array in arrays] == [field.type for field in fields]
    assert [len(array) for array in arrays] == [len(completions)] * len(fields)
    table_of(completions, job).validate(full=True)


def test_a_completion_and_an_error_fill_their_columns() -> None:
    assert table_of([good("hello"), BAD], job_with()).to_pylist() == [
        {"completion": "hello", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 1, "error": None},
        {
            "completion": None,
            "finish_reason": "error",
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "error": {"kind": "empty_prompt", "message": "it is null"},
        },
    ]


def test_token_ids_and_logprobs_come_when_asked_for() -> None:
    job = job_with(token_ids=True, sampling={"logprobs": 1})
    fields = completion_fields(job)
    assert [field.name for field in fields[5:]] == ["token_ids", "logprobs"]
    assert [field.type for field in fields[5:]] == [pa.list_(pa.int32()), LOGPROBS_TYPE]
    rows = table_of([good("a"), BAD], job).select(["token_ids", "logprobs"]).to_pylist()
    assert rows == [{"token_ids": [7], "logprobs": LOGPROBS}, {"token_ids": None, "logprobs": None}]


def test_zero_logprobs_are_asked_for_too() -> None:
    assert "logprobs" in [field.name for field in completion_fields(job_with(sampling={"logprobs": 0}))]


def test_several_choices_get_a_column_of_their_own_and_the_first_stays_the_completion() -> None:
    job = job_with(sampling={"n": 2, "temperature": 1.0})
    assert completion_fields(job)[-1] == pa.field(
        "choices", pa.list_(pa.struct([("completion", pa.string()), ("finish_reason", pa.string())]))
    )
    rows = table_of([good("a", "b"), BAD], job).select(["completion", "completion_tokens", "choices"]).to_pylist()
    assert rows == [
        {
            "completion": "a",
            "completion_tokens": 2,
            "choices": [{"completion": "a", "finish_reason": "stop"}, {"completion": "b", "finish_reason": "stop"}],
        },
        {"completion": None, "completion_tokens": 0, "choices": None},
    ]


def test_every_choice_carries_its_ids_and_logprobs() -> None:
    job = job_with(token_ids=True, sampling={"n": 2, "temperature": 1.0, "logprobs": 1})
    (row,) = table_of([good("a", "b")], job).to_pylist()
    assert row["choices"] == [{"completion": text, "finish_reason": "stop", "token_ids": [7], "logprobs": LOGPROBS} for text in ("a", "b")]


def test_a_prefix_goes_before_every_added_name() -> None:
    job = job_with(prefix="tm_", token_ids=True, sampling={"n": 2, "temperature": 1.0, "logprobs": 1})
    assert [field.name for field in completion_fields(job)] == [
        "tm_completion",
        "tm_finish_reason",
        "tm_prompt_tokens",
        "tm_completion_tokens",
        "tm_error",
        "tm_token_ids",
        "tm_logprobs",
        "tm_choices",
    ]


def test_a_clash_with_the_inputs_columns_is_refused_naming_the_prefix_option() -> None:
    table = pa.schema([("p", pa.string()), ("error", pa.string()), ("completion", pa.string())])
    with pytest.raises(JobError, match=r"already has completion, error, which the output adds; set output.prefix .--prefix."):
        output_schema(table, job_with())
    assert output_schema(table, job_with(prefix="tm_")).names[:3] == ["p", "error", "completion"]


def test_a_column_that_only_other_jobs_would_add_is_no_clash() -> None:
    table = pa.schema([("p", pa.string()), ("token_ids", pa.list_(pa.int64())), ("choices", pa.string()), ("logprobs", pa.float64())])
    assert output_schema(table, job_with()).names[:4] == table.names
    with pytest.raises(JobError, match="already has token_ids,"):
        output_schema(table, job_with(token_ids=True))


def test_the_inputs_fields_and_metadata_stay_as_they_are() -> None:
    fields = [
        pa.field("id", pa.int64(), nullable=False, metadata={b"unit": b"row"}),
        pa.field("nested", pa.list_(pa.struct([("a", pa.map_(pa.string(), pa.int8())), ("b", pa.list_(pa.float16()))]))),
        pa.field("dictionary", pa.dictionary(pa.int8(), pa.string())),
        pa.field("price", pa.decimal128(20, 4)),
        pa.field("when", pa.timestamp("ns", tz="Europe/Berlin")),
        pa.field("large", pa.large_list(pa.large_string())),
        pa.field("bytes", pa.large_binary()),
        pa.field("fixed", pa.list_(pa.float32(), 3)),
        pa.field("nothing", pa.null()),
    ]
    table = pa.schema(fields, metadata={b"pandas": b"{}"})
    made = output_schema(table, job_with())
    assert [made.field(index) for index in range(len(fields))] == fields
    assert next(field.metadata for field in made) == {b"unit": b"row"}
    assert made.metadata == table.metadata


@pytest.mark.parametrize("value", [decimal.Decimal("12.3400"), None])
def test_added_columns_stand_beside_any_input_column(value: Any, write_table: Callable[..., Any]) -> None:
    column = pa.array([value], pa.decimal128(20, 4))
    schema = output_schema(pa.schema([("price", column.type)]), job_with())
    table = pa.Table.from_arrays([column, *completion_arrays([good("a")], job_with())], schema=schema)
    assert pq.read_table(write_table(table)).equals(table)
