"""Replicas that are evicted, die of a row or hang on one: finished rows are kept, the guilty row is named, all others come out.

Real processes and real signals; the simulated engine dies or hangs where a prompt holds a certain token.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.accept import accept
from jobs.accept import store
from jobs.cluster.cluster import Result
from jobs.cluster.local import LocalCluster
from jobs.driver import Driver
from jobs.driver import Progress
from jobs.finish import finish
from jobs.status import read_status
from jobs.verify import verify
from pipeline.eviction import ENVIRONMENT_VARIABLE
from pipeline.model import resolve_model
from pipeline.profile import cut_machine
from pipeline.worker import WorkerConfig
from schemas import layout
from schemas.errors import ReplicaLost
from schemas.job import parse_job
from schemas.manifest import META_REPORT
from schemas.manifest import UnitReport
from tests.chaos.test_processes import _SLOW
from tests.chaos.test_processes import Job
from tests.chaos.test_processes import gone
from tests.chaos.test_processes import job as job
from tests.commands import wait_until
from tests.conftest import read_output

pytestmark = pytest.mark.chaos

_LONG = {**_SLOW, "decode_tokens_per_s": 60, "max_num_seqs": 4}
"""A row of 40 tokens takes about 2.5 s, four at a time."""
_DEADLY = "Z"  # stands in one prompt only


def reports(job: Job) -> list[UnitReport]:
    return [UnitReport.from_json(pq.read_metadata(path).metadata[META_REPORT]) for path in sorted(job.out.glob("part-*.parquet"))]


def is_core(child: psutil.Process, least_bytes: float = math.inf) -> bool:
    """By its name, or its size; other children come and go."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "EngineCore" in " ".join(child.cmdline()) or child.memory_info().rss > least_bytes
    return False


def segments(job: Job, suffix: str) -> list[Path]:
    return sorted((job.out / layout.SEGMENTS).rglob(f"*{suffix}"))


def busy(job: Job) -> Callable[[], bool]:
    """Whether its replicas have finished rows, as the driver last said."""

    def look() -> bool:
        try:
            said = json.loads((job.out / layout.STATUS).read_text())
        except (OSError, ValueError):
            return False
        return len(said["replicas"]) == 2 and all(replica["rows"] >= 4 for replica in said["replicas"])

    return look


def test_an_evicted_worker_saves_its_rows_and_others_go_on_from_them(job: Job) -> None:
    job.write(engine={"options": _LONG}, sampling={"max_tokens": 40}, input={"uri": str(job.folder / "in" / "*.parquet")})
    first = job.start()
    first.wait_for(busy(job), "finished rows")
    victim = first.workers()[0]
    victim.send_signal(signal.SIGTERM)
    first.wait_for(lambda: bool(segments(job, ".rows.parquet")), "a segment")
    first.wait_for(lambda: "was evicted and handed its units back" in first.stderr, "its word that a replica was evicted")
    assert gone([victim])
    first.interrupt(signal.SIGTERM)
    assert first.end() == 130, first.stderr
    assert "SIGTERM" in first.stderr
    assert read_status(str(job.out)).state == "drained"
    saved = sum(pq.read_table(path, columns=["__begun"]).column(0).null_count for path in segments(job, ".rows.parquet"))
    begun = sum(len(pq.read_table(path)) for path in segments(job, ".rows.parquet")) - saved
    assert saved > 0
    assert begun > 0
    job.complete_and_prove()
    assert sum(report.resumed_rows for report in reports(job)) > 0
    assert segments(job, ".rows.parquet") == []
    print(f"saved {saved} finished and {begun} begun rows; {sum(r.resumed_rows for r in reports(job))} were taken up")


@pytest.mark.long
def test_rows_that_were_taken_up_are_the_same_as_if_nothing_had_happened(job: Job, tmp_path: Path) -> None:
    job.write(engine={"options": _LONG}, sampling={"max_tokens": 40})
    first = job.start()
    first.wait_for(busy(job), "finished rows")
    first.interrupt(signal.SIGTERM)
    assert first.end() == 130, first.stderr
    job.complete_and_prove()
    interrupted = read_output(job.out)
    quiet = Job(tmp_path, Path(job._model))
    quiet.out = tmp_path / "quiet"
    quiet.write(sampling={"max_tokens": 40})
    quiet.complete_and_prove()
    assert sum(report.resumed_rows for report in reports(job)) > 0
    assert interrupted.equals(read_output(quiet.out))


