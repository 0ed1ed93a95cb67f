"""Real processes, killed, interrupted and starved: after each, the same command again ends with every row once.

The engine is simulated at low rates, so that there is time to strike; the second run takes a quick one, inline, since
neither rates nor cluster are part of a job's identity.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.api import load_job
from jobs.api import run
from jobs.status import read_status
from jobs.verify import verify
from schemas import layout
from schemas.job import parse_job
from tests.conftest import build_tiny_model
from tests.conftest import read_output

pytestmark = pytest.mark.chaos

_TOKENMILL = str(Path(sys.executable).with_name("tokenmill"))
_PATIENCE_S = 180.0
"""Nothing here waits for a time to pass, only for things to happen; this is when a test gives up waiting."""
_ROWS = 320
_SLOW = {"decode_tokens_per_s": 150, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5, "lengths": "max"}
"""A unit of 16 rows and 4 tokens takes about half a second of a replica."""
_QUICK = {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "lengths": "max"}

WriteTable = Callable[..., Path]


class Running:
    """One `tokenmill` in a session of its own, as a terminal would start it; what it prints goes to files."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._out, self._err = folder / f"stdout-{time.monotonic_ns()}", folder / f"stderr-{time.monotonic_ns()}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            command = [_TOKENMILL, *arguments]
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Until the condition holds; fails where the process ends before, or patience does."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            ended = self.process.poll()
            assert ended is None or condition(), f"it ended with {ended} before {what}:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.05)

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Ctrl-C reaches the whole foreground group."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs:\n{self.stdout}\n{self.stderr}")

    def workers(self) -> list[psutil.Process]:
        """Its replicas' processes."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any("pipeline.worker" in argument for argument in child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found


class Job:
    """A job file in a folder, and what lies in its output."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.out, self._model = folder, folder / "out", model
        self.running: list[Running] = []
        self.write()

    def write(self, **sections: Any) -> None:
        data: dict[str, Any] = {
            "model": str(self._model),
            "input": {"uri": str(self.folder / "in" / "*.parquet"), "prompt": "prompt"},
            "output": {"uri": str(self.out)},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": _SLOW},
            "cluster": {"kind": "local", "replicas": 2},
        }
        for key, value in sections.items():
            data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) else value
        (self.folder / "job.yaml").write_text(yaml.safe_dump(data))

    def start(self, *arguments: str) -> Running:
        started = Running(self.folder, *(arguments or ("run", "job.yaml")))
        self.running.append(started)
        return started

    def parts(self) -> dict[str, tuple[bytes, int]]:
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(self.out.glob("part-*.parquet"))}

    def has_parts(self, count: int) -> Callable[[], bool]:
        return lambda: len(list(self.out.glob("part-*.parquet"))) >= count

    @property
    def rows(self) -> int:
        """Committed now."""
        return sum(pq.read_metadata(path).num_rows for path in self.out.glob("part-*.parquet"))

    def complete_and_prove(self) -> None:
        """Go on from where the job stands; nothing that was committed may change, and every row must be there once."""
        before = self.parts()
        data = yaml.safe_load((self.folder / "job.yaml").read_text())
        data["engine"]["options"], data["cluster"] = _QUICK, {"kind": "inline"}
        result = run(parse_job(data), stream=io.StringIO())
        assert (result.state, result.exit_code, result.rows) == ("complete", 0, result.totals.rows)
        assert {name: part for name, part in self.parts().items() if name in before} == before
        self.prove()

    def prove(self) -> None:
        verdict = verify(str(self.out))
        assert (verdict.problems, verdict.complete) == ([], True)
        rows = sum(pq.read_metadata(path).num_rows for path in (self.folder / "in").glob("*.parquet"))
        assert read_output(self.out)["id"].to_pylist() == list(range(rows))


@pytest.fixture
def job(tiny_model: Path, write_table: WriteTable, tmp_path: Path) -> Iterator[Job]:
    """Twenty units of 16 rows on two slow replicas. Whatever still runs at the end is killed."""
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(_ROWS)])
    made = Job(tmp_path, tiny_model)
    yield made
    for running in made.running:
        if running.process.poll() is None:
            for process in [*psutil.Process(running.process.pid).children(recursive=True), running.process]:
                process.kill()
            running.process.wait()


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=30)
    return not alive


