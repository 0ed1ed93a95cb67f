"""The simulated core: the same tokens every time, lengths as asked, n choices, and no time of its own in its answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.simulated import SimulatedCore
from schemas.job import SimulatedOptions
from schemas.prompts import RowError
from schemas.sampling import Sampling

VOCAB = 300
MAX_LEN = 64


def core(**options: Any) -> SimulatedCore:
    rates = {"decode_tokens_per_s": 1e7, "prefill_tokens_per_s": 1e8, **options}
    return SimulatedCore(SimulatedOptions(**rates), vocab_size=VOCAB, max_model_len=MAX_LEN)


def ask(position: int, *, token_ids: list[int] | None = None, seed: int | None = None, **sampling: Any) -> Request:
    return Request(
        position=position, token_ids=token_ids or [position + 1, 7], sampling=Sampling(**{"max_tokens": 16, **sampling}), seed=seed
    )


def run(target: SimulatedCore, requests: list[Request]) -> dict[int, Generation]:
    """Every request's answer by its key, which is its place in the list."""
    made: dict[int, Generation] = {}
    for key, request in enumerate(requests):
        error = target.add(key, request)
        if error is not None:
            made[key] = Generation(position=request.position, error=error)
    while target.busy:
        for key, generation in target.step():
            assert key not in made
            made[key] = generation
    return made


def only_choice(generation: Generation) -> GeneratedChoice:
    (choice,) = generation.choices
    return choice


def test_the_same_requests_get_the_same_answers_whatever_their_batch() -> None:
    requests = [ask(position) for position in range(50)]
    together = run(core(), requests)
    one_by_one = run(core(max_num_seqs=1), requests)
    assert together == one_by_one
    assert [together[key].position for key in range(50)] == list(range(50))


def test_prompt_and_seed_decide_the_tokens_and_the_position_does_not() -> None:
    made = run(
        core(),
        [
            ask(0, token_ids=[1, 2], seed=5, temperature=1.0),
            ask(9, token_ids=[1, 2], seed=5, temperature=1.0),
            ask(0, token_ids=[1, 2], seed=6, temperature=1.0),
            ask(0, token_ids=[1, 3], seed=5, temperature=1.0),
        ],
    )
    assert made[0].choices == made[1].choices
    assert made[0].choices != made[2].choices
    assert made[0].choices != made[3].choices


def test_lengths_vary_between_one_and_the_limit() -> None:
    lengths = [len(only_choice(made).token_ids) for made in run(core(), [ask(position) for position in range(200)]).values()]
    assert (min(lengths), max(lengths)) == (1, 16)
    assert len(set(lengths)) == 16


def test_a_full_length_completion_was_cut_and_a_shorter_one_stopped() -> None:
    for made in run(core(), [ask(position) for position in range(100)]).values():
        choice = only_choice(made)
        assert choice.finish_reason == ("length" if len(choice.token_ids) == 16 else "stop")