def deadly_table(job: Job, model: Path, option: str) -> dict[str, Any]:
    """One prompt in 96 holds the token; engine options under which it matters."""
    token = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"][_DEADLY]
    rows = [{"id": index, "prompt": f"question {index}" + (_DEADLY if index == 37 else "")} for index in range(96)]
    pq.write_table(pa.Table.from_pylist(rows), job.folder / "in" / "prompts.parquet")
    return {"decode_tokens_per_s": 4000, "prefill_tokens_per_s": 1e6, "max_num_seqs": 8, "lengths": "max", option: token}


@pytest.mark.parametrize(("option", "how"), [("dies_on_token", "signal SIGABRT"), ("hangs_on_token", "made no step for 3 s")])
@pytest.mark.long
def test_a_row_that_kills_or_hangs_engines_becomes_an_error_row_and_all_others_complete(
    job: Job, tiny_model: Path, option: str, how: str
) -> None:
    options = deadly_table(job, tiny_model, option)
    job.write(engine={"options": options}, cluster={"kind": "local", "replicas": 1}, limits={"attempts": 1, "engine_silence_s": 3})
    first = job.start()
    assert first.end() == 0, first.stderr
    made = read_output(job.out)
    assert made["id"].to_pylist() == list(range(96))
    errors = {row["id"]: row["error"] for row in made.to_pylist() if row["error"]}
    assert list(errors) == [37]
    assert errors[37]["kind"] == "kills_engine"
    assert how in errors[37]["message"]
    assert "question" not in errors[37]["message"]
    job_deaths = len(segments(job, ".death.json"))
    print(f"{option}: found among 96 rows; {first.stderr.count('starting it again')} engines died, {job_deaths} records of units")
    assert first.stderr.count("starting it again") <= 10


