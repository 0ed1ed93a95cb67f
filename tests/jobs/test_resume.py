"""Run again: only what is missing is done, nothing that is there changes, and another job is kept out."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.accept import accept
from jobs.accept import store
from jobs.api import plan
from jobs.api import run
from jobs.status import read_status
from jobs.summary import RunResult
from jobs.verify import verify
from schemas import layout
from schemas.errors import ForeignOutput
from schemas.errors import JobError
from schemas.job import JobSpec
from tests.conftest import build_tiny_model
from tests.conftest import read_output

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]


def quiet(job: JobSpec) -> RunResult:
    return run(job, stream=io.StringIO())


def questions(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"id": index, "prompt": f"question {index}"} for index in range(first, first + count)]


def parts_of(out: Path) -> dict[str, tuple[bytes, int]]:
    """Content and mtime of every part."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.glob("*.parquet"))}


def ids_of(out: Path) -> list[int]:
    ids: list[int] = read_output(out)["id"].to_pylist()
    return ids


def test_a_second_run_does_nothing_more(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(100))
    first = quiet(make_job())
    parts, success = parts_of(tmp_path / "out"), (tmp_path / "out" / layout.SUCCESS).stat().st_mtime_ns
    second = quiet(make_job())
    assert (second.state, second.exit_code, second.this_run.units, second.start_s) == ("complete", 0, 0, {})
    assert (second.totals.rows, second.totals.completion_tokens) == (first.totals.rows, first.totals.completion_tokens)
    assert parts_of(tmp_path / "out") == parts
    assert (tmp_path / "out" / layout.SUCCESS).stat().st_mtime_ns == success


def test_a_finished_job_needs_its_inputs_no_more(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    path = write_table(questions(20))
    quiet(make_job())
    path.unlink()
    assert quiet(make_job()).state == "complete"


def test_only_a_lost_unit_is_made_again(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(100))
    quiet(make_job())
    before = parts_of(tmp_path / "out")
    completions = read_output(tmp_path / "out")["completion"].to_pylist()
    lost = sorted(before)[3]
    (tmp_path / "out" / lost).unlink()
    (tmp_path / "out" / layout.SUCCESS).unlink()
    result = quiet(make_job())
    assert (result.state, result.this_run.units, result.this_run.rows, result.totals.rows) == ("complete", 1, 16, 100)
    after = parts_of(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {lost}
    assert read_output(tmp_path / "out")["completion"].to_pylist() == completions
    assert (tmp_path / "out" / layout.SUCCESS).exists()
    assert verify(str(tmp_path / "out")).complete


def test_a_job_killed_before_its_end_is_closed(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """Every part is there, but nobody said so."""
    write_table(questions(40))
    quiet(make_job())
    (tmp_path / "out" / layout.SUCCESS).unlink()
    (tmp_path / "out" / layout.MANIFEST).unlink()
    assert not verify(str(tmp_path / "out")).complete
    result = quiet(make_job())
    assert (result.state, result.this_run.units) == ("complete", 0)
    assert pq.read_table(tmp_path / "out" / layout.MANIFEST)["rows"].to_pylist() == [16, 16, 8]
    assert verify(str(tmp_path / "out")).complete


def test_a_job_killed_between_job_and_plan_goes_on(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(40))
    store(accept(make_job()))
    (tmp_path / "out" / layout.PLAN).unlink()
    assert quiet(make_job()).state == "complete"
    assert verify(str(tmp_path / "out")).complete


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"sampling": {"max_tokens": 9}}, "sampling: "),
        ({"sampling": {"temperature": 0.5}}, "sampling: "),
        ({"input": {"prompt": "Again: {prompt}"}}, "prompt: "),
        ({"input": {"system": "Be brief."}}, "prompt: "),
        ({"input": {"chat": False}}, "prompt: "),
        ({"input": {"too_long": "truncate_left"}}, "prompt: "),
        ({"output": {"prefix": "tm_"}}, "output: "),
        ({"output": {"token_ids": True}}, "output: "),
        ({"input": {"schemas": "unify"}}, "input: "),
    ],
)
def test_a_changed_job_into_the_same_output_is_refused_with_what_differs(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, sections: dict[str, Any], named: str
) -> None:
    write_table(questions(20))
    quiet(make_job())
    before = parts_of(tmp_path / "out")
    with pytest.raises(JobError) as refused:
        quiet(make_job(**sections))
    differences = [line.strip() for line in str(refused.value).splitlines()[1:-1]]
    assert [line[: len(named)] for line in differences] == [named]
    assert "the output was begun with" in differences[0]
    assert parts_of(tmp_path / "out") == before


