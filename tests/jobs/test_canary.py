"""A few rows really run, and what a step costs, told apart from what each row adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.canary import StepCost
from jobs.canary import Tick
from jobs.canary import fit_steps
from jobs.canary import run_canary
from jobs.canary import ticks_of
from pipeline.engine.engine import Request
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.trial import TrialProgress
from schemas.errors import JobError
from schemas.sampling import Sampling


def tick(steps: float, batch: float, prompts: float, cost: StepCost) -> Tick:
    tokens = steps * batch
    seconds = steps * cost.per_step + tokens * cost.per_output_token + prompts * cost.per_prompt_token
    return Tick(seconds=seconds, steps=steps, output_tokens=tokens, prompt_tokens=prompts)


def test_costs_are_told_apart_where_batches_differ() -> None:
    true = StepCost(per_step=0.02, per_output_token=0.001, per_prompt_token=0.0005)
    ticks = [tick(50, 8, 400, true), tick(40, 8, 0, true), tick(20, 56, 2800, true), tick(18, 50, 0, true)]
    found = fit_steps(ticks)
    assert (found.per_step, found.per_output_token, found.per_prompt_token) == pytest.approx((0.02, 0.001, 0.0005))


def test_no_cost_is_below_zero() -> None:
    found = fit_steps(
        [Tick(seconds=1, steps=10, output_tokens=100, prompt_tokens=0), Tick(seconds=1, steps=20, output_tokens=100, prompt_tokens=0)]
    )
    assert min(found.per_step, found.per_output_token, found.per_prompt_token) >= 0
    assert found.per_output_token > 0


def test_nothing_seen_tells_nothing() -> None:
    with pytest.raises(ValueError, match="no ticks"):
        fit_steps([])


def test_a_full_batch_shares_the_steps_and_the_end_is_half_full() -> None:
    cost = StepCost(per_step=0.1, per_output_token=0.0, per_prompt_token=0.0)
    assert cost.seconds(rows=1000, prompt_tokens=10, output_tokens=100, batch=50) == pytest.approx((1000 * 100 / 50 + 50) * 0.1)
    assert cost.seconds(rows=10, prompt_tokens=10, output_tokens=100, batch=50) == pytest.approx((100 + 50) * 0.1)


def test_ticks_count_steps_by_the_rows_inside() -> None:
    looks = [
        TrialProgress(rows=0, output_tokens=0, prompt_tokens=0, seconds=0.0),
        TrialProgress(rows=0, output_tokens=80, prompt_tokens=400, seconds=1.0),
        TrialProgress(rows=4, output_tokens=140, prompt_tokens=400, seconds=2.0),
    ]
    first, second = ticks_of(looks, rows=8, seats=128, replicas=1)
    assert (first.steps, first.output_tokens, first.prompt_tokens) == (10, 80, 400)
    assert (second.steps, second.output_tokens, second.prompt_tokens) == (10, 60, 0)


def requests(count: int) -> list[Request]:
    sampling = Sampling(max_tokens=40, min_tokens=20)
    return [Request(position=row, token_ids=list(range(5, 25)), sampling=sampling, seed=row) for row in range(count)]


@pytest.mark.slow
def test_a_canary_of_a_known_engine_finds_its_rate(tiny_model: Path) -> None:
    """Of 16 rows at 400 tokens/s, whatever the batch: every token costs 2.5 ms and a step nothing."""
    plan = ReplicaPlan(
        profile="simulated",
        replicas=1,
        options={"decode_tokens_per_s": 400.0, "prefill_tokens_per_s": 1e6, "max_num_seqs": 64, "lengths": "max"},
    )
    found = run_canary(plan, resolve_model(str(tiny_model)), "simulated", requests(16), timeout_s=60)
    assert set(found.output_lengths) == {40}
    assert (len(found.output_lengths), found.replicas, found.max_num_seqs) == (16, 1, 64)
    whole = found.cost.seconds(rows=1000, prompt_tokens=20, output_tokens=40, batch=64)
    assert whole == pytest.approx(100, rel=0.35)  # of the 100 s that 40,000 tokens take at 400 a second
    assert found.start_s > 0


def test_too_few_rows_are_refused(tiny_model: Path) -> None:
    plan = ReplicaPlan(profile="simulated", replicas=1, options={})
    with pytest.raises(JobError, match="--canary: 7 rows can be asked, expected 8 at least"):
        run_canary(plan, resolve_model(str(tiny_model)), "simulated", requests(7), timeout_s=60)
    with pytest.raises(JobError, match="--canary: 15 rows can be asked, expected 16 at least"):
        run_canary(replace(plan, replicas=8), resolve_model(str(tiny_model)), "simulated", requests(15), timeout_s=60)
