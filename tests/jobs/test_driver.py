"""The driver's decisions as values, and its loop over a small hand-written cluster: retry, give up, stop, limit, drain."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from jobs.api import make_cluster
from jobs.api import run
from jobs.caps import Caps
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.cluster import node_of
from jobs.driver import Driver
from jobs.driver import Flying
from jobs.driver import Progress
from jobs.driver import Tries
from jobs.driver import may_submit
from jobs.driver import next_step
from jobs.driver import slow_unit
from jobs.driver import units_at_once
from jobs.driver import wanted_rows
from jobs.plan import Plan
from jobs.plan import canary_units
from jobs.verify import verify
from pipeline import storage
from schemas import layout
from schemas.errors import EngineDead
from schemas.errors import EngineStartError
from schemas.errors import ForeignOutput
from schemas.errors import InputChanged
from schemas.errors import ReplicaLost
from schemas.errors import UnitError
from schemas.job import JobSpec
from schemas.manifest import UnitReport
from schemas.unit import RowRange
from schemas.unit import WorkUnit
from tests.conftest import read_output

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]
Answer = Callable[[WorkUnit, int], Result]


class FakeClock:
    """Goes on by `step_s` whenever somebody looks."""

    def __init__(self, step_s: float) -> None:
        self.now, self._step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self._step_s
        return self.now


class ScriptedCluster:
    """Answers every unit at once with what the script says for unit and attempt; commits nothing."""

    dashboard = None

    def __init__(self, answer: Answer, *, replicas: tuple[ReplicaState, ...] | None = None, clock: FakeClock | None = None) -> None:
        self._answer, self._clock = answer, clock
        self._replicas = (ReplicaState(name="scripted", window_rows=16),) if replicas is None else replicas
        self.submitted: list[tuple[int, int, float]] = []
        """(unit, attempt, when)."""

    def replicas(self) -> list[ReplicaState]:
        return list(self._replicas)

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        self.submitted.append((unit.index, attempt, self._clock.now if self._clock else 0.0))
        done(self._answer(unit, attempt))

    def notes(self) -> list[str]:
        return []

    def start_seconds(self) -> dict[str, float]:
        return {}

    def evict(self) -> None:
        return

    def close(self, *, at_once: bool = False) -> None:
        return


def report_of(unit: WorkUnit, error_rows: int = 0) -> dict[str, Any]:
    report = UnitReport(
        unit=unit.index,
        fingerprint="f" * 64,
        attempt="a",
        worker="scripted",
        rows=unit.num_rows,
        error_rows=error_rows,
        prompt_tokens=10 * unit.num_rows,
        completion_tokens=5 * unit.num_rows,
        started_at=1.0,
        finished_at=2.0,
    )
    return {"report": asdict(report), "outcome": "created"}


@pytest.fixture
def accepted(make_job: MakeJob, write_table: WriteTable) -> Accepted:
    """Ten units of 16 rows, three attempts each."""
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(160)])
    return store(accept(make_job(limits={"attempts": 3})))


def replicas(*windows: int) -> list[ReplicaState]:
    return [ReplicaState(name=f"r{index}", window_rows=window) for index, window in enumerate(windows)]


@pytest.mark.parametrize(
    ("units", "fewest_windows", "num_replicas", "expected"),
    [
        (0, 0.0, 0, False),  # nobody is there
        (0, 0.0, 1, True),
        (1, 0.9, 1, True),
        (1, 1.0, 1, True),  # the window is full, but a second unit lets its reading overlap
        (2, 1.0, 1, False),
        (9, 0.9, 1, True),  # small units: as many as fill the window
        (3, 5.0, 2, True),
        (4, 5.0, 2, False),
        (40, 0.9, 2, True),  # the other one may have far more
        (40, 1.0, 2, False),
    ],
)
def test_units_are_submitted_until_every_window_is_full_and_two_units_overlap(
    units: int, fewest_windows: float, num_replicas: int, expected: bool
) -> None:
    assert may_submit(units, fewest_windows, 1.0, num_replicas) is expected


@pytest.mark.parametrize(
    ("windows", "rows_left", "num_expected", "expected"),
    [
        ([], 400, 2, 0),
        ([128], 10_000, 1, 512),
        ([128, 128], 10_000, 2, 1024),
        ([128], 400, 1, 400),
        ([128], 400, 2, 200),  # the other one is not up yet
        ([128], 100, 2, 128),
        ([128, 128], 400, 1, 400),  # more than were expected
    ],
)
def test_wide_windows_take_no_more_than_a_share_of_what_is_left(
    windows: list[int], rows_left: int, num_expected: int, expected: int
) -> None:
    assert wanted_rows(replicas(*windows), wide=True, rows_left=rows_left, num_expected=num_expected) == expected


@pytest.mark.parametrize(
    ("error", "attempt", "expected"),
    [
        (UnitError("x"), 1, "retry"),
        (UnitError("x"), 2, "retry"),
        (UnitError("x"), 3, "give_up"),
        (InputChanged("x"), 1, "give_up"),
        (OSError("x"), 1, "retry"),
        (KeyError("x"), 3, "give_up"),
        (ForeignOutput("x"), 1, "stop"),
        (ForeignOutput("x"), 3, "stop"),
    ],
)
def test_a_failure_is_retried_given_up_or_stops_everything(error: BaseException, attempt: int, expected: str) -> None:
    assert next_step(error, Tries(attempts=attempt), 3) == expected


def test_lost_replicas_cost_no_attempt_but_are_not_endless() -> None:
    assert next_step(ReplicaLost("x"), Tries(losses=29), 1) == "retry"
    assert next_step(ReplicaLost("x"), Tries(losses=30), 1) == "give_up"


IDLE = [ReplicaState(name="idle", window_rows=16)]


def flying(since: float, *, copies: int = 1, doubled: bool = False) -> Flying:
    return Flying(unit=WorkUnit(index=0, ranges=()), since=since, on=None, copies=copies, doubled=doubled)


@pytest.mark.parametrize(
    ("flights", "usual_s", "idle", "now", "expected"),
    [
        ({1: flying(0.0), 2: flying(50.0)}, 20.0, IDLE, 61.0, 1),
        ({1: flying(0.0)}, 20.0, IDLE, 59.0, None),  # three times the usual is not over
        ({1: flying(0.0)}, 1.0, IDLE, 9.0, None),  # nothing to win on short units
        ({1: flying(0.0)}, 20.0, [], 99.0, None),  # nobody has time
        ({1: flying(0.0)}, None, IDLE, 99.0, None),  # nothing is known yet
        ({1: flying(0.0, copies=2, doubled=True), 2: flying(1.0)}, 20.0, IDLE, 99.0, 2),
        ({1: flying(0.0, doubled=True)}, 20.0, IDLE, 99.0, None),  # its copy failed: once is enough
    ],
)
def test_the_slowest_unit_is_run_a_second_time_where_it_holds_up_the_end(
    flights: dict[int, Flying], usual_s: float | None, idle: list[ReplicaState], now: float, expected: int | None
) -> None:
    assert slow_unit(flights, usual_s, idle, now) == expected


class StuckCluster(ScriptedCluster):
    """Never answers the first copy of unit 9, but says what it did when the second is done."""

    def __init__(self, late: Result | None) -> None:
        super().__init__(lambda unit, _: report_of(unit))
        self._late = late
        self._stuck: Callable[[Result], None] | None = None
        self.on: list[str | None] = []

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        if unit.index == 9 and self._stuck is None:
            self._stuck = done
            return
        if unit.index == 9:
            self.on.append(on)
            if self._late is not None and self._stuck is not None:
                self._stuck(self._late)
        super().submit(out_uri, fingerprint, unit, attempt, done)


@pytest.mark.slow
@pytest.mark.parametrize("late", [None, UnitError("too late"), "report"])
def test_a_unit_that_hangs_is_run_once_more_and_counted_once(accepted: Accepted, late: Result | None) -> None:
    cluster = StuckCluster(report_of(accepted.plan.units[9]) if late == "report" else late)
    progress = Driver(accepted, cluster, clock=FakeClock(5.0)).run()
    assert (progress.state, progress.totals.units, progress.totals.rows, progress.failed) == ("complete", 10, 160, {})
    assert cluster.on == ["scripted"]


class HoldingCluster(ScriptedCluster):
    """One replica with room for the whole table where several are expected; answers what it has on demand."""

    def __init__(self, expected: int) -> None:
        super().__init__(lambda unit, attempt: report_of(unit), replicas=(ReplicaState(name="r0", window_rows=160),))
        self._expected, self.held = expected, list[tuple[WorkUnit, Callable[[Result], None]]]()
        self.sent: list[int] = []
        """Units that were there each time that it answered."""

    @property
    def num_replicas(self) -> int:
        return self._expected

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        self.held.append((unit, done))

    def answer(self, _: Progress) -> None:
        self.sent.append(len(self.held))
        held, self.held = self.held, []
        for unit, done in held:
            done(report_of(unit))


@pytest.mark.parametrize(("expected", "first"), [(1, 10), (2, 5), (4, 3)])
def test_whoever_is_up_first_leaves_its_share_of_a_small_table_to_those_that_come_soon(
    accepted: Accepted, expected: int, first: int
) -> None:
    cluster = HoldingCluster(expected)
    progress = Driver(accepted, cluster).run(cluster.answer)
    assert cluster.sent[0] == first
    assert (progress.state, progress.totals.units) == ("complete", 10)  # those that never came are not waited for


def test_a_replica_that_does_not_come_soon_gets_no_share(accepted: Accepted) -> None:
    cluster = HoldingCluster(2)
    progress = Driver(accepted, cluster, clock=FakeClock(40.0)).run(cluster.answer)  # it is looked at several times a turn
    assert cluster.sent[:2] == [5, 5]
    assert progress.state == "complete"


def test_every_unit_is_submitted_once_and_counted(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit))
    progress = Driver(accepted, cluster).run()
    assert [unit for unit, _, _ in cluster.submitted] == list(range(10))
    assert (progress.state, progress.totals.units, progress.totals.rows, progress.totals.completion_tokens) == ("complete", 10, 160, 800)
    assert (progress.failed, progress.retries, progress.outcomes, progress.units_in_flight) == ({}, 0, {"created": 10}, 0)


def test_a_unit_that_fails_once_is_tried_again_and_done(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: UnitError("a hiccup") if (unit.index, attempt) == (4, 1) else report_of(unit))
    said: list[str] = []

    def listen(progress: Progress) -> None:
        said.extend(progress.notes)
        progress.notes.clear()

    progress = Driver(accepted, cluster, clock=FakeClock(1.0)).run(listen)
    assert (progress.state, progress.retries, progress.totals.units, progress.failed) == ("complete", 1, 10, {})
    assert Counter(unit for unit, _, _ in cluster.submitted) == {**dict.fromkeys(range(10), 1), 4: 2}
    assert said == ["unit 4 failed (attempt 1 of 3), again in 1 s: UnitError: a hiccup"]


def test_a_unit_that_cannot_be_done_is_given_up_with_its_reason_and_all_others_are_done(accepted: Accepted) -> None:
    clock = FakeClock(1.0)
    cluster = ScriptedCluster(lambda unit, attempt: UnitError(f"try {attempt}") if unit.index == 4 else report_of(unit), clock=clock)
    progress = Driver(accepted, cluster, clock=clock).run()
    assert (progress.state, progress.failed, progress.retries) == ("failed", {4: "UnitError: try 3"}, 2)
    assert (progress.totals.units, progress.totals.rows) == (9, 144)
    tries = [(attempt, when) for unit, attempt, when in cluster.submitted if unit == 4]
    assert [attempt for attempt, _ in tries] == [1, 2, 3]
    first, second, third = (when for _, when in tries)
    assert second - first >= 1.0
    assert third - second >= 2.0


def test_waiting_for_a_retry_does_not_hold_up_other_units(accepted: Accepted) -> None:
    clock = FakeClock(0.1)
    cluster = ScriptedCluster(lambda unit, attempt: UnitError("no") if (unit.index, attempt) == (0, 1) else report_of(unit), clock=clock)
    assert Driver(accepted, cluster, clock=clock).run().state == "complete"
    order = [unit for unit, _, _ in cluster.submitted]
    assert sorted(order) == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert order.index(0, 1) > 4


@pytest.mark.parametrize("error", [EngineDead("killed"), ReplicaLost("gone")])
def test_a_lost_engine_costs_no_attempt_and_no_row(make_job: MakeJob, accepted: Accepted, error: BaseException) -> None:
    accepted = replace(accepted, job=make_job(limits={"attempts": 1}))
    cluster = ScriptedCluster(lambda unit, attempt: error if attempt == 1 else report_of(unit))
    progress = Driver(accepted, cluster, clock=FakeClock(1.0)).run()
    assert (progress.state, progress.retries, progress.totals.rows) == ("complete", 10, 160)


def test_foreign_output_stops_everything(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: ForeignOutput("part-3 is somebody else's") if unit.index == 3 else report_of(unit))
    driver = Driver(accepted, cluster)
    with pytest.raises(ForeignOutput, match="part-3 is somebody else's"):
        driver.run()
    submitted = [unit for unit, _, _ in cluster.submitted]
    assert Counter(submitted)[3] == 1
    assert len(submitted) <= 5
    assert driver.progress.failed == {3: "ForeignOutput: part-3 is somebody else's"}


def test_an_engine_that_does_not_start_ends_the_run_with_its_reason(accepted: Accepted) -> None:
    class Hopeless(ScriptedCluster):
        def replicas(self) -> list[ReplicaState]:
            raise EngineStartError("no engine replica could be started: not enough memory")

        def notes(self) -> list[str]:
            return ["replica 0: 3 GB found, 4 GB expected"]

    cluster = Hopeless(lambda unit, attempt: report_of(unit))
    driver = Driver(accepted, cluster)
    with pytest.raises(EngineStartError, match="not enough memory"):
        driver.run()
    assert cluster.submitted == []
    assert driver.progress.notes == ["replica 0: 3 GB found, 4 GB expected"]


def test_more_error_rows_than_the_limit_stop_the_job_undone(make_job: MakeJob, accepted: Accepted) -> None:
    limited = accept(make_job(limits={"error_rows": 5}))
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit, error_rows=2))
    progress = Driver(limited, cluster).run()
    assert progress.state == "limit"
    assert 3 <= progress.totals.units < 10
    assert progress.totals.error_rows == 2 * progress.totals.units


def test_a_canary_whose_every_unit_is_given_up_ends_the_run(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(160)])
    accepted = store(accept(make_job(canary=16, limits={"attempts": 1})))
    canary = canary_units(accepted.plan, 16)
    cluster = ScriptedCluster(lambda unit, attempt: UnitError("no") if unit.index in canary else report_of(unit))
    progress = Driver(accepted, cluster).run()
    assert (progress.state, progress.canary, progress.failed.keys()) == ("failed", "done", canary)
    assert {unit for unit, _, _ in cluster.submitted} == canary
    assert progress.notes[-1] == "every unit of the canary was given up: the rest does not begin"


def test_a_canary_with_a_unit_left_is_judged_by_that(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(160)])
    accepted = store(accept(make_job(canary=16, limits={"attempts": 1, "quality": {"errors": 0.5}})))
    _, *others = sorted(canary_units(accepted.plan, 16))

    def run_with(error_rows: int) -> Progress:
        answer = {index: UnitError("no") for index in others}
        return Driver(accepted, ScriptedCluster(lambda unit, attempt: answer.get(unit.index) or report_of(unit, error_rows))).run()

    assert run_with(1).totals.rows == 160 - 14
    bad = run_with(2)
    assert (bad.state, bad.totals.units) == ("failed", 1)
    assert "limits.quality.errors is 0.5, and 2 of 2 rows (100.0%) are error rows" in bad.notes[-1]


def test_a_canary_that_is_drained_was_stopped(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(160)])
    accepted = store(accept(make_job(canary=16)))
    driver = Driver(accepted, ScriptedCluster(lambda unit, attempt: report_of(unit)))
    driver.drain()
    assert (driver.run().state, driver.progress.canary) == ("drained", "stopped")


def test_as_many_error_rows_as_the_limit_are_allowed(make_job: MakeJob, accepted: Accepted) -> None:
    limited = accept(make_job(limits={"error_rows": 20}))
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit, error_rows=2))
    assert Driver(limited, cluster).run().state == "complete"


def test_draining_before_the_first_replica_is_ready_ends_the_run(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit), replicas=())
    driver = Driver(accepted, cluster)
    driver.drain()
    assert driver.run().state == "drained"
    assert cluster.submitted == []


def test_draining_does_not_wait_for_retries(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: UnitError("no"))
    driver = Driver(accepted, cluster, clock=lambda: 0.0)  # no retry ever comes up
    progress = driver.run(lambda progress: driver.drain() if progress.retries else None)
    assert (progress.state, progress.failed) == ("drained", {})


def test_units_in_flight_are_waited_for_when_draining(accepted: Accepted) -> None:
    """Their answers come only after the drain was asked for."""
    asked = threading.Event()

    class Slow(ScriptedCluster):
        def submit(
            self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
        ) -> None:
            def answer() -> None:
                asked.wait()
                done(report_of(unit))

            self.submitted.append((unit.index, attempt, 0.0))
            threading.Thread(target=answer).start()

    cluster = Slow(lambda unit, attempt: report_of(unit))
    driver = Driver(accepted, cluster)

    def drain(progress: Progress) -> None:
        driver.drain()
        asked.set()

    progress = driver.run(drain)
    assert (progress.state, progress.totals.units, len(cluster.submitted)) == ("drained", 2, 2)


def test_a_drained_job_is_completed_by_the_next_run(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(320)])
    job = make_job(engine={"options": {"max_num_seqs": 4}})
    accepted = store(accept(job))
    cluster = make_cluster(accepted)
    driver = Driver(accepted, cluster)
    try:
        progress = driver.run(lambda progress: driver.drain() if progress.totals.units else None)
    finally:
        cluster.close()
    assert progress.state == "drained"
    done = progress.totals.units
    assert 0 < done < 20
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == done
    result = run(job, stream=io.StringIO())
    assert (result.state, result.this_run.units) == ("complete", 20 - done)
    assert read_output(tmp_path / "out")["id"].to_pylist() == list(range(320))


def test_the_limit_of_error_rows_gives_exit_code_3_and_a_higher_one_goes_on(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path
) -> None:
    write_table([{"id": index, "prompt": None if index % 2 else "fine"} for index in range(640)])
    small = {"options": {"max_num_seqs": 4}}  # two units at a time
    stopped = run(make_job(engine=small, limits={"error_rows": 10}), stream=io.StringIO())
    assert (stopped.state, stopped.exit_code) == ("limit", 3)
    assert stopped.totals.rows < 640
    result = run(make_job(engine=small, limits={"error_rows": 1000}), stream=io.StringIO())
    assert (result.state, result.exit_code, result.totals.error_rows) == ("complete", 0, 320)
    assert verify(str(tmp_path / "out")).complete


def test_a_unit_that_fails_for_good_gives_exit_code_1(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    first = write_table([{"id": index, "prompt": f"question {index}"} for index in range(32)], "in/a.parquet")
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(32, 64)], "in/b.parquet")
    store(accept(make_job()))
    first.write_bytes(first.read_bytes() + b"x")
    result = run(make_job(limits={"attempts": 1}), stream=io.StringIO())
    assert (result.state, result.exit_code, sorted(result.failed), result.totals.rows) == ("failed", 1, [0, 1], 32)
    assert not (tmp_path / "out" / layout.SUCCESS).exists()


def test_a_drain_asked_for_in_storage_is_heard(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit))
    driver = Driver(accepted, cluster)
    storage.replace(storage.join(accepted.out_uri, layout.DRAIN), str(time.time() - 3600).encode())  # by a clock that is slow
    progress = driver.run()
    assert (progress.state, cluster.submitted) == ("drained", [])
    assert progress.notes == ["`tokenmill cancel` asked this job to drain"]


def test_a_run_knows_what_earlier_runs_have_done(make_job: MakeJob, accepted: Accepted, tmp_path: Path) -> None:
    run(make_job(), stream=io.StringIO())
    for lost in sorted((tmp_path / "out").glob("part-*.parquet"))[7:]:
        lost.unlink()
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit))
    progress = Driver(accept(make_job()), cluster).run()
    assert (progress.done_before, progress.rows_before, progress.total_units, progress.total_rows) == (7, 112, 10, 160)
    assert [unit for unit, _, _ in cluster.submitted] == [7, 8, 9]


@pytest.mark.parametrize(
    ("num_units", "rows", "window_rows", "expected"),
    [(32, 41, 256, 9), (15, 16, 256, 18), (32, 31_250, 512, 3), (192, 2, 150, 77), (500, 16, 2048, 128), (1, 0, 64, 66)],
    ids=["gsm8k", "small units", "units above the window", "tiny units", "no more than the limit", "no rows"],
)
def test_units_in_flight_fill_the_window_and_two_more(num_units: int, rows: int, window_rows: int, expected: int) -> None:
    starts = [rows * unit for unit in range(num_units)]
    ranges = [RowRange(uri="a", identity="1", row_start=start, row_stop=start + rows, position=start) for start in starts]
    plan = Plan(units=tuple(WorkUnit(index=index, ranges=(part,)) for index, part in enumerate(ranges)))
    assert units_at_once(plan, window_rows) == expected


def test_at_the_cap_what_is_in_flight_is_done_and_nothing_more_begins(accepted: Accepted) -> None:
    cluster, clock = ScriptedCluster(lambda unit, attempt: report_of(unit)), FakeClock(5.0)
    driver = Driver(accepted, cluster, clock=clock, caps=Caps(deadline_s=20.0, usd_per_hour=36.0))
    progress = driver.run()
    assert progress.state == "limit"
    assert 0 < progress.totals.units < 10
    assert progress.totals.units == len(cluster.submitted)
    assert any("limits.deadline" in note and "the same command with a higher limit goes on" in note for note in progress.notes)
    assert progress.usd is not None
    assert progress.usd > 0


class ShrinkingCluster(ScriptedCluster):
    """Eighty nodes for half the table, then one."""

    def replicas(self) -> list[ReplicaState]:
        num_nodes = 80 if len(self.submitted) < 5 else 1
        return [ReplicaState(name=f"node-{node}-0", window_rows=16) for node in range(num_nodes)]


def test_what_nodes_cost_stays_spent_when_they_are_gone(accepted: Accepted) -> None:
    spent: list[float] = []
    driver = Driver(
        accepted, ShrinkingCluster(lambda unit, _: report_of(unit)), clock=FakeClock(1.0), caps=Caps(usd_per_hour=36.0, max_usd=1e6)
    )
    driver.run(lambda progress: spent.append(progress.usd or 0.0))
    assert spent == sorted(spent)
    assert spent[-1] > 0


def test_a_cap_that_is_reached_when_all_is_in_flight_changes_nothing(accepted: Accepted) -> None:
    cluster = ScriptedCluster(lambda unit, attempt: report_of(unit))
    assert Driver(accepted, cluster, caps=Caps(deadline_s=3600.0)).run().state == "complete"


@pytest.mark.parametrize(("name", "node"), [("local-0", "local"), ("nd-7-3", "nd-7"), ("alone", "alone")])
def test_replicas_are_named_after_their_node(name: str, node: str) -> None:
    assert node_of(name) == node
