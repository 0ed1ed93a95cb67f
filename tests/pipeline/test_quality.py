"""What is as good as before, what is not, and what the bar makes of it."""

from __future__ import annotations

import math

import pytest

from pipeline.quality import KINDS
from pipeline.quality import RowScore
from pipeline.quality import judge
from pipeline.quality import judge_again
from pipeline.quality import rouge_of
from schemas.errors import JobError
from schemas.prepared import Bar


def scores(per_token: float, rouge: list[float], tokens: int = 10) -> list[RowScore]:
    """One row for each ROUGE value, all with the same log-probability per token."""
    return [RowScore(logprob=per_token * tokens, num_tokens=tokens, rouge=(value,) * len(KINDS)) for value in rouge]


ROUGE = [0.2, 0.3, 0.4, 0.5] * 8


def test_the_same_scores_pass_with_a_ratio_of_one() -> None:
    verdict = judge(scores(-1.4, ROUGE), scores(-1.4, ROUGE), Bar())
    assert verdict.passed
    assert not verdict.lowered
    assert verdict.perplexity_ratio == 1
    assert verdict.perplexity_before == pytest.approx(math.exp(1.4))
    assert {kind: (change.ratio, change.error) for kind, change in verdict.rouge.items()} == dict.fromkeys(KINDS, (1, 0))


@pytest.mark.parametrize(("ratio", "passes"), [(1.0199, True), (1.0201, False)])
def test_perplexity_may_rise_by_two_per_cent(ratio: float, passes: bool) -> None:
    verdict = judge(scores(-1.4, ROUGE), scores(-1.4 - math.log(ratio), ROUGE), Bar())
    assert verdict.passed is passes
    assert verdict.perplexity_ratio == pytest.approx(ratio)


def test_a_refusal_says_what_was_found_and_what_is_allowed() -> None:
    verdict = judge(scores(-1.0, ROUGE), scores(-1.1, ROUGE), Bar())
    assert verdict.refusals == ("perplexity of the references rose from 2.718 to 3.004, 1.1052 times; allowed are 1.02",)


def test_perplexity_weighs_tokens_not_rows() -> None:
    """A row of 90 tokens that got worse counts nine times a row of 10 that did not."""
    long, short = scores(-1.0, [0.5], tokens=90), scores(-1.0, [0.5], tokens=10)
    verdict = judge(long + short, scores(-1.1, [0.5], tokens=90) + short, Bar())
    assert verdict.perplexity_ratio == pytest.approx(math.exp(0.09))


def test_a_fall_of_rouge_in_every_row_is_refused_however_small_its_error() -> None:
    verdict = judge(scores(-1.4, ROUGE), scores(-1.4, [0.95 * value for value in ROUGE]), Bar())
    assert not verdict.passed
    assert len(verdict.refusals) == len(KINDS)
    assert verdict.rouge["rougeL"].ratio == pytest.approx(0.95)
    assert verdict.rouge["rougeL"].error == pytest.approx(0, abs=1e-9)


def test_a_fall_of_rouge_within_its_error_passes() -> None:
    """Half of the rows fell by 40 %, the others rose by as much: on the whole 2.9 % less, which chance alone explains."""
    after = [value * (0.6 if row % 2 else 1.4) for row, value in enumerate(ROUGE)]
    verdict = judge(scores(-1.4, ROUGE), scores(-1.4, after), Bar())
    change = verdict.rouge["rouge1"]
    assert change.ratio < 0.99
    assert change.ratio + change.error > 0.99
    assert verdict.passed


def test_rouge_that_was_nothing_has_nothing_to_lose() -> None:
    nothing = [0.0] * len(ROUGE)
    assert judge(scores(-1.4, nothing), scores(-1.4, nothing), Bar()).passed


@pytest.mark.parametrize("bar", [Bar(max_perplexity_ratio=1.2), Bar(min_rouge_ratio=0.5)])
def test_a_lowered_bar_is_said(bar: Bar) -> None:
    assert judge(scores(-1.4, ROUGE), scores(-1.4, ROUGE), bar).lowered


def test_a_raised_bar_is_none_that_was_lowered() -> None:
    assert not judge(scores(-1.4, ROUGE), scores(-1.4, ROUGE), Bar(max_perplexity_ratio=1.01)).lowered


def test_what_was_measured_can_be_judged_by_another_bar() -> None:
    low = judge(scores(-1.4, ROUGE), scores(-1.5, ROUGE), Bar(max_perplexity_ratio=1.2)).model_copy(update={"engine": "e", "dtype": "d"})
    assert low.passed
    again = judge_again(low, Bar())
    assert (again.passed, again.lowered, again.engine, again.dtype) == (False, False, "e", "d")
    assert judge_again(again, Bar(max_perplexity_ratio=1.2)) == low


@pytest.mark.parametrize("worst", [float("-inf"), float("nan")])
def test_a_model_that_gives_no_numbers_is_not_judged(worst: float) -> None:
    with pytest.raises(JobError, match="nothing to compare"):
        judge(scores(-1.4, ROUGE), scores(worst, ROUGE), Bar())


def test_rouge_is_of_stemmed_words_in_the_order_of_its_kinds() -> None:
    same, half = rouge_of(["the cats sat", "one two three four"], ["the cat sat", "one two"])
    assert same == (1, 1, 1)
    assert half == pytest.approx((2 / 3, 1 / 2, 2 / 3))  # recall 2/4 and precision 1; of pairs 1/3 and 1
