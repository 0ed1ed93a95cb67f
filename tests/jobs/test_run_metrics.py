"""Metrics of a run: what its driver tells, and a real run that is asked while it goes on."""

from __future__ import annotations

import io
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.api import run
from jobs.cli import main
from jobs.driver import Progress
from jobs.metrics import RunMetrics
from jobs.metrics import Snapshot
from jobs.metrics import addresses
from jobs.metrics import snapshot
from jobs.status import read_status
from schemas import layout
from schemas.errors import JobError
from schemas.job import ClusterSpec
from schemas.job import JobSpec
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount
from schemas.manifest import Totals

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]


def free_port(more: int = 0) -> int:
    """One that nobody has, with so many after it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port <= 64_000 and all(is_free(port + number) for number in range(1, more + 1)):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Asking(threading.Thread):
    """Asks a port until it says a word, and keeps that answer."""

    def __init__(self, port: int, word: str) -> None:
        super().__init__()
        self.port, self.word, self.heard = port, word, ""
        self.start()

    def run(self) -> None:
        for _ in range(1500):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                text = ""
            if self.word in text:
                self.heard = text
                return
            time.sleep(0.02)


def values_of(metrics: RunMetrics) -> dict[str, float]:
    return {f"{sample.name}{sorted(sample.labels.values())}": sample.value for family in metrics.collect() for sample in family.samples}


def test_a_snapshot_is_what_the_driver_knows() -> None:
    totals = Totals(units=2, rows=20, error_rows=1, prompt_tokens=200, completion_tokens=300, errors={"too_long": 1})
    progress = Progress(
        state="running", total_units=9, total_rows=90, done_before=3, rows_before=30, totals=totals, units_in_flight=2, retries=1, usd=0.5
    )
    replicas = tuple(
        ReplicaAccount(
            name=f"a-{number}", processes=1, seconds={"start": 1.0, "busy": 4.0}, rows=1, prompt_tokens=1, generated_tokens=1,
            output_tokens=1, busy_s=4.0, busy_tokens=1,
        )
        for number in range(2)
    )  # fmt: skip
    account = RunAccount(
        run="r", fingerprint="f", state="running", host="h", whole=False, began_at=0.0, ended_at=5.0, elapsed_s=5.0, units=2, rows=20,
        error_rows=1, prompt_tokens=200, output_tokens=300, retries=1, profile="p", engine={}, versions={}, replicas=replicas,
    )  # fmt: skip
    assert snapshot(progress, account) == Snapshot(
        state="running",
        rows=20,
        prompt_tokens=200,
        output_tokens=300,
        errors={"too_long": 1},
        engine_seconds={"start": 2.0, "busy": 8.0, "starved": 0.0, "commit_blocked": 0.0, "tail": 0.0, "lost": 0.0},
        retries=1,
        units_in_flight=2,
        units_done=5,
        units=9,
        rows_done=50,
        rows_planned=90,
        usd=0.5,
    )


def test_before_the_first_word_there_is_nothing_and_a_cost_only_where_it_is_known() -> None:
    metrics = RunMetrics("tickets")
    assert values_of(metrics) == {}
    metrics.tell(Snapshot(state="running", rows=1, prompt_tokens=2, output_tokens=3))
    values = values_of(metrics)
    assert values["tokenmill_run_rows_total['tickets']"] == 1
    assert not [name for name in values if "cost" in name]
    metrics.tell(Snapshot(state="complete", rows=1, prompt_tokens=2, output_tokens=3, usd=0.25, errors={"k": 4}))
    values = values_of(metrics)
    assert values["tokenmill_run_cost_usd['tickets']"] == 0.25
    assert values["tokenmill_run_error_rows_total['k', 'tickets']"] == 4
    assert values["tokenmill_run_state_info['complete', 'tickets']"] == 1


def test_addresses_are_the_drivers_and_those_of_replicas_on_its_machine() -> None:
    replicas = ["local-1", "local-0"]
    assert addresses(ClusterSpec(), replicas) == []
    assert addresses(ClusterSpec(metrics_port=9464), replicas) == [f"http://127.0.0.1:{port}/metrics" for port in (9464, 9465, 9466)]
    inline = ClusterSpec(kind="inline", metrics_port=9464, metrics_host="::1")
    assert addresses(inline, ["inline-0"]) == ["http://[::1]:9464/metrics"]
    everywhere = ClusterSpec(kind="inline", metrics_port=9464, metrics_host="0.0.0.0")
    assert addresses(everywhere, []) == [f"http://{socket.gethostname()}:9464/metrics"]


@pytest.mark.slow
def test_a_run_that_is_asked_while_it_goes_on_answers_and_gives_its_port_back(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"prompt": f"question {index}"} for index in range(40)])
    port = free_port()
    job = make_job(name="tickets", cluster={"metrics_port": port}, engine={"options": {"decode_tokens_per_s": 300.0, "lengths": "max"}})
    asking = Asking(port, "tokenmill_run_rows_planned")
    assert run(job, stream=io.StringIO()).state == "complete"
    asking.join()
    assert 'tokenmill_run_rows_planned{job_name="tickets"} 40.0' in asking.heard
    assert "question" not in asking.heard
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_each_replica_of_a_local_cluster_answers_on_a_port_of_its_own(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"prompt": f"question {index}"} for index in range(40)])
    port = free_port(more=1)
    slow = {"decode_tokens_per_s": 300.0, "lengths": "max"}
    job = make_job(cluster={"kind": "local", "replicas": 1, "metrics_port": port}, engine={"options": slow})
    asking = Asking(port + 1, "tokenmill_replica_rows_total")
    assert run(job, stream=io.StringIO()).state == "complete"
    asking.join()
    assert 'tokenmill_replica_window_rows{replica="local-0"}' in asking.heard
    assert read_status(job.output.uri).said["metrics"][:1] == [f"http://127.0.0.1:{port}/metrics"]
    assert "question" not in asking.heard


def test_a_taken_port_is_refused_before_anything_is_written(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table([{"prompt": "question"}])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(JobError, match=r"cluster\.metrics_port: cannot serve"):
            run(make_job(cluster={"metrics_port": taken.getsockname()[1]}), stream=io.StringIO())
    assert not (tmp_path / "out" / layout.JOB).exists()


@pytest.mark.parametrize("port", ["0", "64001", "many"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    ran = CliRunner().invoke(main, ["run", "--model", "demo", "--input", "x", "--prompt", "p", "--output", "o", "--metrics-port", port])
    assert ran.exit_code == 2
