"""JobRecord: what the fingerprint covers, and its way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa

from schemas.job import parse_job
from schemas.record import JobRecord
from schemas.record import encode_schema

SCHEMA = pa.schema([pa.field("p", pa.dictionary(pa.int32(), pa.large_string())), ("x", pa.timestamp("us", tz="UTC"))], metadata={"a": "b"})
JOB: dict[str, Any] = {"model": "m", "input": {"uri": ["/in"], "prompt": "p"}, "output": {"uri": "/out"}, "sampling": {"max_tokens": 3}}


def record(**decides: Any) -> JobRecord:
    return JobRecord(job=JOB, decides={"plan": "abc", "weights": "def", **decides}, schema=encode_schema(SCHEMA), tool_version="1")


def test_a_record_survives_json() -> None:
    assert JobRecord.from_json(record().to_json()) == record()


def test_the_stored_record_shows_its_fingerprint() -> None:
    assert json.loads(record().to_json())["fingerprint"] == record().fingerprint


def test_a_record_gives_job_and_schema_back() -> None:
    assert record().spec == parse_job(JOB)
    assert record().input_schema.equals(SCHEMA, check_metadata=True)


def test_the_fingerprint_covers_what_decides_the_output_and_nothing_else() -> None:
    first = record()
    assert replace(first, tool_version="2", job={**JOB, "name": "other"}).fingerprint == first.fingerprint
    assert record(plan="abd").fingerprint != first.fingerprint
    assert record(engine={"kind": "vllm"}).fingerprint != first.fingerprint
    assert len(first.fingerprint) == 64


def test_the_fingerprint_does_not_hear_of_the_order_of_keys() -> None:
    one = JobRecord(job=JOB, decides={"a": 1, "b": {"c": 2, "d": 3}}, schema="", tool_version="1")
    other = JobRecord(job=JOB, decides={"b": {"d": 3, "c": 2}, "a": 1}, schema="", tool_version="1")
    assert one.fingerprint == other.fingerprint


def test_differences_name_what_differs_and_both_values() -> None:
    mine, theirs = record(prompt={"system": "Über"}), record(plan="xyz")
    assert mine.differences(theirs) == [
        'plan: this job has "abc", the output was begun with "xyz"',
        'prompt: this job has {"system": "Über"}, the output was begun with null',
    ]
    assert mine.differences(mine) == []


def test_a_long_difference_is_cut() -> None:
    (line,) = record(prompt="x" * 1000).differences(record())
    assert len(line) < 300
