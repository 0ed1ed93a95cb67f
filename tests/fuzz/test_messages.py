"""Whatever a row holds where chat messages or sampling are expected: a prompt or a row's error, and never an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from pipeline.engine.engine import Request
from pipeline.prompts import read_prompts
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.prompts import Prompt
from schemas.prompts import RowError
from tests.conftest import TINY_MAX_LEN
from tests.fuzz.conftest import examples

_KINDS = {"empty_prompt", "prompt_too_long", "bad_messages", "bad_sampling", "bad_text", "rejected", "engine"}
"""As README names them."""
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "function", "", "USER"])
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(["\ud800", "\0", " ", "{{ 7 * 7 }}", "{% raw %}", "<|user|>", "x" * 2000]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
ANY = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)))
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": ROLES, "content": TEXTS}),
        st.dictionaries(st.sampled_from(["role", "content", "name", "x"]), st.one_of(ROLES, ANY), max_size=3),
        ANY,
    ),
    max_size=4,
)
SAMPLINGS = st.dictionaries(
    st.sampled_from(
        [
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "stop",
            "seed",
            "n",
            "logprobs",
            "logit_bias",
            "structured_outputs",
            "bad_words",
            "x",
        ]
    ),
    ANY,
    max_size=4,
)


@st.composite
def json_texts(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> str | None:
    """JSON, JSON cut short or with a character changed, any text, or nothing."""
    kind = draw(st.sampled_from(["json", "cut", "changed", "text", "null"]))
    if kind == "null":
        return None
    if kind == "text":
        return draw(TEXTS)
    text = json.dumps(draw(values), ensure_ascii=draw(st.booleans()))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "changed" and text:
        place = draw(st.integers(0, len(text) - 1))
        return text[:place] + draw(st.characters()) + text[place + 1 :]
    return text


def job(**input_fields: Any) -> JobSpec:
    return parse_job(
        {
            "model": "m",
            "input": {"uri": "in", "prompt": {"messages": "messages"}, "sampling": "sampling", **input_fields},
            "output": {"uri": "o"},
        }
    )


@pytest.fixture(scope="module")
def renderers(tiny_model: Path) -> dict[str, tuple[JobSpec, Renderer]]:
    tokenizer = load_tokenizer(str(tiny_model))
    jobs = {too_long: job(too_long=too_long) for too_long in ("error", "truncate_left", "truncate_right")}
    return {name: (made, Renderer(tokenizer, made, max_model_len=TINY_MAX_LEN, seed_base="fuzz")) for name, made in jobs.items()}


def column(values: list[str | None]) -> pa.Array[Any]:
    """Text as it may lie in a file: with what no UTF-8 is, where Python's text has it."""
    raw = [None if value is None else value.encode("utf-8", "surrogatepass") for value in values]
    whole = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(whole), whole.buffers(), whole.null_count)


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(json_texts(MESSAGES), json_texts(SAMPLINGS)), min_size=1, max_size=4),
    too_long=st.sampled_from(["error", "truncate_left", "truncate_right"]),
)
@example(rows=[("[" * 100_000, None)], too_long="error")
@example(rows=[('{"a":' * 50_000, None)], too_long="error")
@example(rows=[("9" * 10_000, None)], too_long="error")
@example(rows=[('[{"role": "user", "content": "hi"}]', "[" * 100_000)], too_long="error")
@example(rows=[('[{"role": "user", "content": "hi"}]', '{"max_tokens": ' + "9" * 10_000 + "}")], too_long="error")
@example(rows=[('[{"role": "user", "content": "hi"}]', '{"max_tokens": NaN, "temperature": Infinity}')], too_long="error")
@example(rows=[('[{"role": "user", "content": "hi"}]', '{"logit_bias": {"-1": 1e999}}')], too_long="error")
@example(rows=[('[{"role": "user", "content": "hi"}]', '{"structured_outputs": {"regex": "("}}')], too_long="error")
@example(rows=[('[{"role": "tool", "content": "hi"}]', None)], too_long="error")
@example(rows=[('[{"role": "user", "content": "\\ud800"}]', None)], too_long="truncate_left")
@example(rows=[('[{"role": ["user"], "content": "x"}]', None)], too_long="error")
@example(rows=[('[{"role": {}, "content": "x"}]', None)], too_long="error")
@example(rows=[(json.dumps([{"role": "user", "content": "x" * 5000}]), None)], too_long="truncate_right")
def test_every_row_becomes_a_request_or_an_error(
    renderers: dict[str, tuple[JobSpec, Renderer]], rows: list[tuple[str | None, str | None]], too_long: str
) -> None:
    made, renderer = renderers[too_long]
    batch = pa.RecordBatch.from_arrays([column([row[0] for row in rows]), column([row[1] for row in rows])], names=["messages", "sampling"])
    prompts = list(read_prompts(batch, 7, made))
    assert len(prompts) == len(rows)
    for offset, prompt in enumerate(prompts):
        if isinstance(prompt, Prompt):
            assert prompt.position == 7 + offset
        else:
            check_error(prompt)
    rendered = list(renderer.render(iter(prompts)))
    assert len(rendered) == len(rows)
    for offset, item in enumerate(rendered):
        if isinstance(item, Request):
            assert (item.position, 0 < len(item.token_ids) < TINY_MAX_LEN) == (7 + offset, True)
        else:
            check_error(item[0])


def check_error(error: RowError) -> None:
    assert error.kind in _KINDS
    assert 0 < len(error.message) < 5_000
    error.message.encode()  # it goes into a Parquet column


@settings(max_examples=examples(100), deadline=None)
@given(values=st.lists(st.one_of(st.none(), MESSAGES.map(lambda items: [x for x in items if isinstance(x, dict)])), min_size=1, max_size=4))
def test_structs_of_any_text_become_prompts_or_errors(values: list[Any]) -> None:
    """The other form of messages: a list of structs."""
    texts = [
        None if row is None else [{key: x.get(key) if isinstance(x.get(key), str) else None for key in ("role", "content")} for x in row]
        for row in values
    ]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    try:
        array = pa.array(texts, kind)
    except UnicodeEncodeError:
        return
    prompts = list(read_prompts(pa.RecordBatch.from_arrays([array], names=["messages"]), 0, job(sampling=None)))
    assert len(prompts) == len(values)
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            check_error(prompt)
