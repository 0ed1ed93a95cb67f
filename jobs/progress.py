"""Progress in, speed and its display out: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jobs.cluster.cluster import ReplicaState
from jobs.driver import Progress

_WINDOW_S = 20.0
_PLAIN_EVERY_S = 10.0
_LIVE_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Over the last window."""

    tokens_per_s: float = 0.0
    """Output tokens."""
    rows_per_s: float = 0.0
    eta_s: float | None = None
    """Seconds to go, where it can be told."""


class SpeedMeter:
    """Sums what replicas have done since they were first seen, and differences that over a sliding window.

    Their own counters begin when an engine comes up, and with `tokenmill worker` that may have been for an earlier job.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: Sequence[ReplicaState] = ()
        self._heard: dict[str, tuple[int, int]] = {}
        """Rows and tokens that a replica said last."""
        self._rows = self._tokens = 0
        self._seen: deque[tuple[float, int, int]] = deque()

    def measure(self, progress: Progress) -> Speed:
        now = self._clock()
        self._hear(progress.replicas)
        self._seen.append((now, self._tokens, self._rows))
        while len(self._seen) > 2 and self._seen[0][0] < now - _WINDOW_S:
            self._seen.popleft()
        since, tokens_then, rows_then = self._seen[0]
        if now - since < 1.0:
            return Speed()
        rows_per_s = (self._rows - rows_then) / (now - since)
        # Rows that the engine has finished are nearer to the truth than rows of committed units, which come in lumps.
        left = progress.total_rows - progress.rows_before - max(self._rows, progress.totals.rows)
        eta_s = max(0.0, left / rows_per_s) if rows_per_s > 0 else None
        return Speed(tokens_per_s=(self._tokens - tokens_then) / (now - since), rows_per_s=rows_per_s, eta_s=eta_s)

    def _hear(self, replicas: Sequence[ReplicaState]) -> None:
        if replicas is self._replicas:
            return  # not a word that was not there before
        there, here = ({replica.name for replica in some} for some in (self._replicas, replicas))
        begins_anew = bool(there - here)  # fewer go on from here
        for replica in replicas:
            now = replica.rows, replica.completion_tokens
            rows, tokens = self._heard.get(replica.name, now)
            if now[0] < rows or now[1] < tokens:  # a new engine, which counts from nothing
                rows, tokens, begins_anew = 0, 0, True
            elif replica.name in self._heard and replica.name not in there:
                begins_anew = True  # it was out of reach, and says at once what it did meanwhile
            self._rows, self._tokens = self._rows + now[0] - rows, self._tokens + now[1] - tokens
            self._heard[replica.name] = now
        if begins_anew:
            self._seen.clear()
        self._replicas = replicas


class Display(Protocol):
    """Shows progress."""

    def update(self, progress: Progress, speed: Speed) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_display(stream: TextIO) -> Display:
    """Live on a terminal, lines elsewhere."""
    return LiveDisplay(Console(file=stream)) if stream.isatty() else PlainDisplay(stream)


def progress_line(progress: Progress, speed: Speed) -> str:
    """All there is to say in one line."""
    totals = progress.totals
    rows = progress.rows_before + totals.rows
    parts = [
        f"{progress.state}: {rows:,} of {progress.total_rows:,} rows",
        f"{progress.done_before + totals.units} of {progress.total_units} units ({progress.units_in_flight} in flight)",
        f"{speed.tokens_per_s:,.0f} output tok/s",
        f"{totals.error_rows} errors",
    ]
    if progress.failed:
        parts.append(f"{len(progress.failed)} units failed")
    if speed.eta_s is not None and progress.state == "running":
        parts.append(f"ETA {seconds_words(speed.eta_s)}")
    parts.append(f"{len(progress.replicas)} replicas")
    if progress.usd is not None:
        parts.append(f"{progress.usd:,.2f} USD")
    return ", ".join(parts)


def seconds_words(seconds: float) -> str:
    """72 s is 1m12s."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


class PlainDisplay:
    """A line every ten seconds, and one whenever something happened."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._next, self._state = 0.0, ""

    def update(self, progress: Progress, speed: Speed) -> None:
        now = self._clock()
        if now >= self._next or progress.state != self._state:
            self._next, self._state = now + _PLAIN_EVERY_S, progress.state
            self.say(progress_line(progress, speed))

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        return


class LiveDisplay:
    """A small table that renews itself; what happened scrolls by above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._next = console, clock, 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def update(self, progress: Progress, speed: Speed) -> None:
        now = self._clock()
        if now < self._next:
            return
        self._next = now + _LIVE_EVERY_S
        share = (progress.rows_before + progress.totals.rows) / max(1, progress.total_rows)
        width = 40
        bar = "━" * round(share * width) + "╌" * (width - round(share * width))
        table = Table.grid(padding=(0, 1))
        table.add_row(Text(bar, style="green"), f"{share:.0%}")
        lines = Table.grid()
        lines.add_row(table)
        lines.add_row(Text(progress_line(progress, speed)))
        if progress.dashboard:
            lines.add_row(Text(f"dashboard {progress.dashboard}", style="dim"))
        self._live.update(lines, refresh=True)

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()
