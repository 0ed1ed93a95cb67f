"""Runs of a schedule: folders by date, and who takes which object."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from pathlib import Path

import pytest

from jobs import api
from jobs import scheduled
from jobs.verify import verify
from schemas.errors import JobError
from schemas.job import JobSpec

pytestmark = pytest.mark.batch
_NIGHT = datetime(2026, 12, 1, 2, 30, tzinfo=UTC)


def test_a_folder_is_named_after_its_moment_in_utc_and_never_used_twice() -> None:
    assert scheduled.folder_name(_NIGHT, set()) == "2026-12-01T023000Z"
    assert scheduled.folder_name(_NIGHT.astimezone(tz=None), set()) == "2026-12-01T023000Z"
    assert scheduled.folder_name(_NIGHT, {"2026-12-01T023000Z", "2026-12-01T023000Z-2"}) == "2026-12-01T023000Z-3"


def test_a_driver_that_comes_back_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    base = str(tmp_path / "out")
    first = scheduled.begin(base, "night-job-1", _NIGHT)
    assert scheduled.begin(base, "night-job-1", _NIGHT + timedelta(hours=3)) == first
    second = scheduled.begin(base, "night-job-2", _NIGHT)  # in the same second
    assert [run.folder for run in scheduled.runs(base)] == [first.folder, second.folder] == ["2026-12-01T023000Z", "2026-12-01T023000Z-2"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    place = tmp_path / "_tokenmill" / "schedule"
    place.mkdir(parents=True)
    (place / "run-x.json").write_text("{}")
    with pytest.raises(JobError, match="damaged record"):
        scheduled.runs(str(tmp_path))


def test_each_run_takes_what_is_new_whatever_its_name_or_age_and_a_failed_one_keeps_its_own(
    write_table: Callable[..., Path], make_job: Callable[..., JobSpec]
) -> None:
    job = make_job()
    base = job.output.uri

    def run(name: str, day: int) -> JobSpec | None:
        begun = scheduled.begin(base, name, _NIGHT + timedelta(days=day))
        taken = scheduled.taken_by_others(base, name)
        mine = scheduled.job_of(job, begun)
        if not scheduled.anything_new(job, taken):
            return None
        result = api.run(mine, taken=taken)
        assert (result.exit_code, result.new_objects) == (0, ())
        assert verify(mine.output.uri).complete
        return mine

    write_table([{"prompt": "one"}], "in/b.parquet")
    first = run("j1", 0)
    assert first is not None
    write_table([{"prompt": "two"}, {"prompt": "three"}], "in/a.parquet")  # sorts before, and came after
    assert run("j2", 1) is not None
    assert run("j3", 2) is None
    write_table([{"prompt": "four"}], "in/b.parquet")  # the old name, another object
    again = run("j4", 3)
    assert again is not None
    assert verify(again.output.uri).rows_proven == 1
    with pytest.raises(JobError, match="there is nothing new"):
        api.plan(job) and api.run(job, taken=scheduled.taken_by_others(base, "none"))
    resumed = run("j2", 9)  # its own objects are not taken from it
    assert resumed is not None
    assert verify(resumed.output.uri).rows_proven == 2
