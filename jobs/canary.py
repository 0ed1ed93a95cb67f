"""A few rows really run, to learn how long completions are and what a step of this machine's engine costs.

The rows go in two rounds, few and many, so that what a step costs by itself and what each row adds to it can be told apart:
seconds = per_step x steps + per_output_token x output tokens + per_prompt_token x prompt tokens, by least squares over the rounds' ticks.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.profile import ReplicaPlan
from pipeline.trial import Replicas
from pipeline.trial import TrialProgress
from schemas.errors import JobError

_FEW = 8
"""Of the rows go first: one in eight, for each replica at least one."""
_LEAST_ROWS = 8
_AROUND_S = 6.0
"""Of a run, before its first process starts and after its last row: checking the job, scheduler, manifest. Measured with the demo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Seconds of one replica."""

    per_step: float
    per_output_token: float
    per_prompt_token: float

    def seconds(self, *, rows: float, prompt_tokens: float, output_tokens: float, batch: float) -> float:
        """For so many rows of such mean lengths, at so many in a batch, to the last one's end."""
        batch = min(batch, rows)
        work = rows * (output_tokens * self.per_output_token + prompt_tokens * self.per_prompt_token)
        steps = rows * output_tokens / batch
        tail_steps = output_tokens / 2  # at the end, the batch empties over about one row's life, half full
        return work + (steps + tail_steps) * self.per_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """What the rows told."""

    output_lengths: tuple[int, ...]
    cost: StepCost
    replicas: int
    max_num_seqs: int
    start_s: float
    """From a command to its first engine step, here."""
    output_tokens_per_s: float
    """Of all replicas, in the larger round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """What happened between two looks."""

    seconds: float
    steps: float
    """Output tokens over rows in the batch."""
    output_tokens: float
    prompt_tokens: float


def run_canary(plan: ReplicaPlan, model: Model, kind: str, requests: Sequence[Request], *, timeout_s: float) -> Canary:
    """Generate them. Raises JobError where there are too few, EngineError where the engine fails."""
    least = max(_LEAST_ROWS, 2 * plan.replicas)
    if len(requests) < least:
        raise JobError(
            f"--canary: {len(requests)} rows can be asked, expected {least} at least: two rounds, in which every replica has one"
        )
    few = max(plan.replicas, len(requests) // _FEW)
    ticks: list[Tick] = []
    lengths: list[int] = []
    rate = 0.0
    with Replicas(plan, model, kind, timeout_s=timeout_s) as replicas:
        infos = replicas.infos.values()
        seats = sum(info.max_num_seqs for info in infos)
        for part in (requests[:few], requests[few:]):
            seen = [TrialProgress(rows=0, output_tokens=0, prompt_tokens=0, seconds=0.0)]
            result = replicas.run(part, timeout_s=timeout_s, keep=True, on_progress=_keeper(seen))
            end = TrialProgress(
                rows=result.rows, output_tokens=result.output_tokens, prompt_tokens=result.prompt_tokens, seconds=result.elapsed_s
            )
            ticks += ticks_of([*(look for look in seen if look.seconds < end.seconds), end], len(part), seats, plan.replicas)
            lengths += [generation.num_tokens for generation in result.generations.values()]
            rate = result.output_tokens_per_s
        return Canary(
            output_lengths=tuple(lengths),
            cost=fit_steps(ticks),
            replicas=plan.replicas,
            max_num_seqs=seats // plan.replicas,
            start_s=max(replicas.start_seconds.values()) + _AROUND_S,
            output_tokens_per_s=rate,
        )


def ticks_of(looks: Sequence[TrialProgress], rows: int, seats: int, replicas: int) -> list[Tick]:
    """What lies between looks at a round of so many rows, for one of the replicas."""
    ticks = []
    for before, after in pairwise(looks):
        tokens = after.output_tokens - before.output_tokens
        inside = min(seats, rows - (before.rows + after.rows) / 2)
        if tokens > 0 and inside > 0:
            ticks.append(
                Tick(
                    seconds=after.seconds - before.seconds,
                    steps=tokens / inside,
                    output_tokens=tokens / replicas,
                    prompt_tokens=(after.prompt_tokens - before.prompt_tokens) / replicas,
                )
            )
    return ticks


def fit_steps(ticks: Sequence[Tick]) -> StepCost:
    """Least squares, no cost below zero: one that would be is left out, the most negative first. Raises ValueError without ticks."""
    if not ticks:
        raise ValueError("no ticks")
    table = np.array([[tick.steps, tick.output_tokens, tick.prompt_tokens] for tick in ticks], dtype=float)
    seconds = np.array([tick.seconds for tick in ticks], dtype=float)
    used = [0, 1, 2]
    while True:
        scale = np.maximum(np.abs(table[:, used]).max(axis=0), 1e-12)
        found = np.linalg.lstsq(table[:, used] / scale, seconds, rcond=None)[0] / scale
        if found.min() >= 0 or len(used) == 1:
            break
        used.pop(int((found * scale).argmin()))
    costs = dict(zip(used, (max(0.0, float(value)) for value in found), strict=True))
    return StepCost(per_step=costs.get(0, 0.0), per_output_token=costs.get(1, 0.0), per_prompt_token=costs.get(2, 0.0))


def _keeper(seen: list[TrialProgress]) -> Callable[[TrialProgress], None]:
    def keep(progress: TrialProgress) -> None:
        seen.append(progress)

    return keep
