"""What a supervisor says of replicas that do not come up; real processes, the simulated engine."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.flight import FlightRecorder
from pipeline.flight import Tag
from pipeline.model import resolve_model
from pipeline.supervisor import ReplicaSpec
from pipeline.supervisor import Supervisor
from pipeline.supervisor import _Slot
from pipeline.supervisor import engines_at_once
from pipeline.worker import WorkerConfig


@pytest.mark.slow
def test_a_replica_that_does_not_start_is_named_while_others_still_do(tiny_model: Path, tmp_path: Path) -> None:
    model = asdict(resolve_model(str(tiny_model)))
    options = {"slow": {"start_s": 60.0}, "wrong": {"decode_tokens_per_s": -1.0}}
    specs = [
        ReplicaSpec(
            config=WorkerConfig(name=name, model=model, kind="simulated", options=given, num_threads=1, folder=str(tmp_path)),
            environment={},
        )
        for name, given in options.items()
    ]
    supervisor = Supervisor(specs, max_loading=2, silence_s=60)
    try:
        for _ in range(600):
            if supervisor.given_up():
                break
            time.sleep(0.1)
        supervisor.raise_if_hopeless()
        ((name, why),) = supervisor.given_up().items()
        assert name == "wrong"
        assert "decode_tokens_per_s" in why
    finally:
        supervisor.close(at_once=True)


def test_a_replica_that_starts_again_finds_nothing_of_the_process_before_but_its_log(tmp_path: Path) -> None:
    config = WorkerConfig(name="r", model={}, kind="simulated", options={}, num_threads=1, folder=str(tmp_path))
    FlightRecorder(config.flight_path, 1).mark(Tag(out_uri="/out", fingerprint="f", unit=1))
    config.status_path.write_text("{}")
    config.log_path.write_text("it died")
    config.scratch_path.mkdir()
    config.clear()
    assert [path.name for path in tmp_path.iterdir()] == [config.log_path.name]
    config.clear()


def test_as_many_engines_load_at_once_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert [engines_at_once("vllm", count) for count in (1, 3, 8)] == [1, 3, 3]
    assert engines_at_once("simulated", 8) == 8


@pytest.mark.parametrize(
    ("number", "message", "killed"),
    [(signal.SIGKILL, "", True), (signal.SIGABRT, "", False), (signal.SIGKILL, "its engine made no step for 300 s", False)],
)
def test_only_a_kill_from_outside_is_told_as_one(tmp_path: Path, number: signal.Signals, message: str, killed: bool) -> None:
    """A supervisor's own SIGKILL is the end of an engine that hung."""
    told: list[tuple[str, bool]] = []
    supervisor = Supervisor([], max_loading=1, silence_s=60, on_death=lambda _, *death: told.append(death))
    config = WorkerConfig(name="r", model={}, kind="simulated", options={}, num_threads=1, folder=str(tmp_path))
    recorder = FlightRecorder(config.flight_path, 1)
    recorder.enter(recorder.mark(Tag(out_uri="/out", fingerprint="f", unit=1)), 7)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    process.send_signal(number)
    slot = _Slot(spec=ReplicaSpec(config=config, environment={}), process=process, state="ready", message=message)
    supervisor._take_death(slot, {}, process.wait())
    assert [verdict for _, verdict in told] == [killed]
    assert slot.state == "waiting"
    supervisor.close()