def test_ctrl_c_drains_and_the_printed_command_goes_on(job: Job) -> None:
    first = job.start()
    first.wait_for(job.has_parts(2), "its first parts")
    workers = first.workers()
    assert len(workers) == 2
    first.interrupt()
    assert first.end() == 130
    assert "draining: " in first.stderr
    assert gone(workers)
    before = job.parts()
    assert 2 <= len(before) < 20
    assert read_status(str(job.out)).state == "drained"

    (command,) = re.findall(r"^to go on: tokenmill (.+)$", first.stdout, re.MULTILINE)
    second = job.start(*shlex.split(command))
    assert second.end() == 0, second.stderr
    assert f"{len(before)} of 20 units are done" in second.stderr
    assert {name: part for name, part in job.parts().items() if name in before} == before
    job.prove()


def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing_running(job: Job) -> None:
    job.write(engine={"options": {**_SLOW, "decode_tokens_per_s": 30}})
    first = job.start()
    first.wait_for(job.has_parts(1), "its first part")
    workers = first.workers()
    assert workers
    first.interrupt()
    first.wait_for(lambda: "draining: " in first.stderr, "its word that it drains")
    first.interrupt()
    assert first.end() == 130
    assert "stopped at once" in first.stderr
    assert "To go on: tokenmill run job.yaml" in first.stderr
    assert gone(workers)
    assert 1 <= len(job.parts()) < 20
    job.complete_and_prove()


@pytest.mark.parametrize("said", ["job tokenmill", "running: "])
def test_ctrl_c_at_any_moment_ends_with_130(job: Job, said: str) -> None:
    """Also while the cluster comes up."""
    first = job.start()
    first.wait_for(lambda: said in first.stderr, f"{said!r}")
    first.interrupt()
    assert first.end() == 130, first.stderr
    assert "Traceback" not in first.stderr
    assert "o go on: tokenmill run job.yaml" in first.stdout + first.stderr
    job.complete_and_prove()


def test_sigterm_drains_too(job: Job) -> None:
    job.write(cluster={"kind": "inline", "replicas": None})
    first = job.start()
    first.wait_for(job.has_parts(1), "its first part")
    first.interrupt(signal.SIGTERM)
    assert first.end() == 130
    job.complete_and_prove()


def test_a_killed_worker_costs_no_row(job: Job) -> None:
    first = job.start()
    first.wait_for(job.has_parts(2), "its first parts")
    victim = first.workers()[0]
    victim.kill()
    assert first.end() == 0, first.stderr
    assert "SIGKILL" in first.stderr
    assert "starting it again" in first.stderr
    job.prove()


def test_every_worker_killed_at_once_costs_no_row(job: Job) -> None:
    first = job.start()
    first.wait_for(job.has_parts(2), "its first parts")
    for victim in first.workers():
        victim.kill()
    assert first.end() == 0, first.stderr
    job.prove()


def test_the_workers_of_a_killed_driver_end_and_the_rerun_completes(job: Job) -> None:
    first = job.start()
    first.wait_for(job.has_parts(2), "its first parts")
    workers = first.workers()
    assert len(workers) == 2
    first.process.kill()
    first.end()
    assert gone(workers)
    assert not verify(str(job.out)).complete
    job.complete_and_prove()


def test_cancel_from_another_process_drains(job: Job) -> None:
    job.write(engine={"options": {**_SLOW, "decode_tokens_per_s": 20}})  # half a minute: the other command takes a few seconds
    first = job.start()
    first.wait_for(job.has_parts(1), "its first part")
    second = job.start("cancel", str(job.out))
    assert second.end() == 0
    assert "asked to drain" in second.stdout
    assert first.end() == 130
    assert "`tokenmill cancel` asked this job to drain" in first.stderr
    assert 1 <= len(job.parts()) < 20
    status = job.start("status", str(job.out))
    assert status.end() == 0
    assert ": drained" in status.stdout
    job.complete_and_prove()


def test_two_processes_at_once_share_one_output(job: Job) -> None:
    job.write(cluster={"kind": "inline", "replicas": None}, engine={"options": {**_SLOW, "decode_tokens_per_s": 1000}})
    both = [job.start(), job.start()]
    assert [running.end() for running in both] == [0, 0], both[0].stderr + both[1].stderr
    assert len(job.parts()) == 20
    job.prove()


def test_an_engine_that_cannot_start_is_told_with_its_cause(job: Job, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "broken")
    (model / "tokenizer.json").write_text("{ this is not JSON")
    job.write(model=str(model))
    first = job.start()
    first.wait_for(lambda: first.process.poll() is not None, "its end")
    assert first.end() == 2
    (last,) = [line for line in first.stderr.splitlines() if line.startswith("tokenmill: ")]
    assert "no engine replica could be started" in last
    assert str(model) in last
    assert "Traceback" not in first.stderr
    assert job.parts() == {}