class _Metadata(BaseHTTPRequestHandler):
    events: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        body: Any = {"name": "nd_0"} if "/instance/" in self.path else {"Events": self.events}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Metadata]]:
    """Azure's metadata service for this machine, on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Metadata.events = []
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"http://127.0.0.1:{server.server_port}")
    yield _Metadata
    server.shutdown()
    thread.join()
    server.server_close()


def test_azures_notice_ends_the_run_within_its_thirty_seconds_and_keeps_what_is_finished(job: Job, metadata: type[_Metadata]) -> None:
    job.write(engine={"options": _LONG}, sampling={"max_tokens": 40})
    first = job.start()
    first.wait_for(busy(job), "finished rows")
    workers = first.workers()
    metadata.events = [{"EventId": "1", "EventType": "Preempt", "Resources": ["nd_0"]}]
    assert first.process.wait(30) == 130
    assert "Azure takes this machine away" in first.stderr
    assert gone(workers)
    assert segments(job, ".rows.parquet")
    job.complete_and_prove()
    assert sum(report.resumed_rows for report in reports(job)) > 0


@pytest.mark.engine
@pytest.mark.long
def test_an_engine_core_in_a_process_of_its_own_does_not_outlive_a_killed_worker(tiny_model: Path, tmp_path: Path) -> None:
    """With its supervisor gone too, nobody but the worker's own reaper is left to end it."""
    config = WorkerConfig(
        name="r0",
        model=asdict(resolve_model(str(tiny_model))),
        kind="vllm",
        options={"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20, "enforce_eager": True},
        num_threads=2,
        folder=str(tmp_path),
        scheduler="tcp://127.0.0.1:9",  # nobody is there: it keeps looking
        insecure=True,
    )
    config.save()
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pipeline.worker", str(config.config_path)]
    with config.log_path.open("wb") as log:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not (config.status_path.exists() and json.loads(config.status_path.read_text())["state"] == "ready"):
            assert worker.poll() is None, config.log_path.read_text()[-3000:]
            assert time.monotonic() < deadline, config.log_path.read_text()[-3000:]
            time.sleep(0.5)
        started = psutil.Process(worker.pid).children(recursive=True)
        cores = [child for child in started if is_core(child, least_bytes=200 << 20)]
        assert cores, started
        worker.kill()
        worker.wait()
        assert gone(cores)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        assert worker.stdin is not None
        worker.stdin.close()


def test_a_unit_that_is_sent_when_its_replica_has_just_died_comes_back(
    tiny_model: Path, tmp_path: Path, write_table: Callable[..., Path]
) -> None:
    """At a moment without workers Dask would keep it for ever, and the job would hang with the unit in flight."""
    write_table([{"id": row, "prompt": f"question {row}"} for row in range(8)])
    data = {
        "model": str(tiny_model),
        "input": {"uri": str(tmp_path / "in" / "*.parquet"), "prompt": "prompt"},
        "output": {"uri": str(tmp_path / "out")},
        "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1e5, "prefill_tokens_per_s": 1e6}},
        "cluster": {"replicas": 1},
    }
    accepted = store(accept(parse_job(data)))
    plan = cut_machine(accepted.job.engine, accepted.model, replicas=1)
    cluster = LocalCluster(plan=plan, model=accepted.model, kind="simulated", units_at_once=2, silence_s=15)
    answers: queue.SimpleQueue[Result] = queue.SimpleQueue()

    def send() -> None:
        cluster.submit(accepted.out_uri, accepted.record.fingerprint, accepted.todo[0], 1, answers.put, on="local-0")

    try:
        wait_until(cluster.replicas, "a replica")
        (worker,) = [child for child in psutil.Process().children() if "pipeline.worker" in child.cmdline()]
        worker.kill()
        identity = cluster.client.scheduler.identity
        wait_until(lambda: not cluster.client.sync(identity)["workers"], "the scheduler to see that its worker is gone")
        send()
        wait_until(cluster.replicas, "the replica to be there again")
        assert isinstance(answers.get(timeout=20), ReplicaLost)
        send()
        answer = answers.get(timeout=20)
        assert isinstance(answer, dict), answer
        assert answer["outcome"] == "created"
    finally:
        cluster.close(at_once=True)


@pytest.mark.engine
@pytest.mark.long
def test_an_engine_core_that_is_killed_in_mid_job_costs_no_row(tiny_model: Path, tmp_path: Path, write_table: Callable[..., Path]) -> None:
    """In a process of its own, as on GPUs: the worker lives on without it, and must see that it is gone."""
    write_table([{"id": row, "prompt": f"question {row}"} for row in range(192)])
    out = tmp_path / "out"
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20, "enforce_eager": True}
    data = {
        "model": str(tiny_model),
        "input": {"uri": str(tmp_path / "in" / "*.parquet"), "prompt": "prompt"},
        "output": {"uri": str(out)},
        "sampling": {"max_tokens": 100, "ignore_eos": True},
        "engine": {"options": options},
        "cluster": {"replicas": 1},
        "limits": {"engine_silence_s": 15},
    }
    accepted = store(accept(parse_job(data)))
    cut = cut_machine(accepted.job.engine, accepted.model, replicas=1)
    apart = replace(cut, environment={**cut.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    cluster = LocalCluster(plan=apart, model=accepted.model, kind="vllm", units_at_once=4, silence_s=15)
    killed: list[int] = []
    notes: list[str] = []

    def kill_once(progress: Progress) -> None:
        notes.extend(progress.notes)
        progress.notes.clear()
        if progress.totals.units and not killed:
            cores = [child for child in psutil.Process().children(recursive=True) if is_core(child)]
            for core in cores:
                core.kill()
                killed.append(core.pid)

    try:
        progress = Driver(accepted, cluster).run(kill_once)
    finally:
        cluster.close(at_once=True)
    assert killed
    assert any("starting it again" in note for note in notes), notes
    assert progress.state == "complete"
    finish(accepted)
    assert verify(str(out)).complete
    assert read_output(out).column("completion_tokens").to_pylist() == [100] * 192
