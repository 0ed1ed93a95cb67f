"""What a run came to, as tables for a person. Reads reports; writes nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from rich.console import Console
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jobs.progress import seconds_words
from jobs.report import share_of_raw
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount
from schemas.manifest import Totals


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended. `totals` counts the whole output, `this_run` what this run added."""

    state: str
    exit_code: int
    out_uri: str
    fingerprint: str
    units: int
    rows: int
    totals: Totals
    this_run: Totals
    wall_s: float
    """From the call to the end."""
    start_s: dict[str, float] = field(default_factory=dict)
    """Seconds each replica took to come up."""
    account: RunAccount | None = None
    """Where the replicas' seconds went; None where none was needed."""
    failed: dict[int, str] = field(default_factory=dict)
    retries: int = 0
    new_objects: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def generate_s(self) -> float:
        """From this run's first read to just before its last commit."""
        if self.this_run.started_at is None or self.this_run.finished_at is None:
            return 0.0
        return self.this_run.finished_at - self.this_run.started_at

    @property
    def output_tokens_per_s(self) -> float:
        """Of tokens that no earlier output had."""
        return (self.this_run.completion_tokens - self.this_run.reused_tokens) / self.generate_s if self.generate_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For --json: plain data."""
        return {
            "state": self.state,
            "exit_code": self.exit_code,
            "output": self.out_uri,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "rows_done": self.totals.rows,
            "error_rows": self.totals.error_rows,
            "errors": self.totals.errors,
            "finish_reasons": self.totals.finish_reasons,
            "prompt_tokens": self.totals.prompt_tokens,
            "completion_tokens": self.totals.completion_tokens,
            "this_run": {
                "rows": self.this_run.rows,
                "prompt_tokens": self.this_run.prompt_tokens,
                "completion_tokens": self.this_run.completion_tokens,
                "copied_rows": self.this_run.copied_rows,
                "copied_tokens": self.this_run.copied_tokens,
                "cached_prompt_tokens": self.this_run.cached_prompt_tokens,
                "reused_rows": self.this_run.reused_rows,
                "reused_tokens": self.this_run.reused_tokens,
                "wall_s": round(self.wall_s, 2),
                "generate_s": round(self.generate_s, 2),
                "output_tokens_per_s": round(self.output_tokens_per_s, 1),
                "unit_seconds": {kind: round(seconds, 2) for kind, seconds in self.this_run.seconds.items()},
            },
            "start_s": self.start_s,
            "account": self.account and self.account.model_dump(mode="json"),
            "failed_units": self.failed,
            "retries": self.retries,
        }


def print_summary(result: RunResult, console: Console, resume_command: str) -> None:
    """The table at the end, the errors, and what to do next."""
    totals, run = result.totals, result.this_run
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("state", Text(result.state, style="green" if result.exit_code == 0 else "yellow"))
    table.add_row("rows", f"{totals.rows:,} of {result.rows:,} in {totals.units} of {result.units} units")
    good = totals.rows - totals.error_rows
    table.add_row("completions", f"{good:,} ({_counts({k: v for k, v in totals.finish_reasons.items() if k != 'error'})})")
    table.add_row("error rows", f"{totals.error_rows:,}" + (f" ({_counts(totals.errors)})" if totals.errors else ""))
    table.add_row("tokens", f"{totals.prompt_tokens:,} prompt, {totals.completion_tokens:,} output")
    if run.copied_rows:
        table.add_row(
            "copied", f"{run.copied_rows:,} rows, {run.copied_tokens:,} output tokens: as identical rows came out (engine.ordering)"
        )
    if run.cached_prompt_tokens:
        found = run.cached_prompt_tokens / run.prompt_tokens
        table.add_row(
            "shared", f"{run.cached_prompt_tokens:,} prompt tokens ({found:.0%}) of rows that begin like others: from the prefix cache"
        )
    if run.reused_rows:
        table.add_row("reused", f"{run.reused_rows:,} rows, {run.reused_tokens:,} output tokens: as earlier outputs have them (reuse)")
    if run.rows:
        whole = run.prompt_tokens + run.completion_tokens - run.reused_tokens
        per_s = whole / result.generate_s if result.generate_s else 0.0
        table.add_row(
            "speed",
            f"{result.output_tokens_per_s:,.1f} output tokens/s, {per_s:,.1f} with prompts, over {seconds_words(result.generate_s)}",
        )
    table.add_row(
        "this run", f"{run.rows:,} rows in {seconds_words(result.wall_s)}" + (f", {result.retries} retries" if result.retries else "")
    )
    for replica in result.account.replicas if result.account else ():
        table.add_row(Text(f"replica {replica.name}"), account_line(replica))
    if result.account and (share := share_of_raw(result.account)) is not None:
        table.add_row("raw engine", f"{share:.1%} of what the replicas generate while their batches are at least half full")
    table.add_row("output", Text(result.out_uri))
    console.print(Group(Text("\n" + "Summary", style="bold"), table), highlight=False)
    if totals.examples:
        errors = Table("kind", "rows", "for example row", "message", title="Error rows", title_justify="left")
        for example in totals.examples:
            kind = example["kind"]
            errors.add_row(Text(kind), str(totals.errors.get(kind, 0)), str(example["row"]), Text(example["message"]))
        console.print(errors)
    for index, reason in list(result.failed.items())[:5]:
        console.print(f"unit {index} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
    for uri, reason in result.skipped[:5]:
        console.print(f"left out {uri}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if result.new_objects:
        console.print(
            f"{len(result.new_objects)} new input objects were not taken, since the plan is older (the first: {result.new_objects[0]}); "
            "give them an output of their own",
            markup=False,
            highlight=False,
        )
    if result.exit_code:
        console.print(f"to go on: {resume_command}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(f"proof: tokenmill verify {shlex.quote(result.out_uri)}", markup=False, highlight=False, soft_wrap=True)


def account_line(replica: ReplicaAccount) -> str:
    """One replica's seconds by kind."""
    parts = [f"{kind.replace('_', '-')} {seconds:.1f}" for kind, seconds in replica.seconds.items() if seconds >= 0.05]
    again = f", started {replica.processes} times" if replica.processes > 1 else ""
    return f"{replica.lifetime_s:.1f} s: {', '.join(parts)}{again}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"
