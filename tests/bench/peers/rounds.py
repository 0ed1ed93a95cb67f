"""Runs sides in turn with the clock outside, and what the turns add up to."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class SideFailed(Exception):
    """A side ended with an error or took too long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One side of one round."""

    seconds: float
    output_tokens: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Both sides, one straight after the other."""

    ours: Measured
    theirs: Measured
    same_text: int
    """Rows with the same completion on both sides."""

    @property
    def wall_ratio(self) -> float:
        """Their seconds over ours; above 1 we are faster."""
        return self.theirs.seconds / self.ours.seconds

    @property
    def speed_ratio(self) -> float:
        """Our output tokens/s over theirs."""
        return self.ours.tokens_per_s / self.theirs.tokens_per_s


def median_wall_ratio(rounds: Sequence[Round]) -> float:
    return statistics.median(one.wall_ratio for one in rounds)


def median_speed_ratio(rounds: Sequence[Round]) -> float:
    return statistics.median(one.speed_ratio for one in rounds)


def timed(command: Sequence[str], environment: Mapping[str, str], *, log: Path, folder: Path, timeout_s: float) -> float:
    """Seconds from the command's start until its process has ended; all that it started is gone afterwards. Raises SideFailed.

    What it prints goes to a file: a terminal, or a pipe that somebody reads, would take one of the machine's cores now and then.
    """
    with log.open("wb") as written:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
            seconds = time.monotonic() - began
        except subprocess.TimeoutExpired:
            raise SideFailed(f"not done after {timeout_s:.0f} s: {_tail(log)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise SideFailed(f"ended with {code}: {_tail(log)}")
    return seconds


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"the last lines of {log}:\n" + "\n".join(line[:300] for line in lines[-20:])
