from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.bench.peers.rounds import Measured
from tests.bench.peers.rounds import Round
from tests.bench.peers.rounds import SideFailed
from tests.bench.peers.rounds import median_speed_ratio
from tests.bench.peers.rounds import median_wall_ratio
from tests.bench.peers.rounds import timed


def _round(our_s: float, their_s: float, *, our_tokens: int = 100, their_tokens: int = 100) -> Round:
    ours, theirs = Measured(seconds=our_s, output_tokens=our_tokens), Measured(seconds=their_s, output_tokens=their_tokens)
    return Round(ours=ours, theirs=theirs, same_text=0)


def test_the_median_is_of_each_rounds_own_ratio() -> None:
    rounds = [_round(10, 30), _round(20, 20), _round(10, 20)]
    assert median_wall_ratio(rounds) == 2.0


def test_speed_counts_each_sides_own_tokens() -> None:
    assert median_speed_ratio([_round(10, 20, our_tokens=50, their_tokens=200)]) == 0.5


def _run(code: str, folder: Path, **given: float) -> float:
    return timed([sys.executable, "-c", code], os.environ, log=folder / "log", folder=folder, timeout_s=given.get("timeout_s", 30.0))


def test_a_command_is_timed_until_its_process_has_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    seconds = _run("import time; time.sleep(0.3)", tmp_path)
    assert 0.3 <= seconds <= time.monotonic() - began


def test_a_side_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(SideFailed) as caught:
        _run("print('no such model'); raise SystemExit(3)", tmp_path)
    assert "ended with 3" in str(caught.value)
    assert "no such model" in str(caught.value)


@pytest.mark.slow
def test_a_side_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    with pytest.raises(SideFailed, match="not done after 2 s"):
        _run(code, tmp_path, timeout_s=2.0)
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    until = time.monotonic() + 10
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
