"""What notebooks call: a job in any form in, a handle out, whose process is nobody's child for long."""

from __future__ import annotations

import asyncio
import inspect
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import jobs
from jobs.api import run
from jobs.handle import Job
from jobs.handle import JobFailed
from jobs.handle import Rows
from jobs.live import _Output
from jobs.notebook import make_job
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import PromptMessages
from tests.jobs.batch_jobs import batch_job

SIMULATED = {"kind": "simulated", "options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7}}
SLOW = {"kind": "simulated", "options": {"decode_tokens_per_s": 300, "max_num_seqs": 4, "lengths": "max"}}
TABLE = pa.table({"id": list(range(40)), "q": [f"question {row}" for row in range(39)] + [None]})


@pytest.fixture
def fields(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a quick job; its input is given apart."""
    return {"model": str(tiny_model), "prompt": "q", "output": str(tmp_path / "out"), "max_tokens": 8, "engine": SIMULATED}


# A job in any form.


def test_flat_keywords_and_sections_make_a_job(fields: dict[str, Any], tmp_path: Path) -> None:
    spec = make_job(str(tmp_path / "in.parquet"), {**fields, "sampling": {"top_p": 0.9}, "temperature": 0.5, "system": "Be brief."})
    assert (spec.sampling.max_tokens, spec.sampling.top_p, spec.sampling.temperature) == (8, 0.9, 0.5)
    assert (spec.input.system, spec.engine.kind, spec.input.uris) == ("Be brief.", "simulated", [str(tmp_path / "in.parquet")])


def test_a_job_file_and_fields_over_it(fields: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"model": "demo", "input": {"uri": "in.parquet", "prompt": "q"}, "output": {"uri": "out"}}))
    assert make_job(file, {"max_tokens": 3}).sampling.max_tokens == 3


def test_paths_are_absolute_since_the_process_may_be_elsewhere(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # not the demo model
    spec = make_job("in.parquet", {**fields, "output": "out", "model": "demo"})
    assert (spec.output.uri, spec.input.uris, spec.model) == (str(tmp_path / "out"), [str(tmp_path / "in.parquet")], "demo")


def test_earlier_outputs_are_one_or_several_and_found_from_elsewhere_too(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    old = str(tmp_path / "old")
    assert [make_job("in.parquet", {**fields, "reuse": given}).reuse for given in ("old", Path("old"))] == [[old], [old]]
    assert make_job("in.parquet", {**fields, "reuse": ("old", Path("older"))}).reuse == [old, str(tmp_path / "older")]
    with pytest.raises(JobError, match="reuse"):
        make_job("in.parquet", {**fields, "reuse": 3})


@pytest.mark.parametrize(
    ("job", "more", "message"),
    [
        ("in.parquet", {"prmpt": "q"}, "prmpt: unknown; fields are name, model, prompt"),
        (3, {}, "found a int; give a JobSpec, a path, a pyarrow"),
        (TABLE, {"output": None}, "output: a table needs a folder"),
        (TABLE.slice(0, 0), {}, "the table has no rows"),
        (pa.table({}), {}, "the table has no columns"),
        ("in.parquet", {"sampling": {"tempature": 1}}, "sampling.tempature: unknown key"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(fields: dict[str, Any], job: object, more: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_job(job, {**fields, **more})


def test_a_spec_says_all(fields: dict[str, Any], tmp_path: Path) -> None:
    spec = make_job("in.parquet", fields)
    assert isinstance(make_job(spec, {}), JobSpec)
    with pytest.raises(JobError, match="a JobSpec says all"):
        make_job(spec, {"max_tokens": 9})


def test_messages_take_the_place_of_a_job_files_prompt_and_stand_beside_none(fields: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"model": "demo", "input": {"uri": "in.parquet", "prompt": "q"}, "output": {"uri": "out"}}))
    assert make_job(file, {"messages": "chat"}).input.source == PromptMessages(messages="chat")
    with pytest.raises(JobError, match="prompt and messages: give one of them"):
        make_job("in.parquet", {**fields, "messages": "chat"})


def test_a_job_for_azure_batch_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    data = batch_job()
    sections = {name: data[name] for name in ("input", "storage", "cluster")}
    with pytest.raises(JobError, match=r"put onto Batch by `tokenmill submit job.yaml`.*jobs.attach\('az://results/night'\)"):
        jobs.submit(TABLE, model=data["model"], output="az://results/night", **sections)


def test_what_is_public_is_offered_by_name_and_by_keyword() -> None:
    assert dir(jobs) == ["Job", "JobSpec", "attach", "load_job", "parse_job", "run", "submit"]
    asked, run = (inspect.signature(call).parameters for call in (jobs.submit, jobs.run))
    usual = {"model", "prompt", "messages", "output", "max_tokens", "temperature", "engine", "cluster", "canary", "reuse", "storage"}
    assert usual < set(asked)
    assert {name: each for name, each in run.items() if name != "show"} == dict(asked)
    assert [name for name, each in asked.items() if each.kind is each.KEYWORD_ONLY and each.annotation is each.empty] == []


# Tables are staged by what is in them.


def frames() -> list[tuple[str, Callable[[], Any]]]:
    def pandas() -> Any:
        return pytest.importorskip("pandas").DataFrame(TABLE.to_pydict())

    def polars() -> Any:
        return pytest.importorskip("polars").from_arrow(TABLE)

    def dask() -> Any:
        pytest.importorskip("pandas")
        return pytest.importorskip("dask.dataframe").from_pandas(TABLE.to_pandas(), npartitions=3)

    return [("pyarrow", lambda: TABLE), ("pandas", pandas), ("polars", polars), ("dask", dask)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "make"), frames(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_table_of_any_kind_becomes_parquet_once(fields: dict[str, Any], kind: str, make: Callable[[], Any], tmp_path: Path) -> None:
    first, again = (make_job(make(), fields).input.uris for _ in range(2))
    assert first == again
    files = sorted(Path(first[0]).glob("*.parquet"))
    assert len(files) == (3 if kind == "dask" else 1)
    read = pa.concat_tables([pq.read_table(file) for file in files])
    assert read.column("q").to_pylist() == TABLE.column("q").to_pylist()
    assert read.column("id").to_pylist() == TABLE.column("id").to_pylist()


def test_another_table_is_another_input_and_other_chunks_are_not(fields: dict[str, Any]) -> None:
    whole = make_job(TABLE, fields).input.uris
    chunked = pa.concat_tables([TABLE.slice(0, 7), TABLE.slice(7)])
    assert make_job(chunked, fields).input.uris == whole
    assert make_job(TABLE.slice(0, 39), fields).input.uris != whole


# The handle, of a real process.


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that ran to its end."""
    out = str(tmp_path_factory.mktemp("finished") / "out")
    return jobs.run(TABLE, model=str(tiny_model), prompt="q", output=out, max_tokens=8, engine=SIMULATED, show=False)


@pytest.mark.slow
def test_rows_of_a_finished_job_come_back_in_order(finished: Job) -> None:
    assert repr(finished) == f"Job({finished.output!r}): complete, 40 of 40 rows"
    assert finished.to_arrow().column("id").to_pylist() == list(range(40))
    assert finished.to_arrow(["completion", "id"]).column_names == ["completion", "id"]
    assert finished.errors().column("id").to_pylist() == [39]
    assert finished.verify().complete
    assert finished.report().num_requests == 40
    assert Path(finished.page()).read_text().startswith("<!")
    with pytest.raises(JobError, match=r"columns: found nope; this output has id, q, completion"):
        finished.to_arrow(["nope"])


@pytest.mark.slow
def test_a_sample_is_from_all_over_and_can_be_looked_at(finished: Job) -> None:
    sample = finished.sample(4)
    assert [row["row"] for row in sample.rows] == [0, 10, 20, 30]
    assert "question 10" in repr(sample)
    assert "<table>" in sample._repr_html_()
    assert len(finished.sample(0)) == 0
    assert len(finished.sample(1000)) == 40


class Screen:
    """What a notebook displays, and the handle that it gives for it."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def __call__(self, shown: Any, **_: Any) -> Screen:
        self.shown.append(shown)
        return self

    def update(self, shown: Any) -> None:
        self.shown[0] = shown


@pytest.fixture
def with_canary(make_job: Callable[..., JobSpec], write_table: Callable[..., Path]) -> str:
    """The output of a job whose canary had two bad rows; this process ran it."""
    write_table(pa.table({"prompt": [None if row in (151, 152) else f"question {row}" for row in range(400)]}))
    return run(make_job(canary=80), stream=io.StringIO()).out_uri


def test_a_notebook_shows_the_canarys_rows_as_a_table_once(with_canary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("jobs.live._notebook", lambda: _Output(screen, str))
    Job(with_canary).wait()
    _, rows = screen.shown
    assert isinstance(rows, Rows)
    assert [row["error"]["kind"] for row in rows.rows if row["row"] == 151] == ["empty_prompt"]
    assert "canary: 80 rows are done, in part-00000000-" in rows.note
    assert "question 304" in rows._repr_html_()


def test_where_what_is_said_is_kept_the_canarys_rows_are_only_named(with_canary: str, capsys: pytest.CaptureFixture[str]) -> None:
    Job(with_canary).wait()
    said = capsys.readouterr().err
    assert said.count("canary: 80 rows are done, in part-00000000-") == 1
    assert "question" not in said


@pytest.mark.slow
def test_what_a_process_stores_of_its_words_has_no_prompt_of_a_canary(
    fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = jobs.run(TABLE, canary=8, **fields)
    assert "canary: 8 rows are done" in capsys.readouterr().err
    assert "canary: 8 rows are done" in job.log(200)
    assert "question" not in job.log(200)


@pytest.mark.slow
def test_frames_of_other_libraries_have_the_same_rows(finished: Job) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("polars")
    assert finished.to_pandas(["id"])["id"].tolist() == list(range(40))
    assert finished.to_polars(["id"])["id"].to_list() == list(range(40))


@pytest.mark.slow
def test_the_same_call_again_has_nothing_to_do_and_shows_it(finished: Job, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()
    job = jobs.run(TABLE, model=str(tiny_model), prompt="q", output=finished.output, max_tokens=8, engine=SIMULATED)
    assert job.status().state == "complete"
    assert all(file.stat().st_mtime < began for file in Path(finished.output).glob("part-*.parquet"))
    assert "40 of 40 (100%)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_job_is_told_in_a_line_without_its_processes_traceback(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"input.uri: no file matches") as caught:
        jobs.run(str(tmp_path / "none" / "*.parquet"), show=False, **fields)
    assert "Traceback" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"JobFailed: {caught.value}"]


@pytest.mark.slow
def test_it_works_inside_a_running_event_loop(fields: dict[str, Any]) -> None:
    async def cell() -> str:
        return jobs.run(TABLE, show=False, **fields).status().state

    assert asyncio.run(cell()) == "complete"


def test_without_a_job_there_is_no_handle(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no job"):
        jobs.attach(str(tmp_path))
    assert repr(Job(str(tmp_path))) == f"Job({str(tmp_path)!r}): not begun yet"


def test_html_of_rows_is_escaped() -> None:
    shown = Rows(({"q": "<script>alert(1)</script>"},), "<b>")._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "<b>" not in shown


@pytest.mark.chaos
def test_a_job_outlives_the_kernel_and_another_process_attaches_and_drains_it(fields: dict[str, Any], tmp_path: Path) -> None:
    """The "kernel" is a Python process that is killed once the job has committed something."""
    pq.write_table(pa.table({"q": [f"question {row}" for row in range(400)]}), tmp_path / "in.parquet")
    code = (
        f"import jobs, time\njob = jobs.submit({str(tmp_path / 'in.parquet')!r}, **{ {**fields, 'engine': SLOW, 'max_tokens': 32}!r})\n"
        "print(job._started.pid, flush=True)\ntime.sleep(600)\n"
    )
    kernel = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert kernel.stdout is not None
    pid = int(kernel.stdout.readline())
    kernel.kill()
    kernel.wait()
    kernel.stdout.close()
    deadline = time.monotonic() + 60
    while not list(Path(fields["output"]).glob("part-*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    job = jobs.attach(fields["output"])
    assert job.status().state in ("running", "starting")
    some = job.to_arrow()
    assert 0 < some.num_rows < 400
    rows = [int(text.split()[1]) for text in some.column("q").to_pylist()]
    assert rows == sorted(set(rows))  # a later unit may have been first; what is there is in order
    assert job.cancel() in ("running", "starting")
    assert job.wait(60, show=False).status().state == "drained"
    deadline = time.monotonic() + 30
    while _runs(pid):  # storing its last account
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # of a parent that does not look after it
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame:Warning")  # pandas 3.1 of dask
@pytest.mark.parametrize("tool", ["duckdb", "polars", "pandas", "dataset", "dask"])
def test_committed_parts_are_read_by_every_usual_tool(finished: Job, tool: str) -> None:
    glob = f"{finished.output}/part-*.parquet"
    if tool == "duckdb":
        query = f"select id from read_parquet('{glob}', filename = true, file_row_number = true) order by filename, file_row_number"
        found = [row[0] for row in pytest.importorskip("duckdb").sql(query).fetchall()]
    elif tool == "polars":
        found = pytest.importorskip("polars").read_parquet(glob)["id"].to_list()
    elif tool == "pandas":
        pandas = pytest.importorskip("pandas")
        found = pandas.concat([pandas.read_parquet(file) for file in sorted(Path(finished.output).glob("part-*.parquet"))])["id"].tolist()
    elif tool == "dataset":
        import pyarrow.dataset

        files = [str(file) for file in sorted(Path(finished.output).glob("part-*.parquet"))]
        found = pyarrow.dataset.dataset(files).to_table().column("id").to_pylist()
    else:
        pytest.importorskip("pandas")
        found = pytest.importorskip("dask.dataframe").read_parquet(glob)["id"].compute().tolist()
    assert found == list(range(40))
