"""Run the trials of one table on this machine: an engine's settings in, what came of them out. Decides nothing about what is tried."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from jobs.sample import fixed
from jobs.sample import longest_of
from jobs.sample import warm
from jobs.trial_journal import Journal
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.profile import Machine
from pipeline.profile import ReplicaPlan
from pipeline.profile import asked_options
from pipeline.trial import Replicas
from pipeline.trial import TrialProgress
from pipeline.tuned import engine_package
from pipeline.tuning import Outcome
from pipeline.tuning import Setting
from pipeline.tuning import Space
from pipeline.tuning import agreement
from pipeline.tuning import best_of
from pipeline.tuning import compiles
from pipeline.tuning import goes_on
from pipeline.tuning import plan_of
from schemas.errors import EngineError
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.profile import Profile

_PROBE_ROWS = 32
"""For each replica: they tell how quick the engine is, and so how many rows make a trial."""
_TRIAL_SHARE = 1 / 40
"""Of the budget, that the rows of one trial take at the speed that a run has now."""
_MIN_ROWS = 128
"""For each replica: twice as many are tried next, and batches that are half empty would make those look slow."""
_MOST_SHARE = 1 / 10
"""Of the budget, that these may take."""
_WARM_ROWS = 4
"""For each replica."""
_AGREE = 0.6
"""Of greedy rows, that must begin as with the settings that a run takes untuned; INT8 with its gate passed has more than 0.9."""
_DEFAULTS_TIMES = 3.0
"""The engine's defaults are stopped, and their speed so far is taken, after so many times what the first trial took."""


