"""What a supervisor says of replicas that do not come up; real processes, the simulated engine."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.model import resolve_model
from pipeline.supervisor import ReplicaSpec
from pipeline.supervisor import Supervisor
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
