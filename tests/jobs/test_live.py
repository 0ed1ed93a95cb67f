"""The view of a job that moves: what the driver said, drawn in a terminal and in a notebook."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jobs.live import Live
from jobs.live import View
from jobs.live import _Lines
from jobs.live import _Widget
from jobs.live import facts
from jobs.live import in_html
from jobs.live import in_rich
from jobs.live import view_of
from jobs.status import Status

SAID: dict[str, Any] = {
    "state": "running", "updated_at": 200.0, "began_at": 100.0, "host": "h", "error_rows": 2, "completion_tokens": 50_000,
    "output_tokens_per_s": 1000.0, "eta_s": 60, "failed_units": {}, "replicas": [{}, {}], "dashboard": "http://127.0.0.1:8787",
    "metrics": ["http://127.0.0.1:9464/metrics", "http://127.0.0.1:9465/metrics", "http://127.0.0.1:9466/metrics"],
    "errors": {"empty_prompt": 2}, "examples": [{"row": 7, "kind": "empty_prompt", "message": "column 'q' is <null>"}], "usd": 1.234,
}  # fmt: skip


REPORT = "out/_tokenmill/report.html, made by `tokenmill report` at any time"


def status(said: dict[str, Any], state: str = "running", age_s: float | None = 1.0) -> Status:
    return Status(
        name="job", fingerprint="f", out_uri="out", state=state, units_done=5, units=10, rows_done=500, rows=1000, said=said, age_s=age_s
    )


def test_a_view_has_what_the_driver_said() -> None:
    view = view_of(status(SAID))
    assert (view.tokens_per_s, view.mean_tokens_per_s, view.eta_s, view.replicas, view.usd) == (1000, 500, (60, 120), 2, 1.234)
    assert dict(facts(view)) == {
        "job": "job: running",
        "rows": "500 of 1,000 (50%) in 5 of 10 units",
        "output tok/s": "1,000 now, 500 on average",
        "time left": "1m00s to 2m00s",
        "error rows": "empty_prompt 2; row 7: empty_prompt: column 'q' is <null>",
        "cost so far": "1.23 USD",
        "replicas": "2 alive",
    }


def test_what_an_older_driver_did_not_say_is_left_out() -> None:
    assert dict(facts(view_of(status({})))) == {"job": "job: running", "rows": "500 of 1,000 (50%) in 5 of 10 units"}


def test_an_ended_job_has_no_speed_now_and_no_replicas() -> None:
    words = dict(facts(view_of(status(SAID, state="drained"))))
    assert words["output tok/s"] == "500 on average"
    assert not {"replicas", "time left"} & set(words)


def test_a_job_that_moves_has_links_to_what_serves_it() -> None:
    assert view_of(status(SAID)).links == (
        ("dashboard", "http://127.0.0.1:8787"),
        ("metrics", "http://127.0.0.1:9464/metrics, of replicas up to http://127.0.0.1:9466/metrics"),
        ("report", REPORT),
    )
    alone = view_of(status({**SAID, "dashboard": None, "metrics": ["http://h:9464/metrics"]}))
    assert alone.links == (("metrics", "http://h:9464/metrics"), ("report", REPORT))


@pytest.mark.parametrize("said", [{}, {"dashboard": 3, "metrics": "x"}, {"metrics": []}])
def test_what_serves_nothing_has_its_report_alone(said: dict[str, Any]) -> None:
    assert view_of(status(said)).links == (("report", REPORT),)


def test_an_ended_job_serves_nothing_any_more() -> None:
    assert view_of(status(SAID, state="complete")).links == (("report", REPORT),)


def test_a_driver_that_is_silent_is_said_to_be() -> None:
    assert dict(facts(view_of(status(SAID, age_s=45.0))))["last heard of"] == "45s ago"


def test_html_is_escaped_and_shows_the_share() -> None:
    drawn = in_html(view_of(status(SAID)))
    assert "&lt;null&gt;" in drawn
    assert "<null>" not in drawn
    assert "width:50.0%" in drawn


def test_html_has_addresses_of_the_web_to_follow_and_no_others() -> None:
    said = {**SAID, "dashboard": "javascript:alert(1)", "metrics": ['http://h/"><script>']}
    drawn = in_html(view_of(status(said)))
    assert drawn.count("<a href=") == 1
    assert '<a href="http://h/&quot;&gt;&lt;script&gt;"' in drawn
    assert "<script>" not in drawn


def test_a_terminal_shows_the_same_words() -> None:
    console = Console(width=100, record=True)
    console.print(in_rich(View(name="j", state="running", rows=10, rows_done=5, units=2, units_done=1)))
    text = console.export_text()
    assert "5 of 10 (50%) in 1 of 2 units" in text
    assert "━" * 20 + "╌" * 20 in text


def test_a_canary_can_be_looked_at_once_it_is_over() -> None:
    seen = {canary: view_of(status({**SAID, "canary": canary})).canary_over for canary in ("", "running", "done", "stopped")}
    assert seen == {"": False, "running": False, "done": True, "stopped": True}
    assert not view_of(status({})).canary_over


# The drawings, each with what it draws on.


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_view_renews_itself_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    live = Live()
    live.update(view_of(status(SAID)))
    live.update(view_of(status({}, state="complete")))
    live.close()
    shown = screen.getvalue()
    first, *again = shown.split("job: complete")
    assert again  # rich draws the last one twice
    assert [first.count(words) for words in ("job: running", "http://127.0.0.1:8787", REPORT)] == [1, 1, 1]
    assert "\x1b[1A" in first  # back up, over what was drawn before


def test_where_output_is_a_file_lines_come_every_ten_seconds_and_links_once(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter(range(1000, 1100))
    lines = _Lines(lambda: next(seconds))
    for _ in range(25):
        lines.update(view_of(status(SAID)))
    lines.update(view_of(status({}, state="drained")))
    lines.close()
    said = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in said] == [
        "job: running", "dashboard: http://127.0.0.1:8787", "job: running", "job: running", "job: drained", f"report: {REPORT}",
    ]  # fmt: skip


def test_elsewhere_than_on_a_terminal_lines_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    live = Live()
    live.update(view_of(status(SAID)))
    live.close()
    assert stream.getvalue().startswith("job: running; 500 of 1,000 (50%) in 5 of 10 units; ")


def test_a_widget_is_displayed_once_and_keeps_the_last_view() -> None:
    ipywidgets = pytest.importorskip("ipywidgets")
    displayed: list[Any] = []
    widget = _Widget(ipywidgets, displayed.append)
    for said, state in ((SAID, "running"), ({}, "complete")):
        widget.update(view_of(status(said, state=state)))
    widget.close()
    (shown,) = displayed
    assert shown.value == in_html(view_of(status({}, state="complete")))