class Show(Protocol):
    """For people."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def doing(self, text: str, *, first: bool) -> None:
        """What goes on now, first or again."""
        ...


class Trials:
    """Runs trials of one table on this machine."""

    def __init__(self, job: JobSpec, models: Sequence[Model], machine: Machine, base: Profile, journal: Journal, show: Show) -> None:
        self._job, self._machine, self._base, self._journal, self._show = job, machine, base, journal, show
        self._models = {model.weights_digest: model for model in models}
        self._requests: Sequence[Request] = ()
        self._start: Setting | None = None

    def begin(self, space: Space, requests: Sequence[Request]) -> None:
        """What every trial runs, and around what settings are described."""
        self._start, self._requests = space.start, requests

    def describe(self, setting: Setting) -> str:
        if setting.defaults:
            return f"{engine_package()}'s own defaults"
        now = dict(self._start.options) if self._start else {}
        words = [f"{setting.replicas} replica{'s' if setting.replicas > 1 else ''}", str(setting.get("dtype"))]
        if len(self._models) > 1:
            words.append(Path(self._models[setting.model].path).name)
        words += [f"{name}={value}" for name, value in setting.options if name != "dtype" and now.get(name) != value]
        words += [f"{name}={value}" for name, value in setting.environment]
        words += [f"with {' and '.join(setting.preload)}"] if setting.preload else []
        words += ["cores pinned"] if setting.pin_cores else []
        return ", ".join(words) + (" (what a run takes untuned)" if setting == self._start else "")

    def measure_lengths(
        self,
        plan: ReplicaPlan,
        sample: Sequence[Request],
        rows: int | None,
        budget_s: float,
        until: float,
        make_space: Callable[..., Space],
    ) -> None:
        """How long the table's completions become, with the settings that a run takes untuned; also how many rows make a trial.

        The same engines then run the first trial, but for those whose cache knows the rows by now.
        """
        self._show.doing("completion lengths, with the settings that a run takes untuned", first=True)
        generations: dict[int, Generation] = {}
        began = time.monotonic()
        with Replicas(plan, self._models[next(iter(self._models))], "vllm", timeout_s=until - began) as replicas:
            start_s = time.monotonic() - began
            probe = sample[: _PROBE_ROWS * plan.replicas]
            result = replicas.run(probe, timeout_s=until - time.monotonic(), keep=True)
            generations.update(result.generations)
            per_row_s = result.elapsed_s / len(probe)
            affordable = [int(share * budget_s / per_row_s) for share in (_TRIAL_SHARE, _MOST_SHARE)]
            count = rows or max(affordable[0], min(_MIN_ROWS * plan.replicas, affordable[1]))
            if rest := sample[len(probe) : count]:
                generations.update(replicas.run(rest, timeout_s=until - time.monotonic(), keep=True).generations)
            lengths = {row: max(1, max(len(choice.token_ids) for choice in made.choices)) for row, made in sorted(generations.items())}
            greedy = self._job.sampling.temperature == 0
            self._journal.add_lengths(lengths, {row: generations[row].choices[0].token_ids[:1] for row in lengths if greedy})
            requests = fixed(sample, lengths)
            space = make_space(requests)
            self.begin(space, requests)
            if plan.options.get("enable_prefix_caching") is False:
                outcome = self._run(replicas, space.start, (), start_s, lambda: max(0.0, until - time.monotonic()))
                self._journal.add(space.start, outcome)
                self._show.say(f"{result_words(outcome, None)}  {self.describe(space.start)}")

    def measure(self, setting: Setting, left_s: float, best: Sequence[tuple[float, int]]) -> Outcome | None:
        """One trial: an engine's start, a few rows to warm it, then the rows. None where the time is over."""
        began = time.monotonic()
        self._show.doing(f"trying {self.describe(setting)}", first=True)

        def left() -> float:
            return max(0.0, left_s - (time.monotonic() - began))

        start_s, model = 0.0, self._models[setting.model]
        try:
            asked = asked_options(self._job.engine)
            plan = plan_of(setting, self._base, self._machine, model, asked, row_tokens=longest_of(self._requests))
            with Replicas(plan, model, "vllm", timeout_s=left()) as replicas:
                start_s = time.monotonic() - began
                replicas.run(warm(self._requests[: _WARM_ROWS * plan.replicas]), timeout_s=left())
                outcome = self._run(replicas, setting, best, start_s, left)
            if compiles(setting) and outcome.state == "done" and self._is_quickest(setting, outcome):
                return replace(outcome, start_s=self._second_start_s(plan, model, left()) or outcome.start_s)
            return outcome
        except (JobError, EngineError) as error:
            return None if left() <= 0 else Outcome(state="failed", start_s=round(start_s, 2), message=_first_line(error))

    def _is_quickest(self, setting: Setting, outcome: Outcome) -> bool:
        """Of its model: what is saved for that is its quickest."""
        best = best_of(self._journal.outcomes, setting.model)
        return best is None or outcome.output_tokens_per_s > self._journal.outcomes[best.key].output_tokens_per_s

    def _second_start_s(self, plan: ReplicaPlan, model: Model, left_s: float) -> float | None:
        """With what the first one compiled, which stays in the engine's cache, as runs will start. None where the time is too short."""
        began = time.monotonic()
        with contextlib.suppress(EngineError), Replicas(plan, model, "vllm", timeout_s=left_s):
            return round(time.monotonic() - began, 2)
        return None

    def _run(
        self, replicas: Replicas, setting: Setting, best: Sequence[tuple[float, int]], start_s: float, left: Callable[[], float]
    ) -> Outcome:
        curve: list[tuple[float, int]] = []
        total = sum(request.sampling.max_tokens * request.sampling.n for request in self._requests)

        def on_progress(progress: TrialProgress) -> bool:
            curve.append((round(progress.seconds, 3), progress.output_tokens))
            rate = progress.output_tokens / progress.seconds if progress.seconds else 0.0
            self._show.doing(f"{self.describe(setting)}: {progress.output_tokens / total:.0%}, {rate:,.0f} tok/s", first=False)
            if setting.defaults:
                return not best or progress.seconds <= _DEFAULTS_TIMES * best[-1][0]
            return goes_on(curve, best, total_tokens=total)

        result = replicas.run(self._requests, timeout_s=left(), keep=True, on_progress=on_progress)
        curve.append((round(result.elapsed_s, 3), result.output_tokens))
        made = {row: list(generation.choices[0].token_ids) for row, generation in result.generations.items() if generation.choices}
        outcome = Outcome(
            state="stopped" if result.stopped and not setting.defaults else "done",
            output_tokens_per_s=round(result.output_tokens_per_s, 2),
            curve=tuple(curve),
            start_s=round(start_s, 2),
            run_s=round(result.elapsed_s, 2),
        )
        alike = agreement(self._journal.first_tokens, made)
        if not result.stopped and alike < _AGREE:  # of one that was stopped, the few rows that were done prove nothing
            return replace(outcome, state="failed", message=f"only {alike:.0%} of its completions begin as they do untuned")
        return outcome


def result_words(outcome: Outcome, best: Outcome | None) -> str:
    if outcome.state == "failed":
        return f"failed: {outcome.message}"
    if outcome.state == "stopped":
        return f"{outcome.output_tokens_per_s:8,.1f} tok/s, ended early: clearly slower"
    rate = outcome.output_tokens_per_s
    times = f" ({rate / best.output_tokens_per_s:.2f} of the best so far)" if best and best.output_tokens_per_s else ""
    return f"{rate:8,.1f} tok/s{times}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
