"""Prompts to requests, with the tiny model's byte-level tokenizer: one token per ASCII character, <s> before plain text."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.engine.engine import Request
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from pipeline.render import row_seed
from schemas.errors import JobError
from schemas.job import parse_job
from schemas.prompts import Message
from schemas.prompts import Prompt
from schemas.prompts import RowError
from schemas.sampling import Sampling

BOS = 0
MAX_LEN = 40


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def plain_tokenizer(tiny_model: Path, tmp_path: Path) -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    folder = shutil.copytree(tiny_model, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    return load_tokenizer(str(folder))


def renderer(
    tokenizer: PreTrainedTokenizerFast,
    *,
    sampling: dict[str, Any] | None = None,
    max_model_len: int = MAX_LEN,
    seed_base: str = "base",
    **input_values: Any,
) -> Renderer:
    data = {"model": "m", "input": {"uri": "i", "prompt": "p", **input_values}, "output": {"uri": "o"}, "sampling": sampling or {}}
    return Renderer(tokenizer, parse_job(data), max_model_len=max_model_len, seed_base=seed_base)


def ask(content: str | list[dict[str, str]], position: int = 0, **sampling: Any) -> Prompt:
    turns = content if isinstance(content, str) else tuple(Message(**turn) for turn in content)
    return Prompt(position=position, content=turns, sampling=Sampling(**{"max_tokens": 8, **sampling}))


def only(made: list[Any]) -> Any:
    (item,) = made
    return item


def shown(tokenizer: PreTrainedTokenizerFast, made: list[Any]) -> str:
    """The one request's tokens as text, special tokens spelt out."""
    request = only(made)
    assert isinstance(request, Request), request
    text: str = tokenizer.decode(request.token_ids, skip_special_tokens=False)
    return text


def test_a_model_with_a_template_is_asked_through_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown(tokenizer, renderer(tokenizer).render([ask("hi")])) == "<s><|user|>hi<|assistant|>"


def test_a_job_without_chat_asks_the_text_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown(tokenizer, renderer(tokenizer, chat=False).render([ask("hi")])) == "<s>hi"


