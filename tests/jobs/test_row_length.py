"""How long a job's rows are taken to be before any is read, and the KV cache that a CPU's engines get by it. No engine starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.accept import accept
from jobs.accept import row_tokens
from jobs.accept import store
from jobs.plan import RowGroup
from jobs.plan import make_plan
from jobs.plan import mean_row_bytes
from pipeline.profile import Machine
from schemas.job import JobSpec

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]


def rows(count: int, characters: int) -> list[dict[str, Any]]:
    """Each with a text of its own, so that Parquet stores every one."""
    return [{"prompt": f"{index:08d}" * (characters // 8), "own": json.dumps({"max_tokens": 5})} for index in range(count)]


def test_two_bytes_of_prompt_are_taken_for_a_token(make_job: MakeJob, write_table: WriteTable) -> None:
    """As Parquet stores them, with some bytes of its own."""
    write_table(rows(100, 800))
    job = make_job(sampling={"max_tokens": 50})
    plan, _ = make_plan(job)
    assert row_tokens(plan, job) == pytest.approx(400 + 50, rel=0.03)


def test_what_a_template_and_a_system_prompt_add_counts(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(rows(100, 800))
    plain, longer = make_job(), make_job(input={"prompt": "x" * 100 + "{prompt}", "system": "y" * 60})
    plan, _ = make_plan(plain)
    before, after = row_tokens(plan, plain), row_tokens(plan, longer)
    assert before is not None
    assert after == before + (100 + len("{prompt}") + 60) / 2


def test_nobody_knows_how_long_rows_with_limits_of_their_own_become(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(rows(10, 80))
    job = make_job(input={"sampling": "own"})
    assert row_tokens(make_plan(job)[0], job) is None


def test_a_plan_of_an_earlier_version_does_not_say(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(rows(10, 80))
    job = make_job()
    plan, _ = make_plan(job)
    assert row_tokens(replace(plan, row_bytes=None), job) is None


def test_few_long_texts_many_times_over_count_as_long_as_they_are(make_job: MakeJob, write_table: WriteTable) -> None:
    """Parquet stores each of them once."""
    write_table(
        [
            {
                "prompt": f"question {index:06d} of this table, in some words that make it as long as questions are",
                "doc": "text " * 400 + str(index % 4),
            }
            for index in range(2000)
        ]
    )
    short, documents = make_job(), make_job(input={"prompt": "{prompt} {doc}"})
    assert row_tokens(make_plan(short)[0], short) is not None
    plan, _ = make_plan(documents)
    known = row_tokens(plan, documents)
    assert known is not None
    assert known > 2000 / 2  # of the document alone


def test_texts_too_long_for_parquets_statistics_leave_lengths_unknown(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"prompt": "x" * 20_000 + str(index % 4)} for index in range(200)])
    job = make_job()
    assert row_tokens(make_plan(job)[0], job) is None


@pytest.mark.parametrize("of", ["number", "label", "nothing"])
def test_numbers_labels_and_nulls_in_a_template_are_as_short_as_they_are(make_job: MakeJob, write_table: WriteTable, of: str) -> None:
    rows_of = [{"prompt": f"What is {index} times 7?", "number": index, "label": "ab"[index % 2], "nothing": None} for index in range(400)]
    write_table(
        pa.Table.from_pylist(
            rows_of, pa.schema([("prompt", pa.string()), ("number", pa.int64()), ("label", pa.string()), ("nothing", pa.string())])
        )
    )
    job = make_job(input={"prompt": f"{{prompt}} {{{of}}}"})
    known = row_tokens(make_plan(job)[0], job)
    assert known is not None
    assert known < 60


def test_the_mean_of_row_groups_is_by_their_rows_and_nothing_where_one_is_unknown() -> None:
    def group(num_rows: int, row_bytes: float | None) -> RowGroup:
        return RowGroup(num_rows=num_rows, size_bytes=0, prompt_bytes=0, row_bytes=row_bytes)

    assert mean_row_bytes([]) is None
    assert mean_row_bytes([group(1, 100.0), group(3, 20.0), group(0, None)]) == 40.0
    assert mean_row_bytes([group(1, 100.0), group(3, None)]) is None


def test_a_conversations_roles_do_not_hide_how_long_its_messages_are(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"chat": [{"role": "user", "content": f"{index:08d}" * 40}]} for index in range(500)])
    job = make_job(input={"prompt": {"messages": "chat"}})
    assert row_tokens(make_plan(job)[0], job) == pytest.approx(160 + 8, rel=0.1)


def test_a_run_and_its_resume_get_a_cache_for_rows_of_that_length(
    make_job: MakeJob, write_table: WriteTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.profile.this_machine", lambda: Machine(cores=2, memory_bytes=64 << 30))
    monkeypatch.setattr("pipeline.profile._SHORT_ROW", 64)  # the tests' model takes no longer rows than the real bound
    write_table(rows(100, 160))
    job = make_job(engine={"kind": "vllm", "options": {"max_num_seqs": 8}}, cluster={"kind": "local"}, sampling={"max_tokens": 8})
    accepted = accept(job)
    length = row_tokens(accepted.plan, job)
    assert length is not None
    assert accepted.cut is not None
    expected = 8 * (length + 192) * accepted.model.kv_values_per_token * 4
    assert accepted.cut.options["kv_cache_memory_bytes"] == expected
    store(accepted)
    again = accept(job)
    assert again.begun
    assert again.cut is not None
    assert again.cut.options["kv_cache_memory_bytes"] == expected