@pytest.mark.parametrize(("options", "sampling"), [({"lengths": "max"}, {}), ({}, {"ignore_eos": True}), ({}, {"min_tokens": 16})])
def test_full_lengths_come_where_they_are_asked_for(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    made = run(core(**options), [ask(position, **sampling) for position in range(20)])
    assert {(len(only_choice(item).token_ids), only_choice(item).finish_reason) for item in made.values()} == {(16, "length")}


def test_least_lengths_are_kept() -> None:
    made = run(core(), [ask(position, min_tokens=12) for position in range(100)])
    assert {len(only_choice(item).token_ids) for item in made.values()} == {12, 13, 14, 15, 16}


def test_a_long_prompt_leaves_less_for_the_completion() -> None:
    made = run(core(lengths="max"), [ask(0, token_ids=[1] * (MAX_LEN - 3)), ask(1, token_ids=[1] * (MAX_LEN - 1))])
    assert [len(only_choice(made[key]).token_ids) for key in (0, 1)] == [3, 1]


def test_a_prompt_without_room_for_one_token_becomes_an_error() -> None:
    made = run(core(), [ask(0), ask(1, token_ids=[1] * MAX_LEN), ask(2, token_ids=[1] * 100)])
    assert made[0].error is None
    assert made[1] == Generation(position=1, error=RowError(kind="prompt_too_long", message="64 tokens, limit 63"))
    assert made[2] == Generation(position=2, error=RowError(kind="prompt_too_long", message="100 tokens, limit 63"))


def test_n_choices_are_n_different_ones() -> None:
    (made,) = run(core(), [ask(0, n=4, temperature=1.0, seed=1, min_tokens=8)]).values()
    assert len(made.choices) == 4
    assert len({tuple(choice.token_ids) for choice in made.choices}) == 4


def test_tokens_are_of_the_vocabulary() -> None:
    ids = [token for made in run(core(), [ask(position) for position in range(50)]).values() for token in only_choice(made).token_ids]
    assert all(0 <= token < VOCAB for token in ids)


def test_logprobs_come_when_asked_for_one_per_token() -> None:
    made = run(core(), [ask(0, logprobs=2), ask(1)])
    choice = only_choice(made[0])
    assert choice.logprobs == [{"token_id": token, "logprob": 0.0, "top": []} for token in choice.token_ids]
    assert only_choice(made[1]).logprobs is None


def test_more_requests_than_the_batch_holds_all_come_out() -> None:
    assert sorted(run(core(max_num_seqs=3), [ask(position) for position in range(100)])) == list(range(100))


def test_aborted_requests_never_come_out() -> None:
    target = core(max_num_seqs=2, lengths="max")
    for key in range(6):
        assert target.add(key, ask(key)) is None
    done = [key for key, _ in target.step()]  # both that ran are done; the others wait
    assert sorted(done) == [0, 1]
    target.abort(2)
    target.abort(5)
    target.abort(99)
    while target.busy:
        done += [key for key, _ in target.step()]
    assert sorted(done) == [0, 1, 3, 4]


def test_a_running_request_can_be_aborted() -> None:
    target = core(max_num_seqs=4)
    requests = [ask(position) for position in range(12)]
    for key, request in enumerate(requests):
        target.add(key, request)
    done = [key for key, _ in target.step()]
    running = next(key for key in range(4) if key not in done)
    target.abort(running)
    while target.busy:
        done += [key for key, _ in target.step()]
    assert sorted(done) == [key for key in range(12) if key != running]


def test_it_is_busy_only_with_requests() -> None:
    target = core()
    assert not target.busy
    target.add(0, ask(0))
    assert target.busy
    target.abort(0)
    assert not target.busy


def test_its_info_names_its_limits_and_rates() -> None:
    info = core(max_num_seqs=7).info
    assert (info.kind, info.max_num_seqs, info.max_model_len) == ("simulated", 7, MAX_LEN)
    assert info.options == {
        "decode_tokens_per_s": 1e7, "prefill_tokens_per_s": 1e8, "max_num_seqs": 7, "start_s": 0.0, "nnodes": 1, "lengths": "varied",
        "dies_on_token": None, "hangs_on_token": None,
    }  # fmt: skip


@pytest.mark.parametrize("decoded_share", [0.1, 0.5, 0.9])
def test_a_row_that_goes_on_from_its_tokens_ends_as_if_it_had_never_stopped(decoded_share: float) -> None:
    whole = run(core(), [ask(position, ignore_eos=True) for position in range(5)])
    first = core(decode_tokens_per_s=2000.0)
    for key in range(5):
        first.add(key, ask(key, ignore_eos=True))
    while first.busy and all(len(first.begun(key)) < 16 * decoded_share for key in range(5)):
        first.step()
    begun = {key: first.begun(key) for key in range(5)}
    rest = [replace(ask(key, ignore_eos=True), begun=tuple(begun[key])) for key in range(5)]
    assert run(core(), rest) == whole


def test_rows_that_cannot_go_on_exactly_have_nothing_begun() -> None:
    slow = core(decode_tokens_per_s=40.0)
    slow.add(0, ask(0, temperature=1.0, seed=1, ignore_eos=True))
    slow.add(1, ask(1, stop=["x"], ignore_eos=True))
    slow.add(2, ask(2, ignore_eos=True))
    slow.step()
    assert (slow.begun(0), slow.begun(1), slow.begun(7)) == ([], [], [])
    assert slow.begun(2)


def test_a_step_is_short_however_slow_the_engine_is() -> None:
    slow = core(decode_tokens_per_s=0.001)
    slow.add(0, ask(0))
    assert slow.step() == []
    assert slow.busy
