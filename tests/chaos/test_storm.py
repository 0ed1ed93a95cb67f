"""The short form of the storm: real processes, real signals, the independent checker. The long form is a command; see storm.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.hardware import find_profile
from tests.azurite import why_not
from tests.chaos import storm
from tests.chaos.nemesis import role_of
from tests.chaos.storm import Figures

pytestmark = [pytest.mark.chaos, pytest.mark.long]

_SEED = 20261125


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("store", "cluster", "faults"),
    [
        ("local", "local", 10),
        pytest.param("azurite", "local", 10, marks=pytest.mark.azurite),
        ("local", "address", 5),  # a scheduler and nodes of their own, over TLS, struck as well
    ],
)
def test_a_storm_of_signals_loses_doubles_and_changes_no_row(store: str, cluster: str, faults: int, tmp_path: Path) -> None:
    if store == "azurite" and (reason := why_not()):
        pytest.skip(reason)
    told = tmp_path / "figures.json"
    where = ["--store", store, "--cluster", cluster, "--json", str(told), "--keep", str(tmp_path / "storm")]
    ended = storm.main(["--faults", str(faults), "--seed", str(_SEED), *where])
    figures = json.loads(told.read_text())
    assert (figures["lost"], figures["doubled"], figures["foreign"], figures["changed"], figures["changed_after_commit"]) == (0, 0, 0, 0, 0)
    assert (figures["undeserved_error_rows"], figures["other_damage"], figures["troubles"], figures["hung"]) == (0, {}, [], "")
    assert ended == 0
    assert figures["faults"] >= faults
    assert figures["rows"] > 0
    assert figures["recovery_s"]["of"] > 0


def test_damage_makes_a_storm_fail() -> None:
    """The control: figures with any loss are not fine."""
    assert Figures().fine
    for kind in ("lost", "doubled", "foreign", "changed", "changed_after_commit", "not_verified"):
        figures = Figures()
        figures.damage[kind] = 1
        assert not figures.fine
        assert figures.to_dict()["loss_per_fault_at_most"] is None
    assert not Figures(undeserved_errors=1).fine
    assert not Figures(troubles=["a traceback"]).fine


def test_overtaken_units_are_those_done_by_others_since_the_run_began() -> None:
    said = {"units_done": 9, "account": {"units": 4}}
    assert storm.overtaken_units(said, done_at_start=5) == 0
    assert storm.overtaken_units(said, done_at_start=2) == 3


def test_with_an_engine_process_only_that_differs_from_the_machines_own_profile(tmp_path: Path) -> None:
    own, apart = find_profile("local-cpu"), find_profile(str(storm.engine_process_profile(tmp_path)))
    assert apart.environment == {**own.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    same = {"name": own.name, "environment": own.environment}
    assert apart.model_copy(update=same) == own
    with pytest.raises(SystemExit):
        storm.main(["--engine-process"])


class Process:
    """What role_of asks of a process."""

    def __init__(self, *words: str) -> None:
        self._words = list(words)

    def cmdline(self) -> list[str]:
        return self._words


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (("python", "/venv/bin/tokenmill", "run", "job.yaml"), "driver"),
        (("python", "-m", "pipeline.worker", "/tmp/x/replica.json"), "worker"),
        (("python", "/venv/bin/tokenmill", "worker", "--scheduler", "tls://127.0.0.1:1"), "node"),
        (("python", "/venv/bin/tokenmill", "scheduler"), "scheduler"),
        (("python", "-c", "from multiprocessing.resource_tracker import main"), None),
        (("python", "/venv/bin/tokenmill", "verify", "out"), None),
    ],
)
def test_processes_are_known_by_their_command_lines(words: tuple[str, ...], role: str | None) -> None:
    assert role_of(Process(*words)) == role  # type: ignore[arg-type]
