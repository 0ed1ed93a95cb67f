"""The engine ledger where processes are killed: what a dead one did is not forgotten, and every second is of one kind."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.report import report
from schemas import layout
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount
from tests.commands import Command

pytestmark = [pytest.mark.chaos, pytest.mark.long]

_START_S = 3.0
_ROWS, _TOKENS = 480, 16
_UNIT_ROWS = 16
_MESSAGE_S = 2.0
"""When a process began is known by the quickest message from it; on a busy machine that may be this late."""

WriteTable = Callable[..., Path]


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path, write_table: WriteTable) -> Path:
    """Two replicas on the simulated engine: 7,680 tokens at 150 a second each: long enough for a replica to be started again."""
    write_table([{"id": row, "prompt": f"question {row}"} for row in range(_ROWS)])
    engine = {"decode_tokens_per_s": 150, "prefill_tokens_per_s": 1e6, "max_num_seqs": 4, "lengths": "max", "start_s": _START_S}
    data: dict[str, Any] = {
        "model": str(tiny_model),
        "input": {"uri": str(tmp_path / "in" / "*.parquet"), "prompt": "prompt", "chat": False},
        "output": {"uri": str(tmp_path / "out")},
        "sampling": {"max_tokens": _TOKENS},
        "engine": {"kind": "simulated", "options": engine},
        "cluster": {"kind": "local", "replicas": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "job.yaml"


def start(job: Path) -> Command:
    return Command(job.parent, "run", str(job))


def parts(job: Path) -> list[Path]:
    return sorted((job.parent / "out").glob("part-*.parquet"))


def run_files(job: Path) -> list[Path]:
    return sorted((job.parent / "out" / layout.RUNS).glob("*.json"))


def workers(command: Command) -> dict[str, psutil.Process]:
    """Replica processes by name."""
    found = {}
    for child in psutil.Process(command.pid).children(recursive=True):
        for argument in child.cmdline():
            if argument.endswith(".config.json"):
                found[Path(argument).name.removesuffix(".config.json")] = child
    return found


def last_word(job: Path) -> RunAccount | None:
    try:
        return RunAccount.model_validate(json.loads((job.parent / "out" / layout.STATUS).read_text())["account"], strict=False)
    except (OSError, ValueError, KeyError):
        return None


def is_at_work(account: RunAccount | None) -> bool:
    """Whether the driver has said that both replicas answered rows."""
    return account is not None and len(account.replicas) == 2 and all(replica.rows for replica in account.replicas)


def spent(replica: ReplicaAccount, began_at: float, job: Path, account: RunAccount) -> None:
    """Its seconds reach from its first process's beginning to the end of the run's last commit at least, and to the run's end at most."""
    last_commit = max(path.stat().st_mtime for path in parts(job))
    assert last_commit - began_at - _MESSAGE_S <= replica.lifetime_s <= account.ended_at - began_at + _MESSAGE_S


def test_a_killed_replicas_seconds_are_not_forgotten(job: Path) -> None:
    command = start(job)
    command.wait_for("both replicas at work", lambda: is_at_work(last_word(job)) and len(parts(job)) >= 2)
    before = workers(command)
    began_at = {name: process.create_time() for name, process in before.items()}
    before["local-0"].kill()
    assert command.end() == 0, command.log
    (path,) = run_files(job)
    account = RunAccount.model_validate_json(path.read_bytes())
    killed, other = account.replicas
    assert (killed.name, killed.processes, other.name, other.processes) == ("local-0", 2, "local-1", 1)
    assert killed.seconds["start"] >= 2 * _START_S
    assert other.seconds["start"] >= _START_S
    assert killed.seconds["lost"] > 0
    if "is run a second time" not in command.log:  # of two copies of a unit that holds up a busy machine one is in vain
        assert other.seconds["lost"] == 0
    for replica in (killed, other):
        spent(replica, began_at[replica.name], job, account)
        assert replica.seconds["busy"] > 0
    unheard = len(parts(job)) - account.units  # committed with its last breath, before the driver heard of it
    assert 0 <= unheard <= 2
    assert account.rows == _ROWS - _UNIT_ROWS * unheard
    assert account.output_tokens == account.rows * _TOKENS
    # Every token once: what a dead process had answered and not committed may be copied from its node's answers.
    told = killed.output_tokens + other.output_tokens + account.copied_tokens
    assert account.output_tokens <= told <= _ROWS * _TOKENS
    assert killed.generated_tokens + other.generated_tokens >= account.output_tokens - account.copied_tokens


def test_a_killed_drivers_last_word_and_the_next_runs_account_make_the_report(job: Path) -> None:
    command = start(job)
    command.wait_for("both replicas at work", lambda: is_at_work(last_word(job)) and len(parts(job)) >= 2)
    command.send(signal.SIGKILL)
    command.end()
    said = last_word(job)
    assert said is not None
    assert run_files(job) == []
    known = report(str(job.parent / "out"))
    assert [run.run for run in known.runs] == [said.run]
    assert "goes on, or ended" in known.unknown[0]
    again = start(job)
    assert again.end() == 0, again.log
    assert [path.name.split(".", 1)[1] for path in run_files(job)] == ["last.json", "json"]
    whole = report(str(job.parent / "out"))
    assert [(run.run, run.whole) for run in whole.runs] == [(said.run, False), (whole.runs[1].run, True)]
    assert whole.num_requests <= _ROWS
    accounted, done = sum(run.units for run in whole.runs), len(parts(job))
    assert [f"{done - accounted} of {done} committed units" in sentence for sentence in whole.unknown[1:]] == [True] * (accounted < done)
    assert whole.output_tokens == _TOKENS * whole.num_requests
    for replica in whole.runs[0].replicas:
        assert replica.seconds_if_over is None
        assert replica.seconds["lost"] > 0  # what was in its engine, and in units that were not committed


def test_a_run_that_is_told_to_go_keeps_what_its_replicas_saved(job: Path) -> None:
    command = start(job)
    command.wait_for("both replicas at work", lambda: is_at_work(last_word(job)) and len(parts(job)) >= 2)
    command.send(signal.SIGTERM)
    assert command.end() == 130, command.log
    (path,) = run_files(job)
    account = RunAccount.model_validate_json(path.read_bytes())
    assert (account.state, account.whole) == ("drained", True)
    kept = sum(replica.output_tokens for replica in account.replicas)
    assert kept > account.output_tokens == account.rows * _TOKENS
    again = start(job)
    assert again.end() == 0, again.log
    both = report(str(job.parent / "out"))
    done = len(parts(job))
    unheard = done - sum(run.units for run in both.runs)  # committed in the moment in which its replica went
    assert 0 <= unheard <= 4
    assert [f"{unheard} of {done} committed units" in sentence for sentence in both.unknown] == [True] * (unheard > 0)
    assert both.output_tokens == (_ROWS - _UNIT_ROWS * unheard) * _TOKENS
    copied = sum(run.copied_tokens for run in both.runs)
    told = sum(replica.output_tokens for replica in both.replicas) + copied
    assert both.output_tokens <= told <= _ROWS * _TOKENS
