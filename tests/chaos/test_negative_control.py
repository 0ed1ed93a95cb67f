"""The negative control: writers as many people write them first, under real SIGKILLs and SIGSTOPs, and the same checker over them.

A checker that finds nothing in Tokenmill's output proves something only if it finds what these do to theirs. Each writer ends
with exit code 0 and a marker for every unit: it believes that it is complete.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.chaos.naive import UNIT_ROWS

pytestmark = pytest.mark.chaos

_ROOT = Path(__file__).resolve().parents[2]
_ROWS = 240
_UNITS = _ROWS // UNIT_ROWS
_KILLS = 6
_SEEDS = (1, 2)
_PATIENCE_S = 60.0


class Writer:
    """One naive writer over one table."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.mode, self.input, self.out = mode, folder / "in.parquet", folder / "out"
        self.out.mkdir()
        pq.write_table(pa.table({"id": list(range(_ROWS)), "prompt": [f"question {row}" for row in range(_ROWS)]}), self.input)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.chaos.naive", self.mode, str(self.input), str(self.out)]
        self._started.append(subprocess.Popen(command, cwd=_ROOT))
        return self._started[-1]

    def parts(self) -> int:
        return len(list(self.out.glob("*.parquet")))

    def wait_for_more_parts_than(self, count: int, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while self.parts() <= count and process.poll() is None:
            assert time.monotonic() < deadline, "it writes nothing"
            time.sleep(0.001)

    def finish(self) -> None:
        """To what it takes for the end."""
        assert self.start().wait(_PATIENCE_S) == 0
        assert len(list((self.out / "markers").iterdir())) == _UNITS

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


def killed_again_and_again(writer: Writer, seed: int) -> None:
    """Each time after its first new part and a moment more, which the seed tells."""
    moments = random.Random(seed)
    for _ in range(_KILLS):
        before, process = writer.parts(), writer.start()
        writer.wait_for_more_parts_than(before, process)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    writer.finish()


@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize(("mode", "kinds"), [("marker_last", {"doubled", "unreadable"}), ("marker_first", {"lost", "unreadable"})])
def test_the_checker_catches_a_naive_writer_that_is_killed(tmp_path: Path, mode: str, kinds: set[str], seed: int) -> None:
    writer = Writer(tmp_path, mode)
    try:
        killed_again_and_again(writer, seed)
    finally:
        writer.close()
    found = check(str(writer.input), str(writer.out))
    print(f"\n{mode}, seed {seed}, {_KILLS} kills: {found.damage}")
    assert not found.fine
    assert kinds & set(found.damage)


def test_the_checker_catches_nothing_where_nobody_is_killed(tmp_path: Path) -> None:
    """Else the control would prove nothing."""
    for mode in ("marker_last", "marker_first", "overwrite"):
        (tmp_path / mode).mkdir()
        writer = Writer(tmp_path / mode, mode)
        writer.finish()
        found = check(str(writer.input), str(writer.out))
        assert found.fine, found.describe()


def stopped_over_a_part(writer: Writer) -> tuple[subprocess.Popen[bytes], Path]:
    """A process under SIGSTOP with half a part written, and that part."""
    process, deadline = writer.start(), time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        halves = [path for path in writer.out.glob("*.parquet") if path.read_bytes()[-4:] != b"PAR1" and path.stat().st_size]
        if halves:
            return process, halves[0]
        process.send_signal(signal.SIGCONT)
        time.sleep(0.003)
    pytest.fail("it was never found over a part")


def test_the_history_catches_a_naive_writer_that_wakes_and_writes_late(tmp_path: Path) -> None:
    """A zombie: overtaken by another process, then woken. What a reader saw under its marker changes."""
    writer = Writer(tmp_path, "overwrite")
    try:
        zombie, part = stopped_over_a_part(writer)
        writer.finish()
        found = check(str(writer.input), str(writer.out))
        assert found.fine, found.describe()
        history = History(str(writer.out))
        history.look()
        zombie.send_signal(signal.SIGCONT)
        assert zombie.wait(_PATIENCE_S) == 0
        history.look()
    finally:
        writer.close()
    assert (history.fine, sorted(history.changed)) == (False, [part.name])
