"""engine.ordering, end to end on the simulated engine: less is generated, and what comes out is the same, in input order."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import api
from jobs.verify import verify
from schemas.job import JobSpec
from tests.conftest import read_output

_ROWS = 120


@pytest.fixture
def twice(write_table: Callable[..., Path]) -> None:
    """Every prompt stands in the table twice, far from its like; rows differ in what they may become."""
    rows = [
        {"id": row, "prompt": f"question {row % (_ROWS // 2)}", "own": json.dumps({"max_tokens": 1 + row % 12})} for row in range(_ROWS)
    ]
    write_table(rows)


def run(make_job: Callable[..., JobSpec], tmp_path: Path, ordering: str, **sections: Any) -> tuple[api.RunResult, list[dict[str, Any]]]:
    out = tmp_path / f"out-{ordering}"
    job = make_job(output={"uri": str(out)}, **{**sections, "engine": {"ordering": ordering, **sections.get("engine", {})}})
    result = api.run(job)
    assert result.exit_code == 0
    assert verify(str(out)).complete
    return result, read_output(out).to_pylist()


@pytest.mark.usefixtures("twice")
def test_of_identical_rows_one_is_generated_and_the_output_is_the_same(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    result, rows = run(make_job, tmp_path, "auto")
    plain, plain_rows = run(make_job, tmp_path, "off")
    assert (result.this_run.copied_rows, plain.this_run.copied_rows) == (_ROWS // 2, 0)
    assert result.this_run.copied_tokens == sum(row["completion_tokens"] for row in rows) // 2
    assert rows == plain_rows
    assert [row["id"] for row in rows] == list(range(_ROWS))
    assert result.to_dict()["this_run"]["copied_rows"] == _ROWS // 2


@pytest.mark.usefixtures("twice")
def test_rows_that_differ_in_sampling_are_no_copies(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    result, rows = run(make_job, tmp_path, "auto", input={"sampling": "own"})
    assert result.this_run.copied_rows == _ROWS // 2  # row and its like have the same limit: 60 is a multiple of 12
    assert all(row["completion_tokens"] <= 1 + row["id"] % 12 for row in rows)
    assert [row["id"] for row in rows] == list(range(_ROWS))


@pytest.mark.usefixtures("twice")
def test_rows_that_are_drawn_are_generated_each(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    result, _ = run(make_job, tmp_path, "auto", sampling={"temperature": 0.7})
    assert result.this_run.copied_rows == 0


@pytest.mark.usefixtures("twice")
def test_copied_rows_are_counted_in_every_report(make_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run(make_job, tmp_path, "auto")
    manifest = pq.read_table(tmp_path / "out-auto" / "_tokenmill" / "manifest.parquet")
    assert sum(manifest.column("copied_rows").to_pylist()) == _ROWS // 2


def test_off_means_off_also_where_yaml_takes_it_for_false(make_job: Callable[..., JobSpec]) -> None:
    assert make_job(engine={"ordering": False}).engine.ordering == "off"


def test_an_ordering_that_there_is_not_is_refused(make_job: Callable[..., JobSpec]) -> None:
    from schemas.errors import JobError

    with pytest.raises(JobError, match=r"engine\.ordering"):
        make_job(engine={"ordering": "longest"})
    with pytest.raises(JobError, match=r"engine\.ordering"):
        make_job(engine={"ordering": True})


@pytest.mark.parametrize(("ordering", "expected"), [("auto", True), ("off", False)])
def test_a_run_says_where_longest_rows_go_first(
    make_job: Callable[..., JobSpec], write_table: Callable[..., Path], ordering: str, expected: bool
) -> None:
    write_table([{"prompt": f"question {row}", "own": json.dumps({"max_tokens": 1 + row})} for row in range(4)])
    said = io.StringIO()
    api.run(make_job(input={"sampling": "own"}, engine={"ordering": ordering}), stream=said)
    assert ("longest rows first, as 'own' says" in said.getvalue()) is expected
