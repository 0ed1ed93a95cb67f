"""The short form of the storm: real processes, real signals, the independent checker. The long form is a command; see storm.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.azurite import why_not
from tests.chaos import storm
from tests.chaos.nemesis import role_of
from tests.chaos.storm import Figures

pytestmark = [pytest.mark.chaos, pytest.mark.long]

_FAULTS = 10
_SEED = 20261125


@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", ["local", pytest.param("azurite", marks=pytest.mark.azurite)])
def test_a_storm_of_signals_loses_doubles_and_changes_no_row(store: str, tmp_path: Path) -> None:
    if store == "azurite" and (reason := why_not()):
        pytest.skip(reason)
    told = tmp_path / "figures.json"
    ended = storm.main(
        ["--faults", str(_FAULTS), "--seed", str(_SEED), "--store", store, "--json", str(told), "--keep", str(tmp_path / "storm")]
    )
    figures = json.loads(told.read_text())
    assert (figures["lost"], figures["doubled"], figures["foreign"], figures["changed"], figures["changed_after_commit"]) == (0, 0, 0, 0, 0)
    assert (figures["undeserved_error_rows"], figures["other_damage"], figures["troubles"], figures["hung"]) == (0, {}, [], "")
    assert ended == 0
    assert figures["faults"] >= _FAULTS
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