def test_another_model_into_the_same_output_is_refused_with_what_differs(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path
) -> None:
    write_table(questions(20))
    quiet(make_job())
    other = build_tiny_model(tmp_path / "other")
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(JobError) as refused:
        quiet(make_job(model=str(other)))
    assert [line.strip().split(":")[0] for line in str(refused.value).splitlines()[1:-1]] == ["chat_template", "weights"]


def test_the_same_model_elsewhere_is_the_same_job(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(20))
    quiet(make_job())
    assert quiet(make_job(model=str(build_tiny_model(tmp_path / "copy")))).this_run.units == 0


def test_a_new_input_file_is_reported_and_not_taken(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(40), "in/a.parquet")
    store(accept(make_job()))
    new = write_table(questions(10, first=40), "in/b.parquet")
    assert plan(make_job()).accepted.new_objects == (str(new),)
    result = quiet(make_job())
    assert (result.state, result.rows, result.new_objects) == ("complete", 40, (str(new),))
    assert ids_of(tmp_path / "out") == list(range(40))
    assert verify(str(tmp_path / "out")).complete


def test_a_changed_object_fails_its_own_units_alone(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    job = make_job(limits={"attempts": 1})
    for number, name in enumerate("abc"):
        write_table(questions(32, first=32 * number), f"in/{name}.parquet")
    store(accept(job))
    changed, kept = tmp_path / "in" / "b.parquet", tmp_path / "kept"
    changed.rename(kept)
    write_table(questions(32, first=1000), "in/b.parquet")

    stream = io.StringIO()
    result = run(job, stream=stream)
    assert (result.state, result.exit_code, sorted(result.failed)) == ("failed", 1, [2, 3])
    assert all(str(changed) in reason and "changed since the plan was made" in reason for reason in result.failed.values())
    assert f"changed or gone since the plan was made: {changed}" in stream.getvalue()
    assert ids_of(tmp_path / "out") == [*range(32), *range(64, 96)]
    assert not (tmp_path / "out" / layout.SUCCESS).exists()

    kept.rename(changed)
    result = quiet(job)
    assert (result.state, result.exit_code, result.this_run.units) == ("complete", 0, 2)
    assert ids_of(tmp_path / "out") == list(range(96))
    assert verify(str(tmp_path / "out")).complete


def test_an_object_that_is_gone_fails_its_own_units_alone(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    job = make_job(limits={"attempts": 1})
    write_table(questions(16), "in/a.parquet")
    gone = write_table(questions(16, first=16), "in/b.parquet")
    store(accept(job))
    gone.unlink()
    result = quiet(job)
    assert (result.state, list(result.failed)) == ("failed", [1])
    assert f"{gone} is gone since the plan was made" in result.failed[1]
    assert ids_of(tmp_path / "out") == list(range(16))


def test_what_killed_writers_left_is_swept(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(20))
    store(accept(make_job()))
    left = tmp_path / "out" / ".tmp-0123456789abcdef"
    left.write_bytes(b"half a part")
    assert quiet(make_job()).state == "complete"
    assert not left.exists()
    assert sorted(path.name[:5] for path in (tmp_path / "out").iterdir()) == ["_SUCC", "_toke", "part-", "part-"]


def test_a_part_that_is_cut_short_stops_the_job_and_says_what_to_remove(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(40))
    quiet(make_job())
    part = sorted((tmp_path / "out").glob("part-*.parquet"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(ForeignOutput, match=part.name) as stopped:
        quiet(make_job())
    assert "remove it" in str(stopped.value)
    assert part.read_bytes() == whole[:-20]
    part.unlink()
    assert quiet(make_job()).state == "complete"
    assert verify(str(tmp_path / "out")).complete


class InterruptingStream(io.StringIO):
    """Sends this process Ctrl-C when `word` is written for the first time."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word, self._sent = word, False

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._word in text and not self._sent:
            self._sent = True
            signal.raise_signal(signal.SIGINT)
        return written


def test_ctrl_c_drains_and_the_same_command_goes_on(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(600))
    job = make_job(engine={"options": {"max_num_seqs": 4}})  # a window of 8 rows: two units at a time
    stream = InterruptingStream("running: ")
    result = run(job, stream=stream)
    assert (result.state, result.exit_code, result.failed) == ("drained", 130, {})
    assert 0 < result.totals.units < result.units
    assert "draining: " in stream.getvalue()
    assert read_status(str(tmp_path / "out")).state == "drained"
    before = parts_of(tmp_path / "out")
    again = quiet(job)
    assert (again.state, again.this_run.units) == ("complete", result.units - result.totals.units)
    assert {name: part for name, part in parts_of(tmp_path / "out").items() if name in before} == before
    assert ids_of(tmp_path / "out") == list(range(600))
    assert verify(str(tmp_path / "out")).complete


def test_ctrl_c_leaves_the_callers_handlers_as_they_were(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions(20))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    quiet(make_job())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_two_drivers_at_once_both_end_complete_with_each_unit_once(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(300))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(quiet, [make_job(), make_job()]))
    assert [(result.state, result.totals.rows, result.totals.units) for result in results] == [("complete", 300, 19)] * 2
    assert ids_of(tmp_path / "out") == list(range(300))
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 19
    assert verify(str(tmp_path / "out")).complete


def test_two_jobs_that_begin_one_output_at_once_do_not_mix(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """Both were accepted while the output was empty; the one that stores first has it."""
    write_table(questions(20))
    first, second = accept(make_job()), accept(make_job(sampling={"max_tokens": 9}))
    store(first)
    with pytest.raises(JobError, match=r"output\.uri: another job began "):
        store(second)
    assert store(first) is first


def test_a_driver_that_wakes_late_leaves_a_job_closed_that_another_one_completed(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path
) -> None:
    """It was accepted before, and is killed right after; nobody else would close the job again."""
    write_table(questions(40))
    late = accept(make_job())
    assert quiet(make_job()).state == "complete"
    store(late)
    assert (tmp_path / "out" / layout.SUCCESS).exists()
    assert verify(str(tmp_path / "out")).complete


def test_a_job_whose_part_was_lost_is_not_closed_any_more(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(40))
    quiet(make_job())
    sorted((tmp_path / "out").glob("part-*.parquet"))[1].unlink()
    store(accept(make_job()))
    assert not (tmp_path / "out" / layout.SUCCESS).exists()


def test_the_order_of_rows_is_the_inputs_over_many_files(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    first = 0
    for number, count in enumerate([1, 50, 3, 0, 17, 120, 1, 1, 9]):
        table = pa.table({"id": pa.array(range(first, first + count), pa.int64()), "prompt": [f"q {i}" for i in range(count)]})
        write_table(table.cast(pa.schema([("id", pa.int64()), ("prompt", pa.string())])), f"in/{number}.parquet", row_group_size=7)
        first += count
    assert quiet(make_job()).state == "complete"
    assert ids_of(tmp_path / "out") == list(range(first))
    assert verify(str(tmp_path / "out")).complete


def test_the_manifest_has_a_row_for_every_unit(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(40))
    result = quiet(make_job())
    manifest = pq.read_table(tmp_path / "out" / layout.MANIFEST)
    assert manifest["unit"].to_pylist() == [0, 1, 2]
    assert manifest["part"].to_pylist() == sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert sum(manifest["completion_tokens"].to_pylist()) == result.totals.completion_tokens
    assert [(tmp_path / "out" / name).stat().st_size for name in manifest["part"].to_pylist()] == manifest["size_bytes"].to_pylist()


def test_the_manifest_tells_the_truth_about_a_unit_that_was_made_again(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(40))
    quiet(make_job())
    (lost, *_) = sorted((tmp_path / "out").glob("part-*.parquet"))
    lost.unlink()
    quiet(make_job())
    manifest = pq.read_table(tmp_path / "out" / layout.MANIFEST)
    report = pq.read_metadata(lost).metadata[b"tokenmill.report"]
    assert manifest["attempt"].to_pylist()[0].encode() in report


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's memory filesystem, emptied before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("uri", ["memory://in", "memory://in/*.parquet", "memory://in/a.parquet"])
def test_memory_storage_works_from_end_to_end(make_job: MakeJob, memory: Any, uri: str) -> None:
    with memory.open("/in/a.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(questions(40)), file)
    job = make_job(input={"uri": uri}, output={"uri": "memory://out/deep"})
    result = quiet(job)
    assert (result.state, result.totals.rows, result.units) == ("complete", 40, 3)
    names = sorted(memory.glob("/out/deep/*.parquet"))
    tables = [pq.read_table(io.BytesIO(memory.cat_file(name))) for name in names]
    assert pa.concat_tables(tables)["id"].to_pylist() == list(range(40))
    assert verify("memory://out/deep").complete
    assert read_status("memory://out/deep").state == "complete"
    assert quiet(job).this_run.units == 0
    memory.rm_file(names[1])
    assert not verify("memory://out/deep").complete
    assert quiet(job).this_run.units == 1
    assert verify("memory://out/deep").complete
