"""A run that stops by itself because of what comes out of it, and the rows that go first to see it soon."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.accept import accept
from jobs.accept import store
from jobs.api import run
from jobs.brake import tripped
from jobs.canary_rows import canary_of
from jobs.canary_rows import some_of
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


class Terminal(io.StringIO):
    """Somebody looks at it."""

    def isatty(self) -> bool:
        return True


ALWAYS_CUT_OFF = {"options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "lengths": "max"}}
"""The simulated engine always reaches max_tokens where its lengths are `max`."""


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


def test_at_a_canarys_end_a_share_is_judged_however_few_its_rows_are() -> None:
    bad = Totals(rows=3, error_rows=1, flaws={"truncated": 1})
    assert tripped(limits(truncated=0.1), bad, however_few=True) is not None
    assert tripped(limits(truncated=0.5), bad, however_few=True) is None
    assert tripped(limits(truncated=0.1), Totals(), however_few=True) is None
    assert tripped(LimitsSpec(), bad, however_few=True) is None


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


def test_a_plan_that_was_cut_for_another_canary_has_none(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(1000)]}))
    plan, _ = make_plan(make_job(canary=100))
    assert [bool(canary_units(plan, canary)) for canary in (50, 100, 200, 900)] == [False, True, False, False]


def test_the_canary_runs_first_and_is_shown_on_a_terminal(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(400)]}))
    said = Terminal()
    result = run(make_job(canary=24), stream=said)
    assert (result.state, result.rows) == ("complete", 400)
    assert "canary: 24 rows are done, in part-00000000-" in said.getvalue()
    assert "question 51" in said.getvalue()
    assert verify(result.out_uri).complete


def test_what_is_no_terminal_hears_only_where_the_canarys_rows_are(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(400)]}))
    said = io.StringIO()
    result = run(make_job(canary=24), stream=said)
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("canary")]
    assert line == (
        f"canary: 24 rows are done, in part-00000000-{result.fingerprint[:8]}.parquet and 7 more; "
        "a few are shown on a terminal and in notebooks only"
    )
    assert "question" not in said.getvalue()


def test_bad_rows_are_shown_first(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [None if row in (151, 152) else f"question {row}" for row in range(400)]}))
    canary = canary_of(run(make_job(canary=80), stream=io.StringIO()).out_uri)
    shown = some_of(canary)
    assert canary.rows == 80
    positions = [row["row"] for row in shown]
    assert 151 in positions[:-4]
    assert {0, 56, 208, 304} < set(positions)
    assert len(set(positions)) == len(positions)


@pytest.mark.parametrize(("canary", "after_rows"), [(100, 100), (50, 100), (100, 20)], ids=["as many", "fewer", "more than are judged"])
def test_bad_rows_stop_a_run_at_its_canary_which_is_shown_and_a_lifted_limit_goes_on(
    make_job: MakeJob, write_table: WriteTable, canary: int, after_rows: int
) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(2000)]}))
    quality = {"truncated": 0.5, "after_rows": after_rows}
    said = Terminal()
    result = run(make_job(canary=canary, engine=ALWAYS_CUT_OFF, limits={"quality": quality}), stream=said)
    words = " ".join(said.getvalue().split())
    assert (result.state, result.exit_code) == ("limit", 3)
    assert 0 < result.totals.rows <= canary
    assert "limits.quality.truncated is 0.5, and " in words
    assert " rows (100.0%) are cut off at max_tokens; look at rows " in words
    assert f"canary: {result.totals.rows} rows are done, in part-00000000-" in words
    assert "prompt: question 0 " in words
    on = run(make_job(canary=canary, engine=ALWAYS_CUT_OFF), stream=said)
    assert (on.state, on.totals.rows) == ("complete", 2000)
    assert verify(on.out_uri).complete


def test_a_canary_for_an_output_that_was_begun_without_is_said_to_be_left_out(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(400)]}))
    store(accept(make_job()))
    said = io.StringIO()
    assert run(make_job(canary=24), stream=said).state == "complete"
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("canary")]
    assert line.startswith("canary: no 24 rows go first, since")
    assert "give another output, and reuse: this one" in line


def test_json_is_judged_where_it_is_asked_for(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(300)]}))
    result = run(make_job(canary=150, limits={"quality": {"invalid_json": 0.2}}), stream=io.StringIO())
    assert result.exit_code == 3
    assert result.totals.flaws["invalid_json"] > 20


def test_a_limit_that_a_later_run_adds_is_judged(make_job: MakeJob, write_table: WriteTable) -> None:
    """Workers know a job as its first run stored it."""
    write_table(pa.table({"prompt": [f"question {row}" for row in range(640)]}))
    small = {"options": {"max_num_seqs": 4}}  # two units at a time
    store(accept(make_job(engine=small)))
    result = run(make_job(engine=small, limits={"quality": {"invalid_json": 0.2, "after_rows": 20}}), stream=io.StringIO())
    assert (result.state, result.exit_code) == ("limit", 3)
    assert result.totals.flaws["invalid_json"] > 0.2 * result.totals.rows
    assert run(make_job(engine=small), stream=io.StringIO()).this_run.flaws.get("invalid_json") is None


def test_a_canary_is_a_whole_number_above_zero(make_job: MakeJob) -> None:
    with pytest.raises(JobError, match="canary"):
        make_job(canary=0)
