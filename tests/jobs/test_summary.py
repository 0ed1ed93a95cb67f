"""The summary at the end: what was done, what went wrong, what to do next."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from jobs.summary import RunResult
from jobs.summary import print_summary
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount
from schemas.manifest import Totals

_RESUME = "tokenmill run job.yaml"


def account(**replica: Any) -> RunAccount:
    """12,000 tokens in 75 s, of a replica that makes 200 in a second."""
    seconds = {"start": 2.5, "busy": 60.0, "starved": 1.5, "commit_blocked": 10.0, "tail": 0.0, "lost": 0.0}
    only = {"name": "local-0", "processes": 1, "seconds": seconds, "rows": 1200, "prompt_tokens": 30_000, "generated_tokens": 12_000}
    only |= {"output_tokens": 12_000, "busy_s": 60.0, "busy_tokens": 12_000, **replica}
    return RunAccount(
        run="r", fingerprint="f" * 64, state="complete", host="h", whole=True, began_at=25.0, ended_at=100.0, elapsed_s=75.0, units=3,
        rows=1200, error_rows=5, prompt_tokens=30_000, output_tokens=12_000, retries=0, profile="p", engine={}, versions={},
        replicas=(ReplicaAccount(**only),),
    )  # fmt: skip


def result(**changes: Any) -> RunResult:
    totals = Totals(
        units=3,
        rows=1200,
        error_rows=5,
        prompt_tokens=30_000,
        completion_tokens=12_000,
        errors={"empty_prompt": 3, "prompt_too_long": 2},
        finish_reasons={"stop": 1000, "length": 195, "error": 5},
        examples=[{"row": 7, "kind": "empty_prompt", "message": "column 'prompt' is null [or not]"}],
        started_at=100.0,
        finished_at=110.0,
    )
    values: dict[str, Any] = {
        "state": "complete",
        "exit_code": 0,
        "out_uri": "/data/out",
        "fingerprint": "f" * 64,
        "units": 3,
        "rows": 1200,
        "totals": totals,
        "this_run": totals,
        "wall_s": 75.0,
        "start_s": {"local-0": 2.5},
        "account": account(),
    }
    return RunResult(**{**values, **changes})


def printed(given: RunResult) -> str:
    stream = io.StringIO()
    print_summary(given, Console(file=stream, width=200, soft_wrap=True), _RESUME)
    return stream.getvalue()


def line(text: str, first: str) -> str:
    """The rest of the line that begins with `first`."""
    (found,) = [row for row in text.splitlines() if row.startswith(first)]
    return found.removeprefix(first).strip()


def test_a_complete_job_is_summed_up_with_speed_and_proof() -> None:
    text = printed(result())
    assert line(text, "state") == "complete"
    assert line(text, "rows") == "1,200 of 1,200 in 3 of 3 units"
    assert line(text, "completions") == "1,195 (1,000 stop, 195 length)"
    assert line(text, "error rows") == "5 (3 empty_prompt, 2 prompt_too_long)"
    assert line(text, "tokens") == "30,000 prompt, 12,000 output"
    assert line(text, "speed") == "1,200.0 output tokens/s, 4,200.0 with prompts, over 10s"
    assert line(text, "this run") == "1,200 rows in 1m15s"
    assert line(text, "replica local-0") == "74.0 s: start 2.5, busy 60.0, starved 1.5, commit-blocked 10.0"
    assert line(text, "raw engine") == "80.0% of what the replicas generate while their batches are at least half full"
    assert line(text, "output") == "/data/out"
    assert line(text, "proof:") == "tokenmill verify /data/out"
    assert _RESUME not in text


def test_an_error_row_is_shown_as_an_example() -> None:
    text = printed(result())
    assert "column 'prompt' is null [or not]" in text
    assert "empty_prompt" in text


@pytest.mark.parametrize(("state", "code"), [("failed", 1), ("limit", 3), ("drained", 130)])
def test_a_job_that_is_not_done_says_how_to_go_on(state: str, code: int) -> None:
    text = printed(result(state=state, exit_code=code))
    assert line(text, "state") == state
    assert line(text, "to go on:") == _RESUME
    assert "proof:" not in text


def test_failed_units_are_named_with_their_reasons() -> None:
    text = printed(result(state="failed", exit_code=1, failed={2: "UnitError: cannot read rows [0, 5) of in/[old]/a.parquet"}))
    assert line(text, "unit 2 failed:") == "UnitError: cannot read rows [0, 5) of in/[old]/a.parquet"


def test_objects_left_out_and_new_ones_are_named() -> None:
    text = printed(result(skipped=(("in/b.parquet", "it has no rows"),), new_objects=("in/c.parquet", "in/d.parquet")))
    assert line(text, "left out in/b.parquet:") == "it has no rows"
    assert "2 new input objects were not taken" in text
    assert "in/c.parquet" in text


@pytest.mark.parametrize("out_uri", ["/data/[bold]/out", "/data/[/x]/out", "/data/with space/out"])
def test_an_output_is_named_as_it_is_called(out_uri: str) -> None:
    text = printed(result(out_uri=out_uri))
    assert line(text, "output") == out_uri


def test_the_command_that_proves_can_be_pasted() -> None:
    assert line(printed(result(out_uri="/data/with space/out")), "proof:") == "tokenmill verify '/data/with space/out'"


def test_a_run_that_had_nothing_to_do_claims_no_speed() -> None:
    text = printed(result(this_run=Totals(), start_s={}, account=None))
    assert "speed" not in text
    assert line(text, "this run") == "0 rows in 1m15s"


def test_a_replica_that_was_started_again_says_so() -> None:
    seconds = {"start": 5.0, "busy": 50.0, "starved": 0.0, "commit_blocked": 0.0, "tail": 1.0, "lost": 18.0}
    text = printed(result(account=account(processes=2, seconds=seconds)))
    assert line(text, "replica local-0") == "74.0 s: start 5.0, busy 50.0, tail 1.0, lost 18.0, started 2 times"


def test_a_share_is_not_claimed_where_no_batch_was_half_full() -> None:
    assert "raw engine" not in printed(result(account=account(busy_s=0.0, busy_tokens=0)))


def test_a_result_is_plain_data() -> None:
    values = json.loads(json.dumps(result(failed={2: "no"}, retries=1).to_dict()))
    assert (values["state"], values["rows"], values["rows_done"], values["error_rows"]) == ("complete", 1200, 1200, 5)
    assert (values["this_run"]["output_tokens_per_s"], values["this_run"]["generate_s"], values["retries"]) == (1200.0, 10.0, 1)
    assert values["failed_units"] == {"2": "no"}
    assert values["account"]["replicas"][0]["seconds"]["busy"] == 60.0
