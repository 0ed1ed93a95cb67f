"""Speed out of counters, and the lines that a person reads while a job runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.cluster.cluster import ReplicaState
from jobs.driver import Progress
from jobs.driver import State
from jobs.progress import LiveDisplay
from jobs.progress import PlainDisplay
from jobs.progress import Speed
from jobs.progress import SpeedMeter
from jobs.progress import make_display
from jobs.progress import progress_line
from jobs.progress import seconds_words
from schemas.manifest import Totals


class FakeClock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(*replicas: tuple[int, int], state: State = "running", rows_before: int = 0, totals: Totals | None = None) -> Progress:
    """Replicas are (rows, completion tokens)."""
    return Progress(
        state=state,
        total_units=10,
        total_rows=1000,
        done_before=rows_before // 100,
        rows_before=rows_before,
        totals=totals or Totals(),
        replicas=[
            ReplicaState(name=f"r{number}", window_rows=8, rows=rows, completion_tokens=tokens)
            for number, (rows, tokens) in enumerate(replicas)
        ],
    )


def test_speed_is_the_difference_of_counters_over_time() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    assert meter.measure(progress((0, 0), (0, 0))) == Speed()
    clock.now += 4
    assert meter.measure(progress((10, 100), (30, 300))) == Speed(tokens_per_s=100.0, rows_per_s=10.0, eta_s=96.0)


def test_speed_is_not_guessed_from_less_than_a_second() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((0, 0)))
    clock.now += 0.5
    assert meter.measure(progress((10, 100))) == Speed()


def test_speed_forgets_what_lies_before_its_window() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    tokens = 0
    for _ in range(60):  # a slow minute
        meter.measure(progress((tokens // 10, tokens)))
        clock.now, tokens = clock.now + 1, tokens + 10
    for _ in range(60):  # a quick one
        speed = meter.measure(progress((tokens // 10, tokens)))
        clock.now, tokens = clock.now + 1, tokens + 1000
    assert speed.tokens_per_s == pytest.approx(1000.0)


def test_without_rows_there_is_no_eta() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((0, 0)))
    clock.now += 5
    assert meter.measure(progress((0, 50))).eta_s is None


def test_the_eta_leaves_out_what_earlier_runs_did() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((0, 0), rows_before=500))
    clock.now += 10
    assert meter.measure(progress((100, 1000), rows_before=500)).eta_s == 40.0


def test_a_lost_replica_gives_no_negative_speed() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    for rows in (0, 100, 200):
        meter.measure(progress((rows, 10 * rows), (rows, 10 * rows)))
        clock.now += 2
    for rows in (300, 400):
        speed = meter.measure(progress((rows, 10 * rows)))
        assert speed.tokens_per_s >= 0
        assert speed.rows_per_s >= 0
        clock.now += 2
    assert speed.tokens_per_s == 500.0


def test_what_a_kept_engine_did_for_an_earlier_job_is_not_counted() -> None:
    """`tokenmill worker` keeps its engines from one job to the next."""
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((5_000, 50_000), (7_000, 70_000)))
    clock.now += 10
    assert meter.measure(progress((5_050, 50_500), (7_050, 70_500))) == Speed(tokens_per_s=100.0, rows_per_s=10.0, eta_s=90.0)


def test_a_kept_engine_that_joins_late_brings_no_leap() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((0, 0)))
    clock.now += 5
    meter.measure(progress((50, 500), (9_000, 90_000)))
    clock.now += 5
    assert meter.measure(progress((100, 1000), (9_050, 90_500))) == Speed(
        tokens_per_s=150.0, rows_per_s=15.0, eta_s=pytest.approx(850 / 15)
    )


def test_rows_that_a_lost_replica_had_answered_stay_answered() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((0, 0), (0, 0)))
    clock.now += 10
    meter.measure(progress((100, 1000), (100, 1000)))
    clock.now += 2
    meter.measure(progress((120, 1200)))
    clock.now += 10
    assert meter.measure(progress((220, 2200))) == Speed(tokens_per_s=100.0, rows_per_s=10.0, eta_s=68.0)


def test_a_new_engine_of_a_replica_counts_from_nothing() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((300, 3000)))
    clock.now += 10
    meter.measure(progress((20, 200)))
    clock.now += 10
    assert meter.measure(progress((120, 1200))) == Speed(tokens_per_s=100.0, rows_per_s=10.0, eta_s=88.0)


def test_what_replicas_did_while_out_of_reach_is_counted_and_makes_no_speed() -> None:
    clock = FakeClock()
    meter = SpeedMeter(clock)
    meter.measure(progress((0, 0)))
    clock.now += 2
    meter.measure(progress())
    clock.now += 60
    meter.measure(progress((600, 6000)))
    clock.now += 5
    assert meter.measure(progress((650, 6500))) == Speed(tokens_per_s=100.0, rows_per_s=10.0, eta_s=35.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (72, "1m12s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (7325, "2h02m"),
        (90_000, "25h00m"),
    ],
)
def test_seconds_are_said_in_words(seconds: float, words: str) -> None:
    assert seconds_words(seconds) == words


def test_a_line_says_rows_units_speed_errors_eta_and_replicas() -> None:
    at = progress((5, 50), rows_before=100, totals=Totals(units=2, rows=200, error_rows=7))
    at.units_in_flight = 3
    assert progress_line(at, Speed(tokens_per_s=1234.5, rows_per_s=10, eta_s=72)) == (
        "running: 300 of 1,000 rows, 3 of 10 units (3 in flight), 1,234 output tok/s, 7 errors, ETA 1m12s, 1 replicas"
    )


def test_a_line_names_failed_units_and_gives_no_eta_while_draining() -> None:
    at = progress((5, 50), state="draining")
    at.failed = {3: "UnitError: no"}
    line = progress_line(at, Speed(eta_s=72))
    assert "1 units failed" in line
    assert "ETA" not in line


def test_plain_lines_come_every_ten_seconds_and_whenever_the_state_changes() -> None:
    clock, stream = FakeClock(), io.StringIO()
    display = PlainDisplay(stream, clock)
    for _ in range(25):  # seconds
        display.update(progress((0, 0)), Speed())
        clock.now += 1
    assert len(stream.getvalue().splitlines()) == 3
    display.update(progress((0, 0), state="draining"), Speed())
    assert stream.getvalue().splitlines()[3].startswith("draining: ")


def test_plain_lines_are_what_was_said_and_nothing_else() -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.say("replica local-0 [red]is[/red] ready")
    display.close()
    assert stream.getvalue() == "replica local-0 [red]is[/red] ready\n"


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    assert isinstance(make_display(io.StringIO()), PlainDisplay)


def test_the_live_display_shows_share_line_and_dashboard_and_keeps_what_was_said() -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=160, color_system=None))
    at = progress((5, 50), totals=Totals(units=5, rows=500))
    at.dashboard = "http://127.0.0.1:8787/status"
    display.say("left out: /data/[old]/a.parquet: it has no rows")
    display.update(at, Speed(tokens_per_s=10))
    display.close()
    shown = stream.getvalue()
    assert "left out: /data/[old]/a.parquet: it has no rows" in shown
    assert "50%" in shown
    assert "running: 500 of 1,000 rows" in shown
    assert "dashboard http://127.0.0.1:8787/status" in shown


def test_the_live_display_shows_an_empty_table_without_dividing_by_it() -> None:
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=160))
    at = progress()
    at.total_rows = 0
    display.update(at, Speed())
    display.close()
