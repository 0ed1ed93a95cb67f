"""One peer against Tokenmill: two sides and rows in, rounds out. Knows neither command line nor venvs."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

from tests.bench.peers.outputs import Answer
from tests.bench.peers.outputs import check
from tests.bench.peers.outputs import same_text
from tests.bench.peers.rounds import Measured
from tests.bench.peers.rounds import Round
from tests.bench.peers.rounds import timed
from tests.bench.peers.rows import Row
from tests.bench.peers.rows import write_batch
from tests.bench.peers.rows import write_parquet
from tests.bench.peers.sides import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side, ready to run any number of times."""

    name: str
    task: Task
    """Its input and output are set for each run."""
    command: Callable[[Task], list[str]]
    environment: Mapping[str, str]
    read: Callable[[Path], list[Answer]]
    clock_inside: bool
    """The command is an engine alone, and tells in its last line how long that took."""


def compare(
    ours: Side,
    theirs: Side,
    rows: Sequence[Row],
    *,
    num_rounds: int,
    warm_rows: int,
    work: Path,
    timeout_s: float,
    count_tokens: Callable[[str], int],
    say: Callable[[str], None],
) -> list[Round]:
    """Let both sides take turns: ours, theirs, ours, theirs. Raises SideFailed and BadOutput.

    Before a clock runs, each side runs a few rows, so that compiled kernels and the checkpoint's pages are cached for both.
    """
    for side in (ours, theirs) if warm_rows else ():
        _run(side, rows[:warm_rows], work / f"warm-{side.name}", timeout_s, count_tokens)
        say(f"{side.name} is warm")
    rounds = []
    for index in range(num_rounds):
        (our, our_answers), (their, their_answers) = (
            _run(side, rows, work / f"{index}-{side.name}", timeout_s, count_tokens) for side in (ours, theirs)
        )
        rounds.append(Round(ours=our, theirs=their, same_text=same_text(our_answers, their_answers)))
        say(
            f"round {index + 1}: {ours.name} {our.seconds:.1f} s, {our.tokens_per_s:.0f} output tok/s; "
            f"{theirs.name} {their.seconds:.1f} s, {their.tokens_per_s:.0f} output tok/s; "
            f"wall ratio {rounds[-1].wall_ratio:.2f}; same text in {rounds[-1].same_text} of {len(rows)} rows"
        )
    return rounds


def _run(
    side: Side, rows: Sequence[Row], home: Path, timeout_s: float, count_tokens: Callable[[str], int]
) -> tuple[Measured, list[Answer]]:
    """One run in a folder of its own, its output checked."""
    task = replace(side.task, input_folder=home / "in", batch_file=home / "in.jsonl", output=home / "out")
    write_parquet(rows, task.input_folder)
    write_batch(rows, task.batch_file, model=task.model, max_tokens=task.max_tokens)
    log = home / "log"
    seconds = timed(side.command(task), side.environment, log=log, folder=home, timeout_s=timeout_s)
    answers = side.read(task.output)
    check(rows, answers, max_tokens=task.max_tokens)
    tokens = sum(count_tokens(answer.text) if answer.num_tokens is None else answer.num_tokens for answer in answers)
    if side.clock_inside:
        seconds = float(json.loads(log.read_text().splitlines()[-1])["seconds"])
    return Measured(seconds=seconds, output_tokens=tokens), answers
