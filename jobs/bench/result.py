"""What a benchmark measured, as values, as plain data for --json, and as a table for people. Measures nothing.

Tokens/s are always named: output (generated tokens only) or total (prompt and generated tokens).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.spread import STATISTICS
from jobs.spread import spread
from pipeline.trial import TrialResult

_MIN_WIDTH = 110
"""Characters a line: cropped numbers are worse than wrapped lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaMeasured:
    """What one replica did in one round."""

    name: str
    rows: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    """That its tokens/s are over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One side of one round."""

    rows: int
    prompt_tokens: int
    output_tokens: int
    elapsed_s: float
    replicas: tuple[ReplicaMeasured, ...] = ()

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.elapsed_s

    @property
    def total_tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.elapsed_s

    @classmethod
    def of(cls, result: TrialResult) -> Measured:
        """A trial's."""
        replicas = tuple(
            ReplicaMeasured(
                name=replica.name,
                rows=replica.rows,
                prompt_tokens=replica.prompt_tokens,
                output_tokens=replica.output_tokens,
                seconds=replica.seconds,
            )
            for replica in result.replicas
        )
        return cls(
            rows=result.rows,
            prompt_tokens=result.prompt_tokens,
            output_tokens=result.output_tokens,
            elapsed_s=result.elapsed_s,
            replicas=replicas,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_tokens_per_s": round(self.output_tokens_per_s, 2),
            "total_tokens_per_s": round(self.total_tokens_per_s, 2),
            "elapsed_s": round(self.elapsed_s, 3),
            "num_requests": self.rows,
            "total_prompt_tokens": self.prompt_tokens,
            "total_output_tokens": self.output_tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """All that a figure depends on."""

    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    start_s: Mapping[str, float]
    """Seconds that each replica took to come up; never part of a round."""
    cores: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """What a benchmark says. The headline is the round whose output tokens/s are the median."""

    mode: str
    rounds: tuple[Measured, ...]
    setting: Setting
    raw: tuple[Measured, ...] = ()
    """The raw engine's side of each round, where it was measured."""
    error_rows: int = 0
    """Rows of the table that never reach an engine."""
    window: str = ""
    """What elapsed_s is from and to."""
    offline: Mapping[str, Any] = field(default_factory=dict)
    """What LoadGen and the checks of its Offline scenario said; empty in other modes."""

    @property
    def headline(self) -> Measured:
        return median_round(self.rounds)

    @property
    def share_of_raw_engine(self) -> float | None:
        """The median of the rounds' own shares."""
        if not self.raw:
            return None
        pairs = zip(self.rounds, self.raw, strict=True)
        return statistics.median(ours.output_tokens_per_s / raw.output_tokens_per_s for ours, raw in pairs)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        share, head = self.share_of_raw_engine, self.headline
        return {
            "mode": self.mode,
            "share_of_raw_engine": None if share is None else round(share, 4),
            **head.to_dict(),
            "requests_per_s": round(head.rows / head.elapsed_s, 3),
            "window": self.window,
            "error_rows": self.error_rows,
            "per_core": {
                "cores": self.setting.cores,
                "output_tokens_per_s": round(head.output_tokens_per_s / self.setting.cores, 2),
                "total_tokens_per_s": round(head.total_tokens_per_s / self.setting.cores, 2),
            },
            "per_replica": {"replicas": [_of_replica(replica) for replica in head.replicas], "statistics": _over_replicas(head.replicas)},
            "rounds": [measured.to_dict() for measured in self.rounds],
            "raw_rounds": [measured.to_dict() for measured in self.raw],
            "start_s": dict(self.setting.start_s),
            "model": dict(self.setting.model),
            "machine": dict(self.setting.machine),
            "settings": dict(self.setting.settings),
            "versions": dict(self.setting.versions),
            **({"offline": dict(self.offline)} if self.offline else {}),
        }


def median_round(rounds: Sequence[Measured]) -> Measured:
    """The round whose output tokens/s are the median; of an even number the lower of the two in the middle."""
    ordered = sorted(rounds, key=lambda measured: measured.output_tokens_per_s)
    return ordered[(len(ordered) - 1) // 2]


def print_result(result: BenchResult, console: Console) -> None:
    """The same as to_dict, for people."""
    head, setting = result.headline, result.setting
    console.width = max(console.width, _MIN_WIDTH)
    table = _plain_table()

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("output tokens/s", f"{head.output_tokens_per_s:,.1f}")
    row("total tokens/s", f"{head.total_tokens_per_s:,.1f} (prompt and output)")
    row(
        "per core", f"{head.output_tokens_per_s / setting.cores:,.1f} output, {head.total_tokens_per_s / setting.cores:,.1f} total tokens/s"
    )
    row("tokens", f"{head.prompt_tokens:,} prompt, {head.output_tokens:,} output")
    row("requests", f"{head.rows:,}" + (f"; {result.error_rows:,} rows of the table never reach an engine" if result.error_rows else ""))
    row("elapsed", f"{head.elapsed_s:,.1f} s, {result.window}")
    if result.share_of_raw_engine is not None:
        raw = median_round(result.raw)
        row("raw engine", f"{raw.output_tokens_per_s:,.1f} output tokens/s; same replicas, token ids and counts, turn by turn")
        row("share of raw engine", f"{result.share_of_raw_engine:.3f}, median of {len(result.raw)}")
    row("started in", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in setting.start_s.items()))
    for name, values in (
        ("model", setting.model),
        ("machine", setting.machine),
        ("settings", setting.settings),
        ("versions", setting.versions),
    ):
        row(name, _words(values))
    console.print(Text(f"bench {result.mode}, {len(result.rounds)} {'rounds' if len(result.rounds) > 1 else 'round'}", style="bold"))
    console.print(table, highlight=False)
    _print_replicas(head, console)
    if len(result.rounds) > 1:
        rounds = Table(
            "round", "output tokens/s", "total tokens/s", "seconds", "raw output tokens/s", "share", box=None, padding=(0, 2, 0, 0)
        )
        for number, measured in enumerate(result.rounds):
            cells = [
                str(number + 1),
                f"{measured.output_tokens_per_s:,.1f}",
                f"{measured.total_tokens_per_s:,.1f}",
                f"{measured.elapsed_s:,.1f}",
            ]
            if result.raw:
                raw = result.raw[number]
                cells += [f"{raw.output_tokens_per_s:,.1f}", f"{measured.output_tokens_per_s / raw.output_tokens_per_s:.3f}"]
            rounds.add_row(*cells)
        console.print(rounds, highlight=False)
    if result.offline:
        offline = _plain_table()
        for name, value in result.offline.items():
            if value not in (None, []):
                offline.add_row(_name(name), Text(_words(value) if isinstance(value, Mapping) else _word(value)))
        console.print(offline, highlight=False)


def _plain_table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _print_replicas(head: Measured, console: Console) -> None:
    columns = ("replica", "rows", "prompt tokens", "output tokens", "seconds", "output tokens/s", "total tokens/s")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for replica in head.replicas:
        values = _of_replica(replica)
        table.add_row(
            Text(replica.name),
            *(f"{values[key]:,}" for key in ("num_requests", "prompt_tokens", "output_tokens")),
            *(f"{values[key]:,.1f}" for key in ("seconds", "output_tokens_per_s", "total_tokens_per_s")),
        )
    if head.replicas:
        table.add_section()
        found = _over_replicas(head.replicas)
        for name in STATISTICS:
            table.add_row(name, *[f"{found[key][name]:,.1f}" for key in _COLUMNS])
    console.print(table, highlight=False)


_COLUMNS = ("num_requests", "prompt_tokens", "output_tokens", "seconds", "output_tokens_per_s", "total_tokens_per_s")


def _of_replica(replica: ReplicaMeasured) -> dict[str, Any]:
    return {
        "name": replica.name,
        "num_requests": replica.rows,
        "prompt_tokens": replica.prompt_tokens,
        "output_tokens": replica.output_tokens,
        "seconds": round(replica.seconds, 3),
        "output_tokens_per_s": round(replica.output_tokens / replica.seconds, 2),
        "total_tokens_per_s": round((replica.prompt_tokens + replica.output_tokens) / replica.seconds, 2),
    }


def _over_replicas(replicas: Sequence[ReplicaMeasured]) -> dict[str, dict[str, float]]:
    rows = [_of_replica(replica) for replica in replicas]
    return spread({column: [float(row[column]) for row in rows] for column in _COLUMNS})


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_name(name)} {_word(value)}" for name, value in values.items() if value not in ("", None, []))


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_words(value)})"
    return "; ".join(map(_word, value)) if isinstance(value, list) else str(value)


def _name(name: str) -> str:
    """Environment variables stay as they are."""
    return name.replace("_", " ") if name.islower() else name