def test_a_model_without_a_template_is_asked_the_text_itself(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown(plain_tokenizer, renderer(plain_tokenizer).render([ask("hi")])) == "<s>hi"


def test_a_job_that_wants_chat_of_a_model_without_a_template_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(JobError, match=r"input.chat: the model's tokenizer has no chat template"):
        renderer(plain_tokenizer, chat=True)


def test_messages_for_a_model_without_a_template_are_an_error_row(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    made = only(renderer(plain_tokenizer).render([ask([{"role": "user", "content": "x"}])]))
    assert made == (RowError(kind="bad_messages", message="the model's tokenizer has no chat template, which messages need"), 0)


def test_messages_keep_their_order_and_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert shown(tokenizer, renderer(tokenizer).render([ask(turns)])) == "<s><|system|>s<|user|>a<|assistant|>b<|assistant|>"


def test_messages_stay_messages_where_chat_is_off_for_text(tokenizer: PreTrainedTokenizerFast) -> None:
    made = renderer(tokenizer, chat=False).render([ask([{"role": "user", "content": "x"}]), ask("x")])
    assert [tokenizer.decode(item.token_ids) for item in made if isinstance(item, Request)] == ["<s><|user|>x<|assistant|>", "<s>x"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", ["<s>hi", "<s><s><s>hi"])
def test_a_prompt_that_spells_its_bos_out_gets_only_one(plain_tokenizer: PreTrainedTokenizerFast, chat: bool, text: str) -> None:
    plain_tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert shown(plain_tokenizer, renderer(plain_tokenizer, chat=chat).render([ask(text)])) == "<s>hi"


def test_a_template_without_a_bos_gets_none(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    plain_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert shown(plain_tokenizer, renderer(plain_tokenizer).render([ask("hi")])) == "hi"


def test_each_row_becomes_one_item_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = RowError(kind="empty_prompt", message="it is null")
    rows = [ask("a", 5), bad, ask([{"role": "tool", "content": "x"}], 7), ask("bb", 8), ask("x" * 99, 9)]
    made = renderer(tokenizer).render(rows)
    assert made[0] == Request(
        position=5,
        token_ids=tokenizer.encode("<s><|user|>a<|assistant|>", add_special_tokens=False),
        sampling=rows[0].sampling,
        ordered=True,
    )
    assert made[1] == (bad, 0)
    assert isinstance(made[2], tuple)
    assert isinstance(made[3], Request)
    assert made[3].position == 8
    assert isinstance(made[4], tuple)
    assert [made[index][0].kind for index in (1, 2, 4)] == ["empty_prompt", "bad_messages", "prompt_too_long"]


def test_no_rows_are_no_requests(tokenizer: PreTrainedTokenizerFast) -> None:
    assert renderer(tokenizer).render([]) == []


def test_a_template_that_raises_is_an_error_row_with_its_words(tokenizer: PreTrainedTokenizerFast) -> None:
    made = only(renderer(tokenizer).render([ask([{"role": "tool", "content": "secret"}])]))
    assert made == (RowError(kind="bad_messages", message="the model's chat template refuses the messages: no tools here"), 0)


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] + 1 }}", "{{ messages[9]['content'] }}", "{{ nobody.knows.this }}", "{{ messages | nothing }}"]
)
def test_a_template_that_stumbles_is_an_error_row(plain_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    plain_tokenizer.chat_template = template
    error, num_tokens = only(renderer(plain_tokenizer).render([ask("hi")]))
    assert (error.kind, num_tokens) == ("bad_messages", 0)


def test_a_template_that_renders_nothing_is_an_error_row(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    plain_tokenizer.chat_template = "{{ '' }}"
    assert only(renderer(plain_tokenizer).render([ask("hi")])) == (RowError(kind="empty_prompt", message="the prompt has no tokens"), 0)


def test_the_longest_prompt_leaves_room_for_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    fits, too_long = renderer(tokenizer, chat=False).render([ask("x" * (MAX_LEN - 2)), ask("x" * (MAX_LEN - 1))])
    assert isinstance(fits, Request)
    assert len(fits.token_ids) == MAX_LEN - 1
    hint = "set input.too_long to truncate_left or truncate_right to cut it"
    message = f"the prompt has {MAX_LEN} tokens, the limit is {MAX_LEN - 1}; {hint}"
    assert too_long == (RowError(kind="prompt_too_long", message=message), MAX_LEN)


LONG = "".join(chr(ord("a") + index % 26) for index in range(100))


@pytest.mark.parametrize(("policy", "kept"), [("truncate_left", LONG[-31:]), ("truncate_right", LONG[:31])])
def test_a_plain_prompt_is_cut_at_its_end_and_keeps_its_bos_and_room(tokenizer: PreTrainedTokenizerFast, policy: str, kept: str) -> None:
    assert shown(tokenizer, renderer(tokenizer, chat=False, too_long=policy).render([ask(LONG)])) == "<s>" + kept


@pytest.mark.parametrize(("policy", "kept"), [("truncate_left", LONG[-29:]), ("truncate_right", LONG[:29])])
def test_a_chats_text_is_cut_and_its_template_stays(tokenizer: PreTrainedTokenizerFast, policy: str, kept: str) -> None:
    text = shown(tokenizer, renderer(tokenizer, too_long=policy).render([ask(LONG)]))
    assert text == f"<s><|user|>{kept}<|assistant|>"


def test_of_several_messages_the_last_users_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "system", "content": "ss"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": LONG},
    ]
    text = shown(tokenizer, renderer(tokenizer, too_long="truncate_left").render([ask(turns)]))
    assert text == f"<s><|system|>ss<|user|>one<|assistant|>two<|user|>{LONG[-18:]}<|assistant|>"


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_cut_prompt_leaves_the_room_that_its_row_asks_for(tokenizer: PreTrainedTokenizerFast, policy: str, chat: bool) -> None:
    made = renderer(tokenizer, too_long=policy, chat=chat).render([ask(LONG, max_tokens=tokens) for tokens in (1, 8, 20, 30)])
    assert [len(item.token_ids) for item in made if isinstance(item, Request)] == [39, 32, 20, 10]


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_completion_as_long_as_the_model_leaves_the_prompt_all_but_one_token(
    tokenizer: PreTrainedTokenizerFast, policy: str, chat: bool
) -> None:
    made = only(renderer(tokenizer, too_long=policy, chat=chat).render([ask(LONG, max_tokens=MAX_LEN)]))
    assert len(made.token_ids) == MAX_LEN - 1


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right"])
@pytest.mark.parametrize("letter", ["é", "語", "😀"])
@pytest.mark.parametrize("max_tokens", [1, 2, 8])
def test_letters_of_several_tokens_are_cut_too(tokenizer: PreTrainedTokenizerFast, policy: str, letter: str, max_tokens: int) -> None:
    made = only(renderer(tokenizer, too_long=policy).render([ask("ab" + letter * 50 + "x", max_tokens=max_tokens)]))
    assert isinstance(made, Request), made
    assert MAX_LEN - max_tokens - len(letter.encode()) < len(made.token_ids) <= MAX_LEN - max_tokens
    text = tokenizer.decode(made.token_ids, skip_special_tokens=False)
    kept = text.removeprefix("<s><|user|>").removesuffix("<|assistant|>")
    assert kept.strip(letter) == ("x" if policy == "truncate_left" else "ab")


def test_a_prompt_within_the_limit_is_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    for policy in ("error", "truncate_left", "truncate_right"):
        made = only(renderer(tokenizer, chat=False, too_long=policy).render([ask("x" * 36, max_tokens=30)]))
        assert len(made.token_ids) == 37


def test_a_chat_that_cannot_be_cut_far_enough_is_an_error_row(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "system", "content": LONG}, {"role": "user", "content": "hi"}]
    error, num_tokens = only(renderer(tokenizer, too_long="truncate_left").render([ask(turns)]))
    assert error == RowError(kind="prompt_too_long", message=f"the prompt has {num_tokens} tokens, the limit is {MAX_LEN - 1}")
    assert num_tokens == 106