def test_nothing_of_a_run_is_left_in_the_temporary_folder(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    job.write(engine={"options": _QUICK})
    assert job.start().end() == 0
    assert [path.name for path in scratch.iterdir() if path.name.startswith("tokenmill")] == []


_INTERRUPTED_NOTEBOOK = """
import io, os, signal, sys
from jobs import api

class Stream(io.StringIO):
    def write(self, text):
        if text.startswith(("running: ", "draining: ")):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)

try:
    api.run(api.load_job("job.yaml"), stream=Stream())
except api.StoppedAtOnce:
    print("stopped", flush=True)
"""


def test_a_notebook_that_was_stopped_at_once_can_end(job: Job) -> None:
    """No thread of the inline cluster may wait for ever on an engine that is closed."""
    job.write(cluster={"kind": "inline", "replicas": None}, engine={"options": {**_SLOW, "decode_tokens_per_s": 5}})
    process = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED_NOTEBOOK], cwd=job.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        stdout, stderr = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        pytest.fail(f"it hangs after:\n{stdout}\n{stderr}")
    assert (process.returncode, stdout) == (0, "stopped\n"), stderr
    job.complete_and_prove()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of half a megabyte."""
    folder = tmp_path / "out"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_units_and_hides_no_half_part(job: Job, small_disk: Path, write_table: WriteTable) -> None:
    rows = 128  # eight units of 128 KiB that no compression makes smaller
    blobs = [os.urandom(8192) for _ in range(rows)]
    write_table(pa.table({"id": list(range(rows)), "prompt": [f"question {row}" for row in range(rows)], "blob": blobs}))
    job.write(cluster={"kind": "inline", "replicas": None}, engine={"options": _QUICK}, limits={"attempts": 2})

    began = time.monotonic()
    first = job.start()
    assert first.end() == 1
    ended_s, committed = time.monotonic() - began, job.rows
    assert "No space left" in first.stdout + first.stderr
    assert "Traceback" not in first.stderr
    assert "to go on: tokenmill run job.yaml" in first.stdout
    names = sorted(path.name for path in small_disk.iterdir())
    assert 0 < len([name for name in names if name.startswith("part-")]) < 8
    assert [name for name in names if not name.startswith(("part-", layout.FOLDER))] == []
    assert [pq.read_metadata(small_disk / name).num_rows for name in names if name.startswith("part-")] == [16] * (len(names) - 1)
    assert not verify(str(small_disk)).complete

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    job.complete_and_prove()
    print(f"output's disk full: exit code 1, {ended_s:.1f} s after the start, with {committed} rows committed; {job.rows} after the rerun")


def test_a_disk_without_a_single_byte_left_is_told_without_a_traceback(job: Job, small_disk: Path) -> None:
    """Not even the status can be written then, which must not end the run."""
    job.write(cluster={"kind": "inline", "replicas": None}, limits={"attempts": 1})
    first = job.start()
    first.wait_for(job.has_parts(1), "its first part")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    full_at = time.monotonic()
    assert first.end() == 1
    ended_s, committed = time.monotonic() - full_at, job.rows
    assert "No space left" in first.stdout + first.stderr
    assert "Traceback" not in first.stderr
    assert "to go on: tokenmill run job.yaml" in first.stdout
    filler.unlink()
    job.complete_and_prove()
    print(f"not a byte left: exit code 1, {ended_s:.1f} s later, with {committed} rows committed; {job.rows} after the rerun")


@pytest.mark.parametrize("moment", ["before the start", "in mid-run"])
def test_a_full_local_disk_of_workers_and_driver_loses_nothing(
    job: Job, small_disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Logs, flight records and Dask's own files lie there, not the output."""
    job.out = job.folder / "elsewhere"
    job.write()
    monkeypatch.setenv("TMPDIR", str(small_disk))

    def fill() -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    if moment == "before the start":
        fill()
    first = job.start()
    if moment == "in mid-run":
        first.wait_for(job.has_parts(2), "its first parts")
        fill()
    code = first.end()
    assert "Traceback" not in first.stderr
    if code != 0:
        assert "No space left" in first.stdout + first.stderr
    print(f"disk full {moment}: exit code {code}, {len(job.parts())} parts")
    (small_disk / "filler").unlink()
    job.complete_and_prove()


def test_the_job_file_that_these_tests_write_is_a_job(job: Job) -> None:
    """The control of `Job.write`."""
    assert load_job(job.folder / "job.yaml").cluster.replicas == 2
