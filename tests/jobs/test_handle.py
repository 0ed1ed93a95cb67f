"""The handle of a job that has only just begun, goes on from an earlier run, is not done yet, or was killed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import jobs
from jobs.handle import Job
from jobs.handle import JobFailed
from tests.commands import wait_until

ROWS = 400
TABLE = pa.table({"id": list(range(ROWS)), "q": [f"question {row}" for row in range(ROWS)]})
COLUMNS = ["id", "q", "completion", "finish_reason", "prompt_tokens", "completion_tokens", "error"]
SLOW = {"kind": "simulated", "options": {"decode_tokens_per_s": 700, "max_num_seqs": 4, "lengths": "max"}}
FAST = {"kind": "simulated", "options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "lengths": "max"}}


def asked_of(model: Path, output: Path, engine: dict[str, Any]) -> dict[str, Any]:
    return {"model": str(model), "prompt": "q", "output": str(output), "max_tokens": 32, "engine": engine}


def parts(job: Job) -> list[str]:
    return [str(path) for path in sorted(Path(job.output).glob("part-*.parquet"))]


# The first moments.


@pytest.mark.slow
def test_a_handle_answers_from_the_first_moment(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = jobs.submit(TABLE, **asked_of(tiny_model, tmp_path / "out", SLOW))
    status = job.status()
    assert (status.state, status.rows_done, status.said) == ("starting", 0, {})
    assert repr(job) == f"Job({job.output!r}): starting, 0 of 0 rows"
    rows = job.to_arrow()  # waits for the plan, not for rows
    assert rows.column_names == COLUMNS
    assert f"so far: {rows.num_rows} of 400 rows" in capsys.readouterr().err
    assert job.sample(3).note.endswith("of 400 rows are committed")
    job.cancel()
    assert job.wait(show=False).status().state == "drained"


@pytest.mark.slow
def test_a_job_that_is_drained_before_it_begins_does_nothing(tiny_model: Path, tmp_path: Path) -> None:
    job = jobs.submit(TABLE, **asked_of(tiny_model, tmp_path / "out", SLOW))
    assert job.cancel() == "starting"
    status = job.wait(show=False).status()
    assert (status.state, status.rows_done, status.rows) == ("drained", 0, ROWS)


@pytest.mark.slow
def test_whoever_asks_for_rows_of_a_job_that_is_refused_hears_why(tiny_model: Path, tmp_path: Path) -> None:
    job = jobs.submit(str(tmp_path / "none" / "*.parquet"), **asked_of(tiny_model, tmp_path / "out", SLOW))
    with pytest.raises(JobFailed, match=r"input.uri: no file matches"):
        job.to_arrow()
    with pytest.raises(JobFailed, match=r"input.uri: no file matches"):
        job.cancel()
    assert repr(job) == f"Job({job.output!r}): ended before it began; .wait() says why"


@pytest.mark.slow
def test_an_output_that_is_a_file_is_refused_in_words(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.parquet").touch()
    (tmp_path / "out").touch()
    job = jobs.submit(str(tmp_path / "in.parquet"), **asked_of(tiny_model, tmp_path / "out", SLOW))
    assert job.status().state == "starting"
    with pytest.raises(JobFailed, match="is a file"):
        job.wait(show=False)


# A job that was drained half-way.


@pytest.fixture(scope="module")
def unfinished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Drained with some units done and others not."""
    job = jobs.submit(TABLE, **asked_of(tiny_model, tmp_path_factory.mktemp("unfinished") / "out", SLOW))
    wait_until(lambda: parts(job), "a part")
    job.cancel()
    return job.wait(show=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame:Warning")  # pandas 3.1 of dask
@pytest.mark.parametrize("tool", ["duckdb", "polars", "pandas", "dataset", "dask"])
def test_an_unfinished_output_reads_the_same_in_every_usual_tool(unfinished: Job, tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = jobs.attach(unfinished.output).to_arrow(["id", "completion"])
    assert 0 < rows.num_rows < ROWS
    assert f"so far: {rows.num_rows} of 400 rows are committed" in capsys.readouterr().err
    assert unfinished.status().rows_done == rows.num_rows
    files, glob = parts(unfinished), f"{unfinished.output}/part-*.parquet"
    if tool == "duckdb":
        table = f"read_parquet('{glob}', filename = true, file_row_number = true)"
        query = f"select id, completion from {table} order by filename, file_row_number"
        found = pytest.importorskip("duckdb").sql(query).fetchall()
    elif tool == "polars":
        found = pytest.importorskip("polars").read_parquet(glob).select("id", "completion").rows()
    elif tool == "pandas":
        pandas = pytest.importorskip("pandas")
        frame = pandas.concat([pandas.read_parquet(file) for file in files])
        found = list(zip(frame["id"], frame["completion"], strict=True))
    elif tool == "dataset":
        import pyarrow.dataset

        read = pyarrow.dataset.dataset(unfinished.output, format="parquet", ignore_prefixes=["_"]).to_table(["id", "completion"])
        found = [(row["id"], row["completion"]) for row in read.to_pylist()]
    else:
        pytest.importorskip("pandas")
        frame = pytest.importorskip("dask.dataframe").read_parquet(glob)[["id", "completion"]].compute()
        found = list(zip(frame["id"], frame["completion"], strict=True))
    assert found == [(row["id"], row["completion"]) for row in rows.to_pylist()]


@pytest.mark.slow
def test_frames_of_an_unfinished_job_say_how_much_there_is(unfinished: Job, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("polars")
    rows_done = unfinished.status().rows_done
    assert len(unfinished.to_pandas(["id"])) == unfinished.to_polars(["id"]).height == rows_done
    assert capsys.readouterr().err.count(f"so far: {rows_done} of 400 rows are committed") == 2
    assert unfinished.sample(2).note == f"so far: {rows_done} of 400 rows are committed"
    assert repr(unfinished) == f"Job({unfinished.output!r}): drained, {rows_done} of 400 rows"


@pytest.mark.slow
def test_going_on_is_not_taken_for_the_end_of_the_run_before(tiny_model: Path, tmp_path: Path) -> None:
    asked = asked_of(tiny_model, tmp_path / "out", SLOW)
    first = jobs.submit(TABLE, **asked)
    wait_until(lambda: parts(first), "a part")
    first.cancel()
    rows_done = first.wait(show=False).status().rows_done
    second = jobs.submit(TABLE, **asked)
    status = second.status()
    assert (status.state, status.rows_done, status.rows) == ("starting", rows_done, ROWS)
    assert second.wait(0.1, show=False).status().state == "starting"
    assert second.cancel() == "starting"
    assert second.wait(show=False).status().state == "drained"
    assert jobs.run(TABLE, **{**asked, "engine": FAST}, show=False).verify().complete


# Interrupted, and killed.


@pytest.mark.chaos
def test_an_interrupt_ends_the_waiting_and_not_the_job(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    before_it = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started pytest in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before_it))
    job = jobs.submit(TABLE, **asked_of(tiny_model, tmp_path / "out", SLOW))
    wait_until(lambda: parts(job), "a part")
    me = threading.get_ident()
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(me, signal.SIGINT))
    timer.start()
    assert job.wait(show=False) is job
    timer.join()
    assert "the job goes on" in capsys.readouterr().err
    before = len(parts(job))
    wait_until(lambda: len(parts(job)) > before, "one more part")
    assert job.cancel() in ("starting", "running")  # its driver says so every five seconds
    assert job.wait(show=False).status().state == "drained"


@pytest.mark.chaos
def test_a_killed_job_is_no_success_and_goes_on_when_asked_again(tiny_model: Path, tmp_path: Path) -> None:
    asked = asked_of(tiny_model, tmp_path / "out", SLOW)
    job = jobs.submit(TABLE, **asked)
    started = job._started
    assert started is not None
    wait_until(lambda: parts(job), "a part")
    os.kill(started.pid, signal.SIGKILL)
    with pytest.raises(JobFailed, match=r"killed \(SIGKILL\), as Linux does where memory runs out; .* run the same again") as caught:
        job.wait(show=False)
    assert str(caught.value).endswith(f"its log: {started.log_path}")
    assert job.status().state == "interrupted"
    assert 0 < job.to_arrow().num_rows < ROWS
    assert jobs.run(TABLE, **{**asked, "engine": FAST}, show=False).verify().complete


# Errors in a notebook.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "line"),
    [
        ("jobs.run('in.parquet', prmpt='q')", "JobError: prmpt: unknown; fields are name"),
        ("jobs.attach('nowhere')", "JobError: "),
        ("jobs.run(3)", "JobError: found a int; give a JobSpec"),
    ],
)
def test_a_notebook_shows_the_message_and_no_traceback(cell: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.run_cell(f"import jobs\n{cell}")
    said = capsys.readouterr().out.strip()
    assert line in said
    assert len(said.splitlines()) == 1