def seeds(made: list[Any]) -> list[int | None]:
    return [item.seed for item in made]


def test_greedy_rows_have_no_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert seeds(renderer(tokenizer, sampling={"seed": 3}).render([ask("a"), ask("b", 1, seed=4)])) == [None, None]


def test_rows_with_temperature_have_a_seed_each_whatever_their_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ask("same", position, temperature=0.7) for position in range(50)]
    whole = seeds(renderer(tokenizer).render(rows))
    assert len(set(whole)) == 50
    assert all(seed is not None and 0 <= seed < 2**31 for seed in whole)
    alone = [seeds(renderer(tokenizer).render([row]))[0] for row in reversed(rows)]
    assert alone[::-1] == whole


def test_seeds_come_from_fingerprint_and_row_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ask("a", 7, temperature=1.0)]
    assert seeds(renderer(tokenizer, seed_base="f").render(rows)) == seeds(renderer(tokenizer, seed_base="f", chat=False).render(rows))
    assert seeds(renderer(tokenizer, seed_base="f").render(rows)) == [row_seed("f", 7)]
    assert seeds(renderer(tokenizer, seed_base="g").render(rows)) != [row_seed("f", 7)]


def test_the_jobs_seed_replaces_the_fingerprint_and_still_differs_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ask("a", position, temperature=1.0) for position in (0, 1)]
    by_base = [seeds(renderer(tokenizer, sampling={"seed": 5}, seed_base=base).render(rows)) for base in ("f", "g")]
    assert by_base[0] == by_base[1] == [row_seed("5", 0), row_seed("5", 1)]


def test_a_rows_own_seed_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    assert seeds(renderer(tokenizer, sampling={"seed": 5}).render([replace(ask("a", 3, temperature=1.0), seed=99)])) == [99]


def test_completions_are_decoded_with_or_without_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode("hé</s>", add_special_tokens=False)
    tool = renderer(tokenizer)
    assert tool.decode([ids, []], skip_special_tokens=True) == ["hé", ""]
    assert tool.decode([ids], skip_special_tokens=False) == ["hé</s>"]


def test_half_a_letter_decodes_to_what_can_be_written(tokenizer: PreTrainedTokenizerFast) -> None:
    (text,) = renderer(tokenizer).decode([tokenizer.encode("😀", add_special_tokens=False)[:2]], skip_special_tokens=True)
    assert text.encode().decode() == text


def test_units_in_several_threads_share_one_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ask(LONG[:index], index) for index in range(1, 30)]
    expected, made = renderer(tokenizer).render(rows), dict[int, list[Any]]()

    def work(number: int) -> None:
        tool = renderer(tokenizer)
        made[number] = [tool.render(rows) for _ in range(5)][-1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == dict.fromkeys(range(4), expected)


def test_a_tokenizers_own_cut_does_not_shorten_prompts(tiny_model: Path, tmp_path: Path) -> None:
    """Checkpoints exist whose tokenizer.json was saved with truncation and padding on."""
    folder = shutil.copytree(tiny_model, tmp_path / "cutting")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(str(folder))
    assert shown(tokenizer, renderer(tokenizer).render([ask("hello")])) == "<s><|user|>hello<|assistant|>"


def test_a_tokenizer_that_cannot_be_loaded_is_a_wrong_job(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(JobError, match=f"model: cannot load the tokenizer of {folder}: "):
        load_tokenizer(str(folder))
