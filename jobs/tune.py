"""Find the quickest engine settings for a job's model, this node and this table's own lengths, within a budget of time.

Runs the trials that pipeline.tuning asks for, keeps a journal from which a killed search goes on, and saves what it found where
`tokenmill run` looks. Writes nothing to the job's output.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from typing import Any

from jobs.sample import fixed
from jobs.sample import longest_of
from jobs.sample import read_sample
from jobs.trial_journal import Journal
from jobs.trial_journal import open_journal
from jobs.trials import Show
from jobs.trials import Trials
from jobs.trials import result_words
from pipeline import storage
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.prepared import other_precisions
from pipeline.profile import Machine
from pipeline.profile import asked_options
from pipeline.profile import load_profile
from pipeline.profile import node_kind
from pipeline.profile import plan_replicas
from pipeline.profile import this_machine
from pipeline.tuned import engine_package
from pipeline.tuned import save_tuned
from pipeline.tuning import Outcome
from pipeline.tuning import Setting
from pipeline.tuning import Space
from pipeline.tuning import best_of
from pipeline.tuning import engine_defaults
from pipeline.tuning import next_trial
from pipeline.tuning import parse_key
from pipeline.tuning import profile_of
from pipeline.tuning import shared_share
from pipeline.tuning import sooner_of
from pipeline.tuning import space_for
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.profile import Profile
from schemas.tuned import Sooner
from schemas.tuned import Tuned

_MAX_CPU_ROWS, _MAX_GPU_ROWS = 2048, 16_384
_BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What came of it."""

    node: str
    engine: str
    rows: int
    trials: int
    """In this and earlier searches of the same."""
    skipped: int
    """Settings that the time was too short for."""
    interrupted: bool
    output_tokens_per_s: float
    untuned_tokens_per_s: float
    """With what a run takes untuned."""
    defaults_tokens_per_s: float | None
    best: dict[str, Any]
    saved: dict[str, str]
    """Path of the saved settings, by the model's folder."""
    quicker_model: str | None
    """A prepared checkpoint to run instead, where one is quickest."""
    seconds: float
    outcomes: list[dict[str, Any]]

    @property
    def times_defaults(self) -> float | None:
        return self.output_tokens_per_s / self.defaults_tokens_per_s if self.defaults_tokens_per_s else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "times_defaults": self.times_defaults}


Measure = Callable[[Setting, float, Sequence[tuple[float, int]]], Outcome | None]
"""Of a setting, the seconds that are left, and the curve of the best so far; None where time ran out."""


def tune(
    job: JobSpec,
    *,
    budget_s: float,
    rows: int | None = None,
    prepared: Sequence[str] = (),
    kv_cache_dtypes: Sequence[str] = (),
    fresh: bool = False,
    show: Show,
) -> Tuning:
    """Search, save and say. Raises JobError, or EngineStartError where not even the settings that a run takes untuned come up.

    `rows` are those of one trial; by default as many as the engine does in a fortieth of the budget. Ctrl-C ends the search early.
    """
    began = time.monotonic()
    until = began + budget_s
    if job.engine.kind != "vllm":
        raise JobError(f"engine.kind: found {job.engine.kind}; tune measures a real engine: vllm")
    storage.use(job.storage)
    model = resolve_model(job.model)
    models = [model, *other_precisions(model, list(prepared))]
    machine = this_machine()
    base = load_profile(job.engine.profile, machine)
    options = asked_options(job.engine)
    plan = plan_replicas(base, machine, models[0], replicas=job.cluster.replicas, options=options)
    most = rows or (_MAX_GPU_ROWS if machine.num_gpus else _MAX_CPU_ROWS)
    sample = read_sample(job, models[0], most, max_model_len=plan.options["max_model_len"])
    if not sample:
        raise JobError("input.uri: no row of the sample makes a prompt, so there is nothing to try engines with")
    longest = longest_of(sample)
    plan = plan_replicas(base, machine, models[0], replicas=job.cluster.replicas, options=options, row_tokens=longest)
    with open_journal(job, models[0], base, node_kind(machine), sample, rows, fresh) as journal:
        trials = Trials(job, models, machine, base, journal, show)

        def make_space(requests: Sequence[Request]) -> Space:
            return space_for(
                machine,
                base,
                models,
                options=options,
                replicas=job.cluster.replicas,
                rows=len(requests),
                tokens_per_row=longest_of(requests),
                row_tokens=longest,
                shared_share=shared_share([request.token_ids for request in requests], block=_BLOCK_TOKENS),
                kv_cache_dtypes=kv_cache_dtypes,
            )

        if not journal.lengths:
            trials.measure_lengths(plan, sample, rows, budget_s, until, make_space)
        requests = fixed(sample, journal.lengths)
        space = make_space(requests)
        prompt, completion = (_spread([count(request) for request in requests]) for count in (_prompt_tokens, _completion_tokens))
        show.say(f"every trial: the same {len(requests)} rows, prompts of {prompt} tokens, completions of {completion}")
        trials.begin(space, requests)
        skipped, interrupted = search(
            space, journal, trials.measure, until=until, now=time.monotonic, say=show.say, describe=trials.describe
        )
        return _conclude(space, journal, models, machine, base, len(requests), skipped, interrupted, time.monotonic() - began)


