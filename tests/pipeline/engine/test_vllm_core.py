"""The real vLLM on the CPU, over a tiny Llama with random weights. One engine for all tests: starting one takes 20 s."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.continuous import ContinuousEngine
from pipeline.engine.engine import Core
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.sampling import Sampling
from tests.conftest import TINY_MAX_LEN

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": TINY_MAX_LEN,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "ir_op_priority": {"rms_norm": ["tokenmill"], "fused_add_rms_norm": ["tokenmill"]},  # as in the CPU's profile
}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[ContinuousEngine]:
    from pipeline.engine.vllm import VllmCore

    made = ContinuousEngine(lambda: VllmCore(model_path=str(tiny_model), options=OPTIONS))
    yield made
    made.close()


def prompt_ids(seed: int, length: int = 12) -> list[int]:
    return [0] + [5 + (seed * 31 + step * 17) % 250 for step in range(length)]


def generate(engine: ContinuousEngine, *requests: Request) -> dict[int, Generation]:
    return {generation.position: generation for generation in engine.generate(requests)}


def one(engine: ContinuousEngine, ids: list[int], seed: int | None = None, **sampling: Any) -> Generation:
    return generate(engine, Request(position=0, token_ids=ids, sampling=Sampling.model_validate(sampling), seed=seed))[0]


def test_greedy_tokens_are_those_of_transformers(engine: ContinuousEngine, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompts = [prompt_ids(seed, length=8 + 5 * seed) for seed in range(6)]
    requests = [Request(position=i, token_ids=ids, sampling=Sampling(max_tokens=20, ignore_eos=True)) for i, ids in enumerate(prompts)]
    answers = generate(engine, *requests)
    for index, ids in enumerate(prompts):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
        assert answers[index].choices[0].token_ids == expected


def test_more_rows_than_the_batch_all_come_back_once(engine: ContinuousEngine) -> None:
    requests = [Request(position=i, token_ids=prompt_ids(i), sampling=Sampling(max_tokens=5, ignore_eos=True)) for i in range(50)]
    answers = list(engine.generate(requests))
    assert sorted(answer.position for answer in answers) == list(range(50))
    assert {len(answer.choices[0].token_ids) for answer in answers} == {5}


def test_a_completion_ends_with_the_context(engine: ContinuousEngine) -> None:
    answer = one(engine, prompt_ids(1, length=TINY_MAX_LEN - 10), max_tokens=100, ignore_eos=True)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].token_ids) == TINY_MAX_LEN - (TINY_MAX_LEN - 10 + 1)


def test_a_stop_string_ends_the_text_before_it(engine: ContinuousEngine) -> None:
    free = one(engine, prompt_ids(3), max_tokens=30, ignore_eos=True)
    stopped = one(engine, prompt_ids(3), max_tokens=30, ignore_eos=True, stop=["\u0000never"])
    assert stopped.choices[0].token_ids == free.choices[0].token_ids
    text = stopped.choices[0].text
    assert text is not None
    cut = next(char for char in text[3:] if char.isascii() and char.isprintable())
    answer = one(engine, prompt_ids(3), max_tokens=30, ignore_eos=True, stop=cut)
    assert answer.choices[0].text == text[: text.index(cut)]
    assert answer.choices[0].finish_reason == "stop"


def test_stop_token_ids_end_a_row(engine: ContinuousEngine) -> None:
    free = one(engine, prompt_ids(4), max_tokens=20, ignore_eos=True).choices[0].token_ids
    answer = one(engine, prompt_ids(4), max_tokens=20, ignore_eos=True, stop_token_ids=[free[5]])
    assert answer.choices[0].token_ids == free[: free.index(free[5]) + 1]
    assert answer.choices[0].finish_reason == "stop"


def test_n_choices_differ_and_a_seed_repeats_them(engine: ContinuousEngine) -> None:
    first, again, other = (
        [choice.token_ids for choice in one(engine, prompt_ids(5), seed=seed, n=3, temperature=1.0, max_tokens=16, ignore_eos=True).choices]
        for seed in (11, 11, 12)
    )
    assert len({tuple(ids) for ids in first}) == 3
    assert first == again
    assert first != other


def test_logprobs_name_the_chosen_token_and_the_alternatives(engine: ContinuousEngine) -> None:
    choice = one(engine, prompt_ids(6), max_tokens=4, ignore_eos=True, logprobs=3).choices[0]
    assert choice.logprobs is not None
    assert [entry["token_id"] for entry in choice.logprobs] == choice.token_ids
    for entry in choice.logprobs:
        assert entry["logprob"] == pytest.approx(max(other["logprob"] for other in entry["top"]))  # greedy
        assert entry["logprob"] < 0


def test_structured_outputs_are_kept_to(engine: ContinuousEngine, tiny_model: Path) -> None:
    from pipeline.render import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))

    def text(**structured: Any) -> str:
        answer = one(engine, prompt_ids(7), max_tokens=40, structured_outputs=structured)
        assert answer.error is None, answer.error
        return str(tokenizer.decode(answer.choices[0].token_ids, skip_special_tokens=True))

    assert text(choice=["positive", "negative"]) in ("positive", "negative")
    assert text(regex="[0-9]{4}-[0-9]{2}").replace("-", "").isdigit()


@pytest.mark.parametrize(
    "structured", [{"json": {"type": "no such type"}}, {"regex": "["}, {"grammar": "root ::= "}], ids=["json", "regex", "grammar"]
)
def test_an_invalid_structure_spoils_its_own_row_only(engine: ContinuousEngine, structured: dict[str, Any]) -> None:
    bad = Request(
        position=0, token_ids=prompt_ids(8), sampling=Sampling.model_validate({"structured_outputs": structured, "max_tokens": 8})
    )
    good = Request(position=1, token_ids=prompt_ids(9), sampling=Sampling(max_tokens=8, ignore_eos=True))
    answers = generate(engine, bad, good)
    assert answers[0].error is not None
    assert answers[0].error.kind in ("rejected", "engine")
    assert len(answers[1].choices[0].token_ids) == 8


def test_ids_outside_the_vocabulary_and_overlong_rows_are_rejected_one_by_one(engine: ContinuousEngine) -> None:
    outside = Request(position=0, token_ids=[5, 10_000], sampling=Sampling(max_tokens=4))
    overlong = Request(position=1, token_ids=[5] * (TINY_MAX_LEN + 1), sampling=Sampling(max_tokens=4))
    good = Request(position=2, token_ids=prompt_ids(1), sampling=Sampling(max_tokens=4, ignore_eos=True))
    answers = generate(engine, outside, overlong, good)
    assert [answers[index].error is not None for index in range(3)] == [True, True, False]


def test_an_abandoned_caller_leaves_the_engine_free(engine: ContinuousEngine) -> None:
    long = [Request(position=i, token_ids=prompt_ids(i), sampling=Sampling(max_tokens=400, ignore_eos=True)) for i in range(16)]
    short = [Request(position=100, token_ids=prompt_ids(1), sampling=Sampling(max_tokens=1))]
    answers = engine.generate([*short, *long])
    assert next(answers).position == 100
    answers.close()
    assert list(generate(engine, *short)) == [100]
    assert engine.counters().in_flight == 0


def test_an_unknown_engine_option_is_named_with_the_ones_near_it(tiny_model: Path) -> None:
    from pipeline.engine.vllm import VllmCore

    with pytest.raises(JobError, match=r"engine\.options\.max_num_seq: .*max_num_seqs"):
        VllmCore(model_path=str(tiny_model), options={"max_num_seq": 8})


def test_an_engine_that_does_not_fit_says_why(tiny_model: Path) -> None:
    from pipeline.engine.vllm import VllmCore

    with pytest.raises(EngineStartError, match="cache blocks"):
        VllmCore(model_path=str(tiny_model), options={**OPTIONS, "kv_cache_memory_bytes": 4096})


def test_a_row_taken_out_in_mid_generation_goes_on_from_its_tokens(engine: ContinuousEngine) -> None:
    requests = [Request(position=i, token_ids=prompt_ids(i), sampling=Sampling(max_tokens=30, ignore_eos=True)) for i in range(3)]
    whole = generate(engine, *requests)

    def part_way(core: Core) -> list[list[int]]:
        for key, request in enumerate(requests):
            assert core.add(1000 + key, request) is None
        for _ in range(11):
            core.step()
        begun = [core.begun(1000 + key) for key in range(3)]
        for key in range(3):
            core.abort(1000 + key)
        return begun

    begun = engine.borrow(part_way)
    assert all(5 <= len(ids) < 30 for ids in begun)
    assert [whole[i].choices[0].token_ids[: len(ids)] for i, ids in enumerate(begun)] == begun
    rest = generate(engine, *(replace(request, begun=tuple(begun[i])) for i, request in enumerate(requests)))
    assert rest == whole


def test_rows_whose_next_token_depends_on_more_than_tokens_are_begun_anew(engine: ContinuousEngine) -> None:
    settings: list[dict[str, Any]] = [{"temperature": 0.7}, {"stop": ["zzz"]}, {"repetition_penalty": 1.1}, {"logprobs": 1}]

    def part_way(core: Core) -> list[list[int]]:
        for key, values in enumerate(settings):
            sampling = Sampling(max_tokens=30, ignore_eos=True, **values)
            assert core.add(2000 + key, Request(position=key, token_ids=prompt_ids(key), sampling=sampling, seed=1)) is None
        for _ in range(5):
            core.step()
        begun = [core.begun(2000 + key) for key in range(len(settings))]
        for key in range(len(settings)):
            core.abort(2000 + key)
        return begun

    assert engine.borrow(part_way) == [[]] * len(settings)
