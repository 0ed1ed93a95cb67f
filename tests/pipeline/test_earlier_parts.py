"""Rows of earlier parts in this job's columns, the same whether they come from the store or from what is kept of it on this disk."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.accept import load_job_of
from jobs.api import run
from pipeline.answered import Source
from pipeline.earlier_parts import EarlierParts
from pipeline.earlier_parts import read_rows
from pipeline.segments import added_schema
from schemas.job import JobSpec
from schemas.unit import WorkUnit

MakeJob = Callable[..., JobSpec]
_SAMPLING = {"temperature": 0.7, "n": 2, "seed": 3}


@pytest.fixture
def earlier(make_job: MakeJob, write_table: Callable[..., Path], tmp_path: Path) -> Source:
    """An output with every column there may be, its parts 32 of a few rows."""
    write_table([{"id": row, "prompt": f"question {row}"} for row in range(100)])
    job = make_job(sampling={**_SAMPLING, "logprobs": 0}, output={"prefix": "was_", "token_ids": True})
    assert run(job, stream=io.StringIO()).exit_code == 0
    record, _ = load_job_of(str(tmp_path / "out"))
    return Source(uri=str(tmp_path / "out"), fingerprint=record.fingerprint, prefix="was_")


def rows_of(source: Source, job: JobSpec, unit: int, rows: list[int]) -> list[dict[str, Any]] | None:
    found = read_rows(source, unit, rows, job.output.prefix, added_schema(job))
    return None if found is None else found.to_pylist()


def part(source: Source, unit: int) -> Path:
    return Path(source.uri) / WorkUnit(index=unit, ranges=()).part_name(source.fingerprint)


def test_rows_come_with_the_columns_that_the_job_adds_by_their_names_there(earlier: Source, make_job: MakeJob) -> None:
    there = pq.read_table(part(earlier, 1)).to_pylist()
    same = make_job(sampling={**_SAMPLING, "logprobs": 0}, output={"prefix": "is_", "token_ids": True})
    expected = [{name.replace("was_", "is_"): value for name, value in there[row].items() if name.startswith("was_")} for row in (0, 2)]
    assert rows_of(earlier, same, 1, [0, 2]) == expected


def test_columns_that_the_job_does_not_write_are_left_out_also_within_choices(earlier: Source, make_job: MakeJob) -> None:
    (row,) = rows_of(earlier, make_job(sampling=_SAMPLING), 1, [1]) or []
    (there,) = pq.read_table(part(earlier, 1)).slice(1, 1).to_pylist()
    assert list(row) == ["completion", "finish_reason", "prompt_tokens", "completion_tokens", "error", "choices"]
    assert row["choices"] == [{name: choice[name] for name in ("completion", "finish_reason")} for choice in there["was_choices"]]


def test_a_column_that_is_not_there_gives_nothing(earlier: Source, make_job: MakeJob) -> None:
    path = part(earlier, 1)
    table = pq.read_table(path)
    bare = table.drop_columns(["was_token_ids"]).replace_schema_metadata(pq.read_metadata(path).metadata)
    pq.write_table(bare, path)
    assert rows_of(earlier, make_job(sampling=_SAMPLING, output={"token_ids": True}), 1, [0]) is None


def test_a_part_that_is_gone_damaged_or_another_gives_nothing(earlier: Source, make_job: MakeJob) -> None:
    job = make_job(sampling=_SAMPLING)
    assert rows_of(earlier, job, 99, [0]) is None
    assert rows_of(earlier, job, 1, [1000]) is None
    data = part(earlier, 1).read_bytes()
    for wrong in (b"", data[:-10], part(earlier, 2).read_bytes()):
        part(earlier, 1).write_bytes(wrong)
        assert rows_of(earlier, job, 1, [0]) is None
    pq.write_table(pa.table({"x": [1]}), part(earlier, 1))
    assert rows_of(earlier, job, 1, [0]) is None


_OFTEN = 4
"""Reads of a part, the last ones from this disk."""


def read_often(parts: EarlierParts, source: Source, job: JobSpec, rows: list[int]) -> list[list[dict[str, Any]] | None]:
    """Rows of part 1, over and over."""
    found = [parts.read(source, 1, rows, job.output.prefix, added_schema(job)) for _ in range(_OFTEN)]
    return [None if one is None else one.to_pylist() for one in found]


def test_a_part_that_is_asked_again_and_again_is_kept_and_gives_the_same_when_it_is_gone(
    earlier: Source, make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(sampling=_SAMPLING, output={"token_ids": True})
    expected, parts = rows_of(earlier, job, 1, [0, 2]), EarlierParts(tmp_path / "kept")
    assert read_often(parts, earlier, job, [0, 2]) == [expected] * _OFTEN
    assert len(parts) == 1
    part(earlier, 1).unlink()
    assert read_often(parts, earlier, job, [0, 2]) == [expected] * _OFTEN
    assert read_often(parts, earlier, job, [0, 1000]) == [None] * _OFTEN
    assert list((tmp_path / "kept").iterdir()) == []  # no name is left


def test_a_part_that_is_asked_twice_is_not_kept(earlier: Source, make_job: MakeJob, tmp_path: Path) -> None:
    job, parts = make_job(sampling=_SAMPLING), EarlierParts(tmp_path / "kept")
    for unit in (1, 2, 1, 2):
        assert parts.read(earlier, unit, [0], job.output.prefix, added_schema(job)) is not None
    assert len(parts) == 0


def test_parts_of_several_row_groups_are_taken_from_each(earlier: Source, make_job: MakeJob, tmp_path: Path) -> None:
    job, parts = make_job(sampling=_SAMPLING), EarlierParts(tmp_path / "kept")
    table, meta = pq.read_table(part(earlier, 1)), pq.read_metadata(part(earlier, 1)).metadata
    pq.write_table(table.replace_schema_metadata(meta), part(earlier, 1), row_group_size=1)
    last = table.num_rows - 1
    expected = rows_of(earlier, job, 1, [0, last])
    assert [row["completion"] for row in expected or []] == [table.column("was_completion").to_pylist()[row] for row in (0, last)]
    assert read_often(parts, earlier, job, [0, last]) == [expected] * _OFTEN
    assert len(parts) == 1


def test_a_part_that_is_gone_or_another_is_not_kept_and_others_are(earlier: Source, make_job: MakeJob, tmp_path: Path) -> None:
    job, parts = make_job(sampling=_SAMPLING), EarlierParts(tmp_path / "kept")
    good = part(earlier, 1).read_bytes()
    part(earlier, 1).write_bytes(part(earlier, 2).read_bytes())
    assert read_often(parts, earlier, job, [0]) == [None] * _OFTEN
    part(earlier, 1).unlink()
    assert read_often(parts, earlier, job, [0]) == [None] * _OFTEN
    assert len(parts) == 0
    part(earlier, 1).write_bytes(good)
    assert read_often(parts, earlier, job, [0]) == [rows_of(earlier, job, 1, [0])] * _OFTEN
    assert len(parts) == 1


def test_where_nothing_can_be_kept_rows_come_from_the_store(earlier: Source, make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    job, parts = make_job(sampling=_SAMPLING), EarlierParts(tmp_path / "file")
    assert read_often(parts, earlier, job, [0]) == [rows_of(earlier, job, 1, [0])] * _OFTEN
    assert len(parts) == 0


def test_on_a_disk_that_takes_no_more_rows_come_from_the_store(earlier: Source, make_job: MakeJob, tmp_path: Path) -> None:
    job, parts = make_job(sampling=_SAMPLING), EarlierParts(tmp_path / "kept")
    expected, before = rows_of(earlier, job, 1, [0]), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        found = read_often(parts, earlier, job, [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found == [expected] * _OFTEN
    assert (len(parts), list((tmp_path / "kept").iterdir())) == (0, [])


def test_many_threads_get_the_same_rows_and_keep_a_part_once(earlier: Source, make_job: MakeJob, tmp_path: Path) -> None:
    job, parts = make_job(sampling=_SAMPLING), EarlierParts(tmp_path / "kept")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_often(parts, earlier, job, [0, 1]), range(16)))
    assert found == [[rows_of(earlier, job, 1, [0, 1])] * _OFTEN] * 16
    assert len(parts) == 1
