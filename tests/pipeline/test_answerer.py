"""Keys of requests: the same for the same question to the same model, another for anything that could change the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.answerer import KEY_BYTES
from pipeline.answerer import Answerer
from pipeline.engine.engine import Request
from schemas.sampling import Sampling

DECIDES = {"weights": "w", "tokenizer": "t", "chat_template": "c", "plan": "p"}
ENGINE: dict[str, Any] = {"kind": "vllm", "dtype": "bfloat16", "max_model_len": 512, "options": {"max_num_seqs": 64}}
ASKED = Request(position=3, token_ids=[1, 2, 3], sampling=Sampling(max_tokens=16))


def key(request: Request = ASKED, *, decides: dict[str, str] = DECIDES, **engine: Any) -> bytes:
    return Answerer(decides, {**ENGINE, **engine}).key(request)


def sampled(**values: Any) -> Request:
    return replace(ASKED, sampling=Sampling(**{"max_tokens": 16, **values}))


def test_a_key_is_the_same_wherever_a_request_stands_and_whatever_else_a_job_is() -> None:
    elsewhere = replace(ASKED, position=70, ordered=True, begun=(5,))
    assert key(elsewhere, decides={**DECIDES, "plan": "q"}, options={"max_num_seqs": 8}) == key()
    assert len(key()) == KEY_BYTES


def test_a_job_of_its_own_sampling_object_has_the_same_keys() -> None:
    answerer = Answerer(DECIDES, ENGINE)
    asked = [answerer.key(request) for request in (ASKED, sampled(), sampled(top_k=5), sampled())]
    assert asked[0] == asked[1] == asked[3] != asked[2]


@pytest.mark.parametrize("digest", ["weights", "tokenizer", "chat_template"])
def test_another_model_tokenizer_or_template_has_other_keys(digest: str) -> None:
    assert key(decides={**DECIDES, digest: "x"}) != key()


def test_another_engine_or_precision_has_other_keys() -> None:
    others = [key(kind="simulated"), key(dtype="float16"), key(options={"kv_cache_dtype": "fp8"})]
    assert len({key(), *others}) == 4


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.5}, {"top_p": 0.5}, {"stop": "x"}, {"min_tokens": 2}, {"n": 2, "temperature": 1.0}, {"logprobs": 1},
        {"skip_special_tokens": False}, {"structured_outputs": {"regex": "a+"}}, {"max_tokens": 17}, {"logit_bias": {3: 1.0}},
    ],
)  # fmt: skip
def test_other_sampling_has_other_keys(values: dict[str, Any]) -> None:
    assert key(sampled(**values)) != key()


def test_other_tokens_have_other_keys() -> None:
    assert key(replace(ASKED, token_ids=[1, 2, 4])) != key()
    assert key(replace(ASKED, token_ids=[1, 2])) != key()


def test_a_drawn_row_is_its_seeds_and_not_that_of_the_job_it_came_from() -> None:
    drawn = replace(sampled(temperature=0.5, seed=1), seed=77)
    assert key(drawn) == key(replace(sampled(temperature=0.5, seed=2), seed=77))
    assert key(drawn) != key(replace(drawn, seed=78))


def test_what_counts_is_the_room_that_an_answer_has() -> None:
    assert key(max_model_len=4096) == key()  # neither context's end is reached
    assert key(max_model_len=10) != key()  # seven tokens, not 16
    assert key(sampled(max_tokens=7), max_model_len=10) == key(sampled(max_tokens=900), max_model_len=10)