def search(
    space: Space,
    journal: Journal,
    measure: Measure,
    *,
    until: float,
    now: Callable[[], float],
    say: Callable[[str], None],
    describe: Callable[[Setting], str],
) -> tuple[int, bool]:
    """Try settings until none is left or the time is over. How many were left out, and whether it was interrupted."""
    while True:
        left_s = until - now()
        step = next_trial(space, journal.outcomes, left_s=left_s)
        if step.next is None or left_s <= 0:
            return step.skipped + (step.next is not None), False
        best = journal.outcomes.get(step.best.key)
        try:
            outcome = measure(step.next, left_s, best.curve if best else ())
        except KeyboardInterrupt:
            return step.skipped, True
        if outcome is None:
            return step.skipped + 1, False
        journal.add(step.next, outcome)
        say(f"{result_words(outcome, best)}  {describe(step.next)}")


def _conclude(
    space: Space,
    journal: Journal,
    models: Sequence[Model],
    machine: Machine,
    base: Profile,
    rows: int,
    skipped: int,
    interrupted: bool,
    seconds: float,
) -> Tuning:
    """Save what was found for each model, and say it. Raises EngineStartError where nothing was."""
    outcomes = journal.outcomes
    best = next_trial(space, outcomes, left_s=0.0).best
    if best.key not in outcomes or outcomes[best.key].state != "done":
        failed = [outcome.message for outcome in outcomes.values() if outcome.state == "failed"]
        raise EngineStartError("no setting was measured: " + (failed[0] if failed else "the time was too short; give more with --budget"))
    by_digest = {model.weights_digest: model for model in models}
    defaults = outcomes.get(engine_defaults(space).key)
    defaults_rate = defaults.output_tokens_per_s if defaults and defaults.state == "done" else None
    quicker = by_digest[best.model].path if best.model != space.models[0] else None
    saved = {}
    for digest, model in by_digest.items():
        setting = best if digest == best.model else best_of(outcomes, digest)
        if setting is None:
            continue
        tuned = Tuned(
            weights=digest,
            node=node_kind(machine),
            engine=engine_package(),
            profile=profile_of(setting, base),
            sooner=tuple(Sooner(profile=profile_of(one, base), below_tokens=below) for one, below in sooner_of(outcomes, setting)),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            rows=rows,
            output_tokens_per_s=outcomes[setting.key].output_tokens_per_s,
            defaults_tokens_per_s=defaults_rate,
            trials=len(outcomes),
            quicker_model=quicker if digest == space.models[0] else None,
        )
        saved[model.path] = str(save_tuned(tuned))
    now = outcomes.get(space.start.key)
    return Tuning(
        node=node_kind(machine),
        engine=engine_package(),
        rows=rows,
        trials=len(outcomes),
        skipped=skipped,
        interrupted=interrupted,
        output_tokens_per_s=outcomes[best.key].output_tokens_per_s,
        untuned_tokens_per_s=now.output_tokens_per_s if now else 0.0,
        defaults_tokens_per_s=defaults_rate,
        best={
            "model": by_digest[best.model].path,
            "replicas": best.replicas,
            **dict(best.options),
            **dict(best.environment),
            "preload": " ".join(best.preload),
            "pin_cores": best.pin_cores,
        },
        saved=saved,
        quicker_model=quicker,
        seconds=seconds,
        outcomes=[{"setting": asdict(parse_key(key)), **asdict(outcome)} for key, outcome in outcomes.items()],
    )


def _prompt_tokens(request: Request) -> int:
    return len(request.token_ids)


def _completion_tokens(request: Request) -> int:
    return request.sampling.max_tokens


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)} (half of them above {statistics.median(counts):.0f})"


def words(tuning: Tuning) -> list[str]:
    """For people: what was found, against what, and what to do with it."""
    lines = [f"{tuning.trials} trials on {tuning.rows} rows; this search took {tuning.seconds / 60:.1f} minutes"]
    if tuning.interrupted:
        lines.append("stopped early; the same command goes on")
    elif tuning.skipped:
        lines.append(f"{tuning.skipped} settings were left out for lack of time; the same command tries them")
    best = ", ".join(f"{name} {value}" for name, value in tuning.best.items() if value != "" and (name, value) != ("pin_cores", False))
    lines.append(f"best: {best}")
    lines.append(f"{tuning.output_tokens_per_s:,.1f} output tok/s, {tuning.untuned_tokens_per_s:,.1f} with what a run takes untuned")
    if tuning.times_defaults is None:
        lines.append(f"{tuning.engine}'s own defaults did not come up on this node, so there is nothing to compare with")
    else:
        defaults = tuning.defaults_tokens_per_s
        lines.append(f"{tuning.times_defaults:.1f} times {tuning.engine}'s own defaults ({defaults:,.1f} output tok/s)")
        if tuning.times_defaults < 1:
            lines.append("nothing quicker than these was found yet; give more time with --budget, on a machine with nothing else to do")
    lines += [
        f"saved for {model}: {path}; tokenmill run takes it on this kind of node ({tuning.node})" for model, path in tuning.saved.items()
    ]
    if tuning.quicker_model:
        lines.append(f"a run never changes weights by itself; for the speed above: tokenmill run --model {tuning.quicker_model} ...")
    return lines
