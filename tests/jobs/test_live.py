"""The view of a job that moves: what the driver said, drawn in a terminal and in a notebook."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs.live import View
from jobs.live import facts
from jobs.live import in_html
from jobs.live import in_rich
from jobs.live import view_of
from jobs.status import Status

SAID: dict[str, Any] = {
    "state": "running", "updated_at": 200.0, "began_at": 100.0, "host": "h", "error_rows": 2, "completion_tokens": 50_000,
    "output_tokens_per_s": 1000.0, "eta_s": 60, "failed_units": {}, "replicas": [{}, {}], "dashboard": "http://127.0.0.1:8787",
    "errors": {"empty_prompt": 2}, "examples": [{"row": 7, "kind": "empty_prompt", "message": "column 'q' is <null>"}], "usd": 1.234,
}  # fmt: skip


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
        "dashboard": "http://127.0.0.1:8787",
    }


def test_what_an_older_driver_did_not_say_is_left_out() -> None:
    assert dict(facts(view_of(status({})))) == {"job": "job: running", "rows": "500 of 1,000 (50%) in 5 of 10 units"}


def test_an_ended_job_has_no_speed_now_and_no_replicas() -> None:
    words = dict(facts(view_of(status(SAID, state="drained"))))
    assert words["output tok/s"] == "500 on average"
    assert not {"replicas", "time left", "dashboard"} & set(words)


def test_a_driver_that_is_silent_is_said_to_be() -> None:
    assert dict(facts(view_of(status(SAID, age_s=45.0))))["last heard of"] == "45s ago"


def test_html_is_escaped_and_shows_the_share() -> None:
    drawn = in_html(view_of(status(SAID)))
    assert "&lt;null&gt;" in drawn
    assert "<null>" not in drawn
    assert "width:50.0%" in drawn


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
