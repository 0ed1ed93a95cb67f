"""`tokenmill worker`: what a node is told, from a job file or flags, and what its replicas are told then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.worker_node import alone
from jobs.worker_node import parse_node
from jobs.worker_node import replica_specs
from pipeline import tls
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.worker import WAITING
from schemas.errors import JobError

CLUSTER: dict[str, Any] = {"kind": "address", "address": "tls://10.0.0.4:8786", "keys": "keys"}


def test_of_a_job_file_only_what_a_node_needs_is_read() -> None:
    job = {"model": "m", "engine": {"kind": "simulated"}, "cluster": CLUSTER, "input": "not looked at", "limits": {"engine_silence_s": 9}}
    spec = parse_node(job, name="node-1", replicas=2)
    assert (spec.name, spec.replicas, spec.job.model, spec.job.engine.kind) == ("node-1", 2, "m", "simulated")
    assert spec.job.limits.engine_silence_s == 9
    assert spec.job.cluster.address == "tls://10.0.0.4:8786"


def test_a_node_is_named_after_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "nd96-7")
    assert parse_node({"model": "m", "cluster": CLUSTER}, name=None, replicas=None).name == "nd96-7"


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        ({}, "n", "give a job file, or --model"),
        ({"model": "m"}, "n", "needs --scheduler or --rendezvous"),
        ({"model": "m", "cluster": {"kind": "local"}}, "n", "needs --scheduler or --rendezvous"),
        ({"model": "m", "cluster": {"kind": "address", "address": "tcp://h:1"}}, "n", "no keys"),
        ({"model": "m", "cluster": CLUSTER, "engine": {"kind": "steam"}}, "n", "engine.kind"),
        ({"model": "m", "cluster": CLUSTER}, "../n", "--name: found '../n'"),
    ],
)
def test_what_is_wrong_is_said(data: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_node(data, name=name, replicas=None)


def test_each_replica_is_told_where_the_cluster_is_and_which_device_is_its(tiny_model: Path, tmp_path: Path) -> None:
    place = {"kind": "address", "rendezvous": str(tmp_path / "place"), "keys": str(tmp_path / "keys")}
    spec = parse_node({"model": str(tiny_model), "engine": {"kind": "simulated"}, "cluster": place}, name="n", replicas=2)
    plan = ReplicaPlan(profile="p", replicas=2, options={"a": 1}, environment={"X": "1"}, device_environments=({"GPU": "0"}, {"GPU": "1"}))
    first, second = replica_specs(spec, resolve_model(str(tiny_model)), plan, str(tmp_path))
    assert (first.config.name, second.config.name) == ("n-0", "n-1")
    assert (first.environment, second.environment) == ({"X": "1", "GPU": "0"}, {"X": "1", "GPU": "1"})
    config = second.config
    assert (config.rendezvous, config.keys, config.scheduler) == (str(tmp_path / "place"), str(tmp_path / "keys"), "")
    assert (config.kind, config.options, config.model["path"]) == ("simulated", {"a": 1}, str(tiny_model))


def test_the_command_tells_a_missing_cluster_and_missing_keys(tmp_path: Path) -> None:
    for arguments, said in (
        (["--model", "demo"], "needs --scheduler or --rendezvous"),
        (["--model", "demo", "--scheduler", "tls://10.0.0.4:8786"], "make keys with `tokenmill keys DIR`"),
        (["--model", "demo", "--scheduler", "tcp://10.0.0.4:8786"], "--insecure"),
        (["--model", "demo", "--scheduler", "tls://10.0.0.4:8786", "--keys", str(tmp_path / "none")], "has no ca.pem"),
    ):
        refused = CliRunner().invoke(main, ["worker", *arguments])
        assert refused.exit_code == 2, refused.output
        assert said in refused.output


def test_keys_in_the_rendezvous_are_refused(tmp_path: Path) -> None:
    keys = str(tls.make_keys(tmp_path / "place" / "keys", valid_days=1).folder)
    refused = CliRunner().invoke(main, ["worker", "--model", "demo", "--rendezvous", str(tmp_path / "place"), "--keys", keys])
    assert refused.exit_code == 2
    assert "lie in one another" in refused.output


def test_a_node_is_alone_when_all_its_replicas_are_up_and_none_has_a_scheduler() -> None:
    waiting = f"{WAITING}: nobody answers"
    assert alone([waiting, waiting])
    assert not any(alone(members) for members in ([], [waiting, None], [waiting, "joined tls://10.0.0.4:8786"], ["lost tls://a:1"]))
