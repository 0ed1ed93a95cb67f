"""A run that stops by itself because of what comes out of it, and the rows that go first to see it soon."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.api import run
from jobs.brake import tripped
from jobs.plan import canary_rows
from jobs.plan import canary_units
from jobs.plan import make_plan
from jobs.verify import verify
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import LimitsSpec
from schemas.manifest import Totals

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]


def limits(**quality: float) -> LimitsSpec:
    return LimitsSpec.model_validate({"quality": quality})


def totals(**values: object) -> Totals:
    return Totals(rows=200, **values)  # type: ignore[arg-type]


def test_nothing_is_judged_that_nobody_limited() -> None:
    assert tripped(LimitsSpec(), totals(error_rows=200, flaws={"truncated": 200})) is None


def test_a_share_is_judged_once_enough_rows_are_there() -> None:
    assert tripped(limits(truncated=0.1), Totals(rows=99, flaws={"truncated": 99})) is None
    assert tripped(limits(truncated=0.1, after_rows=50), Totals(rows=99, flaws={"truncated": 99})) is not None
    assert tripped(limits(truncated=0.1), totals(flaws={"truncated": 20})) is None
    assert tripped(limits(truncated=0.1), totals(flaws={"truncated": 21}, flagged={"truncated": [3, 8]})) == (
        "limits.quality.truncated is 0.1, and 21 of 200 rows (10.5%) are cut off at max_tokens; look at rows 3, 8 of the input"
    )


@pytest.mark.parametrize("flaw", ["errors", "truncated", "repeated", "invalid_json"])
def test_every_flaw_has_its_limit(flaw: str) -> None:
    bad = totals(error_rows=3) if flaw == "errors" else totals(flaws={flaw: 3})
    said = tripped(limits(**{flaw: 0.01}), bad)
    assert said is not None
    assert said.startswith(f"limits.quality.{flaw} is 0.01, and 3 of 200 rows (1.5%)")


def test_an_unknown_flaw_is_refused() -> None:
    with pytest.raises(ValueError, match="boring"):
        limits(boring=0.1)


# The canary's rows.


def test_a_canary_has_rows_in_every_part_of_the_table() -> None:
    found = canary_rows(1000, 20)
    assert [rows.start for rows in found] == [0, 125, 250, 375, 500, 625, 750, 875]
    assert sum(map(len, found)) == 20


@pytest.mark.parametrize(("rows", "canary"), [(10, None), (10, 10), (10, 11)])
def test_a_canary_of_all_is_none(rows: int, canary: int | None) -> None:
    assert canary_rows(rows, canary) == []


@pytest.mark.parametrize("canary", [1, 3, 8, 50, 333])
def test_a_canarys_rows_are_units_of_their_own_and_the_table_stays_whole(make_job: MakeJob, write_table: WriteTable, canary: int) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(1000)]}), row_group_size=170)
    plan, _ = make_plan(make_job(canary=canary))
    wanted = sorted(row for rows in canary_rows(1000, canary) for row in rows)
    units = [unit for unit in plan.units if unit.index in canary_units(plan, canary)]
    assert [unit.position + row for unit in units for row in range(unit.num_rows)] == wanted
    starts = [unit.position for unit in plan.units]
    assert starts == sorted(starts)
    assert [unit.position + row for unit in plan.units for row in range(unit.num_rows)] == list(range(1000))
    assert [unit.index for unit in plan.units] == list(range(len(plan.units)))


def test_the_canary_runs_first_and_is_shown(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(400)]}))
    said = io.StringIO()
    result = run(make_job(canary=24), stream=said)
    assert (result.state, result.rows) == ("complete", 400)
    assert "canary: 24 rows are done; some of them:" in said.getvalue()
    assert "question 51" in said.getvalue()
    assert verify(result.out_uri).complete


def test_bad_rows_stop_a_run_after_its_canary_and_a_lifted_limit_goes_on(make_job: MakeJob, write_table: WriteTable) -> None:
    """The simulated engine always reaches max_tokens where its lengths are `max`."""
    write_table(pa.table({"prompt": [f"question {row}" for row in range(2000)]}))
    engine = {"options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "lengths": "max"}}
    job = make_job(canary=100, engine=engine, limits={"quality": {"truncated": 0.5}})
    said = io.StringIO()
    result = run(job, stream=said)
    assert (result.state, result.exit_code) == ("limit", 3)
    assert result.totals.rows == 100
    assert "limits.quality.truncated is 0.5, and 100 of 100 rows (100.0%) are cut off at max_tokens; look at rows" in said.getvalue()
    on = run(make_job(canary=100, engine=engine), stream=said)
    assert (on.state, on.totals.rows) == ("complete", 2000)
    assert verify(on.out_uri).complete


def test_json_is_judged_where_it_is_asked_for(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(300)]}))
    result = run(make_job(canary=150, limits={"quality": {"invalid_json": 0.2}}), stream=io.StringIO())
    assert result.exit_code == 3
    assert result.totals.flaws["invalid_json"] > 20


def test_a_canary_is_a_whole_number_above_zero(make_job: MakeJob) -> None:
    with pytest.raises(JobError, match="canary"):
        make_job(canary=0)
