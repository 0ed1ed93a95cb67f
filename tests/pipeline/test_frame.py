"""Frames: a template that only puts a text out is joined, any other renders each row; what comes out is the same to the letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from pipeline.engine.engine import Request
from pipeline.frame import Frame
from pipeline.frame import find_frame
from pipeline.prompts import Prompt
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from schemas.job import parse_job
from schemas.prompts import Message
from schemas.sampling import Sampling

_CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}{% set content = '<|user|>' + m['role'] + '\n\n' + m['content'] | trim "
    "+ '</s>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}<|assistant|>"
)
_LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)
_LOOKS = {
    "tests for a word": "{% for m in messages %}{% if 'think' in m['content'] %}deep{% endif %}{{ m['content'] }}{% endfor %}",
    "changes case": "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "as JSON": "{% for m in messages %}{{ m['content'] | tojson }}{% endfor %}",
    "replaces": "{% for m in messages %}{{ m['content'].replace('a', 'b') }}{% endfor %}",
    "cuts": "{% for m in messages %}{{ m['content'][:5] }}{% endfor %}",
    "splits": "{% for m in messages %}{{ m['content'].split('|')[-1] }}{% endfor %}",
    "counts": "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
    "says it twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "not at all": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "compares": "{% for m in messages %}{{ m['content'] }}{{ 'x' if m['content'] == 'hello' else '' }}{% endfor %}",
    "asks whether there is any": "{% for m in messages %}{{ m['content'] if m['content'] else 'nothing' }}{% endfor %}",
    "strips what it joined": "{% for m in messages %}{{ ('a ' + m['content']) | trim }}{% endfor %}",
    "joins out of sight": "{% for m in messages %}{{ ('a ' ~ m['content']) | trim }}{% endfor %}",
    "looks at what a macro gives": (
        "{% macro say(m) %}{{ m['content'] }}{% endmacro %}{% for m in messages %}"
        "{% if say(m).startswith('think') %}deep{% endif %}{{ m['content'] }}{% endfor %}"
    ),
    "looks at what it set": (
        "{% for m in messages %}{% set text %}{{ m['content'] }}{% endset %}"
        "{% if text.startswith('think') %}deep{% endif %}{{ text }}{% endfor %}"
    ),
    "looks it up in a mapping": "{% for m in messages %}{{ m['content'] }}{{ {'hello': '!'}.get(m['content'], '') }}{% endfor %}",
    "strips other things": "{% for m in messages %}{{ m['content'].strip('x') }}{% endfor %}",
    "refuses": "{{ raise_exception('never') }}",
}


def renderer(tiny_model: Path, template: str, system: str | None) -> Renderer:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = template
    source: dict[str, Any] = {"uri": "in", "prompt": "prompt", **({"system": system} if system is not None else {})}
    job = parse_job({"model": str(tiny_model), "input": source, "output": {"uri": "out"}, "cluster": {"kind": "inline"}})
    return Renderer(tokenizer, job, max_model_len=10_000, seed_base="x")


def prompt(text: str, system: str | None) -> Prompt:
    content = text if system is None else (Message(role="system", content=system), Message(role="user", content=text))
    return Prompt(position=0, content=content, sampling=Sampling())


_HARD_TEXTS = st.text() | st.text(alphabet=" \n\t\u00a0\u2028\x1fab<|>{}%'\"\\&")


@pytest.mark.parametrize("system", [None, "Be \n brief "])
@pytest.mark.parametrize("template", [_CHATML, _LLAMA3], ids=["ChatML", "Llama 3"])
@given(text=_HARD_TEXTS)
@settings(max_examples=60, deadline=None)
def test_joined_rows_have_the_ids_that_rendered_ones_have(tiny_model: Path, template: str, system: str | None, text: str) -> None:
    joined, rendered = renderer(tiny_model, template, system), renderer(tiny_model, template, system)
    assert joined._frame is not None
    rendered._frame = None
    (one,), (other,) = joined.render([prompt(text, system)]), rendered.render([prompt(text, system)])
    if isinstance(one, Request) and isinstance(other, Request):
        assert one.token_ids == other.token_ids
    assert one == other


def test_a_template_that_strips_is_told_from_one_that_does_not(tiny_model: Path) -> None:
    assert renderer(tiny_model, _CHATML, None)._frame == Frame("<|user|>user\n", "</s><|assistant|>", False)
    assert renderer(tiny_model, _LLAMA3, None)._frame == Frame("<s><|user|>user\n\n", "</s><|assistant|>", True)
    assert renderer(tiny_model, _LLAMA2, None)._frame == Frame("<s>[INST] ", " [/INST]", False)


@pytest.mark.parametrize("template", _LOOKS.values(), ids=_LOOKS)
def test_a_template_that_looks_at_the_text_renders_each_row(tiny_model: Path, template: str) -> None:
    assert renderer(tiny_model, template, None)._frame is None


@pytest.mark.parametrize("template", [_LOOKS["looks at what a macro gives"], _LOOKS["looks at what it set"]], ids=["macro", "set"])
def test_a_row_that_such_a_template_looks_for_has_the_ids_that_it_gives(tiny_model: Path, template: str) -> None:
    made = renderer(tiny_model, template, None)
    (one,) = made.render([prompt("think hard", None)])
    assert isinstance(one, Request)
    assert made.decode([one.token_ids], skip_special_tokens=False) == ["deepthink hard"]


def test_a_template_that_refuses_a_system_prompt_says_so_for_each_row(tiny_model: Path) -> None:
    made = renderer(tiny_model, _LLAMA2, "be brief")
    ((error, _),) = made.render([prompt("x", "be brief")])
    assert error.kind == "bad_messages"


def test_what_goes_wrong_in_a_template_is_no_frame() -> None:
    def render(_: str) -> str:
        raise ZeroDivisionError

    assert find_frame("x", render) is None
