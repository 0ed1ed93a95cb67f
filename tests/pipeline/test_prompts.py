"""Rows to prompts: text, templates, messages, a row's own sampling, and every way in which a row can be wrong."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from pipeline.prompts import check_columns
from pipeline.prompts import needs_chat
from pipeline.prompts import prompt_columns
from pipeline.prompts import read_prompts
from pipeline.prompts import template_columns
from schemas.errors import JobError
from schemas.job import InputSpec
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.prompts import Message
from schemas.prompts import Prompt
from schemas.prompts import RowError
from schemas.sampling import Sampling

SECRET = "the patient's name is Zebedee"
MESSAGES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
USER = {"role": "user", "content": "hello"}
DEEP = 100_000


def job_with(*, sampling: dict[str, Any] | None = None, sampling_column: str | None = None, **input_values: Any) -> JobSpec:
    asked_for = {"uri": "i", "prompt": "p", "sampling": sampling_column, **input_values}
    return parse_job({"model": "m", "input": asked_for, "output": {"uri": "o"}, "sampling": sampling or {}})


def input_spec(**values: Any) -> InputSpec:
    return InputSpec.model_validate({"uri": "i", **values})


def asked(columns: dict[str, Any], *, position: int = 0, **options: Any) -> list[Any]:
    batch = pa.record_batch({name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()})
    return list(read_prompts(batch, position, job_with(**options)))


def contents(columns: dict[str, Any], **options: Any) -> list[Any]:
    """Each row's content, or the kind of its error."""
    return [item.kind if isinstance(item, RowError) else item.content for item in asked(columns, **options)]


def only_error(columns: dict[str, Any], **options: Any) -> RowError:
    (item,) = asked(columns, **options)
    assert isinstance(item, RowError)
    return item


def invalid_utf8(*values: bytes) -> pa.Array:
    """A text column as a careless writer makes it: Arrow and Parquet do not check."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


def test_each_row_is_a_prompt_at_its_position() -> None:
    assert asked({"p": ["a", " b\n"]}, position=40, sampling={"max_tokens": 3}) == [
        Prompt(position=40, content="a", sampling=Sampling(max_tokens=3)),
        Prompt(position=41, content=" b\n", sampling=Sampling(max_tokens=3)),
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_kind_of_text_column_is_text(kind: pa.DataType) -> None:
    column = pa.array(["a", None, "b"]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(["a", None, "b"], kind)
    check_columns(pa.schema([("p", kind)]), job_with().input)
    assert contents({"p": column}) == ["a", "empty_prompt", "b"]


def test_null_empty_and_blank_prompts_are_error_rows_that_say_which() -> None:
    assert asked({"p": pa.array([None, "", " \n\t "], pa.string())}) == [
        RowError(kind="empty_prompt", message="column 'p' is null"),
        RowError(kind="empty_prompt", message="column 'p' is empty"),
        RowError(kind="empty_prompt", message="column 'p' is only white space"),
    ]


def test_a_batch_without_rows_is_no_prompts() -> None:
    assert asked({"p": pa.array([], pa.string())}) == []


def test_a_text_that_is_no_utf8_is_an_error_row_and_its_neighbours_are_asked() -> None:
    assert contents({"p": invalid_utf8(b"fine", b"\xff\xfe", b"also fine")}) == ["fine", "bad_text", "also fine"]


def test_a_system_prompt_goes_before_the_text() -> None:
    (prompt,) = asked({"p": ["a"]}, system="Be brief.")
    assert prompt.content == (Message(role="system", content="Be brief."), Message(role="user", content="a"))


def test_a_template_is_filled_from_its_columns() -> None:
    columns = {"title": ["T1", "T2"], "n": [3, 4], "other": ["x", "y"]}
    assert contents(columns, prompt="{title}: {n} times {title}") == ["T1: 3 times T1", "T2: 4 times T2"]


def test_doubled_braces_are_braces_and_a_columns_braces_stay() -> None:
    assert contents({"a": ["{b} {{x}}"]}, prompt='{{"q": "{a}"}}') == ['{"q": "{b} {{x}}"}']


def test_a_null_in_a_column_that_the_template_needs_is_an_error_row() -> None:
    rows = asked({"a": ["x", None], "b": ["y", "z"]}, prompt="{b} {a}")
    assert rows[1] == RowError(kind="empty_prompt", message="column 'a' is null, and the template needs it")
    assert rows[0].content == "y x"


def test_a_template_that_fills_to_nothing_is_an_error_row() -> None:
    assert only_error({"a": [" "]}, prompt="{a}\n").kind == "empty_prompt"


def test_a_template_with_a_system_prompt_is_a_chat() -> None:
    (prompt,) = asked({"a": ["x"]}, prompt="<{a}>", system="s")
    assert prompt.content == (Message(role="system", content="s"), Message(role="user", content="<x>"))


def test_a_template_takes_times_to_the_nanosecond() -> None:
    columns = {"when": pa.array([1_700_000_000_000_000_000, 1_700_000_000_000_000_001], pa.timestamp("ns"))}
    assert all(isinstance(item, Prompt) for item in asked(columns, prompt="At {when}?"))


@pytest.mark.parametrize("template", ["{}", "{0}", "{a!r}", "{a:>3}", "{a", "a}", "{a{b}}", "{:x}"])
def test_a_template_with_more_than_names_in_braces_is_refused(template: str) -> None:
    with pytest.raises(JobError, match=r"^input\.prompt: .*literal braces are doubled"):
        template_columns(template)


def test_a_template_without_a_column_is_refused() -> None:
    with pytest.raises(JobError, match="the template names no column"):
        template_columns("{{literal}} braces")


def test_a_templates_columns_are_named_in_order() -> None:
    assert template_columns("{b} {{c}} {a} {b}") == ["b", "a", "b"]


def test_structs_are_messages() -> None:
    turns = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": ""}, {"role": "tool", "content": "t"}]
    (prompt,) = asked({"p": pa.array([turns], MESSAGES_TYPE)})
    assert prompt.content == tuple(Message(**turn) for turn in turns)


def test_json_text_is_messages_where_messages_are_said() -> None:
    columns = {"p": [json.dumps([USER, {"role": "assistant", "content": "hi", "name": "extra keys are nothing"}])]}
    (prompt,) = asked(columns, prompt={"messages": "p"})
    assert prompt.content == (Message(role="user", content="hello"), Message(role="assistant", content="hi"))
    assert contents(columns) == columns["p"]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (None, "empty_prompt", "column 'p' is null"),
        ("[]", "empty_prompt", "column 'p' has no messages"),
        ("", "bad_messages", "column 'p' is not JSON: Expecting value at character 0"),
        ('[{"role": "user"', "bad_messages", "column 'p' is not JSON: Expecting ',' delimiter at character 16"),
        ("[" * DEEP, "bad_messages", "column 'p' is JSON nested too deeply"),
        ('{"role": "user", "content": "x"}', "bad_messages", "column 'p' is dict, expected a list of messages"),
        ('"hello"', "bad_messages", "column 'p' is str, expected a list of messages"),
        ('["hello"]', "bad_messages", "message 0 of column 'p' is str, expected an object with role and content"),
        (
            '[{"role": "robot", "content": "x"}]',
            "bad_messages",
            "message 0 of column 'p' has the role 'robot'; allowed are system, user, assistant, tool",
        ),
        ('[{"content": "x"}]', "bad_messages", "message 0 of column 'p' has the role 'None'; allowed are system, user, assistant, tool"),
        ('[{"role": "user"}]', "bad_messages", "message 0 of column 'p' has NoneType content, expected text"),
        (
            '[{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]',
            "bad_messages",
            "message 1 of column 'p' has list content, expected text",
        ),
        ('[{"role": "user", "content": " "}]', "empty_prompt", "column 'p' has only empty messages"),
        ('[{"role": "system", "content": "be brief"}]', "empty_prompt", "column 'p' has only empty messages"),
        (
            '[{"role": "user", "content": "ab\\ud83d"}]',
            "bad_text",
            "message 0 of column 'p' holds half of a surrogate pair at character 2",
        ),
    ],
)
def test_messages_that_cannot_be_asked_are_error_rows_that_say_why(value: str | None, kind: str, message: str) -> None:
    columns = {"p": pa.array([value], pa.string())}
    assert only_error(columns, prompt={"messages": "p"}) == RowError(kind=kind, message=message)


def test_a_whole_surrogate_pair_is_text() -> None:
    (prompt,) = asked({"p": ['[{"role": "user", "content": "\\ud83d\\ude00"}]']}, prompt={"messages": "p"})
    assert prompt.content == (Message(role="user", content="😀"),)


def test_a_role_that_is_no_text_is_an_error_row() -> None:
    assert only_error({"p": ['[{"role": ["user"], "content": "x"}]']}, prompt={"messages": "p"}).kind == "bad_messages"


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "9" * 5000], ids=["positive", "negative"])
def test_a_number_too_long_for_python_is_an_error_row(number: str) -> None:
    assert only_error({"p": [f"[{number}]"]}, prompt={"messages": "p"}).kind == "bad_messages"
    assert only_error({"p": ["x"], "s": [f'{{"max_tokens": {number}}}']}, sampling_column="s").kind == "bad_sampling"


def test_null_structs_and_null_fields_are_error_rows() -> None:
    columns = {"p": pa.array([None, [], [None], [{"role": None, "content": "x"}], [{"role": "user", "content": None}]], MESSAGES_TYPE)}
    assert contents(columns) == ["empty_prompt", "empty_prompt", "bad_messages", "bad_messages", "bad_messages"]


def test_one_bad_row_does_not_touch_its_neighbours() -> None:
    columns = {"p": [json.dumps([USER]), "broken", json.dumps([USER])]}
    good = (Message(role="user", content="hello"),)
    rows = asked(columns, position=7, prompt={"messages": "p"})
    assert rows[0] == Prompt(position=7, content=good, sampling=Sampling())
    assert isinstance(rows[1], RowError)
    assert rows[2] == Prompt(position=9, content=good, sampling=Sampling())


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"p": [f'[{{"role": "user", "content": "{SECRET}"}}']}, {"prompt": {"messages": "p"}}),
        ({"p": [f'["{SECRET}"]']}, {"prompt": {"messages": "p"}}),
        ({"p": [f'{{"user": "{SECRET}"}}']}, {"prompt": {"messages": "p"}}),
        ({"p": [f'[{{"role": "user", "content": {{"text": "{SECRET}"}}}}]']}, {"prompt": {"messages": "p"}}),
        ({"p": [f'[{{"role": "robot", "content": "{SECRET}"}}]']}, {"prompt": {"messages": "p"}}),
        ({"p": [f'[{{"role": "user", "content": "{SECRET}\\ud800"}}]']}, {"prompt": {"messages": "p"}}),
        ({"p": [SECRET], "s": ['{"max_tokens": 0}']}, {"sampling_column": "s"}),
        ({"p": [SECRET], "s": ["broken"]}, {"sampling_column": "s"}),
        ({"p": [SECRET], "q": pa.array([None], pa.string())}, {"prompt": "{p} {q}"}),
    ],
)
def test_no_error_carries_the_prompt(columns: dict[str, Any], options: dict[str, Any]) -> None:
    message = only_error(columns, **options).message
    for piece in (SECRET, *SECRET.split()):
        if len(piece) > 4:
            assert piece not in message


def test_json_text_of_a_row_is_its_sampling() -> None:
    column = ['{"temperature": 0.5, "logit_bias": {"7": -1}}', None, " ", "{}", '{"top_k": null}']
    rows = asked({"p": ["a"] * 5, "s": column}, sampling={"max_tokens": 9}, sampling_column="s")
    job = Sampling(max_tokens=9)
    assert [row.sampling for row in rows] == [Sampling(max_tokens=9, temperature=0.5, logit_bias={7: -1.0}), job, job, job, job]


def test_a_struct_of_a_row_is_its_sampling_where_it_is_not_null() -> None:
    kind = pa.struct([("max_tokens", pa.int64()), ("temperature", pa.float64()), ("stop", pa.list_(pa.string()))])
    column = pa.array([{"max_tokens": 3}, {"temperature": 0.5, "stop": ["x"]}, None], kind)
    rows = asked({"p": ["a"] * 3, "s": column}, sampling={"max_tokens": 9}, sampling_column="s")
    assert [row.sampling for row in rows] == [
        Sampling(max_tokens=3),
        Sampling(max_tokens=9, temperature=0.5, stop=["x"]),
        Sampling(max_tokens=9),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "the row's sampling is not JSON: "),
        ("[" * DEEP, "the row's sampling is not JSON: "),
        ("[1]", "the row's sampling is list, expected an object"),
        ("7", "the row's sampling is int, expected an object"),
        ('{"max_token": 3}', "max_token: unknown key"),
        ('{"temperature": -1}', "temperature: Input should be greater than or equal to 0 (found -1)"),
        ('{"temperature": "hot", "top_k": -5}', "temperature: Input should be a valid number (found 'hot'); top_k: "),
        ('{"min_tokens": 99}', "(the whole): min_tokens is 99, above max_tokens 9"),
        ('{"temperature": 1e999}', "temperature: "),
        ('{"n": 2, "temperature": 1}', "n: found 2, but the job's n is 1, so the output has no choices column; set sampling.n"),
        ('{"logprobs": 2}', "logprobs: the job asks for none, so the output has no such column; set sampling.logprobs"),
        ('{"stop": ["\\ud800"]}', "stop"),
        ('{"\\ud800": 1}', ""),
    ],
)
def test_a_rows_sampling_that_cannot_be_is_an_error_row(value: str, message: str) -> None:
    error = only_error({"p": ["a"], "s": [value]}, sampling={"max_tokens": 9}, sampling_column="s")
    assert error.kind == "bad_sampling"
    assert error.message.startswith(message)
    assert error.message.encode()  # it will be written as UTF-8


def test_a_row_may_ask_for_fewer_choices_and_logprobs_than_the_job() -> None:
    job = {"n": 4, "temperature": 1.0, "logprobs": 5}
    (row,) = asked({"p": ["a"], "s": ['{"n": 1, "logprobs": 0}']}, sampling=job, sampling_column="s")
    assert (row.sampling.n, row.sampling.logprobs) == (1, 0)


def test_a_missing_column_is_refused_naming_those_there_are() -> None:
    table = pa.schema([("q", pa.string()), ("id", pa.int64())])
    with pytest.raises(JobError, match=r"^input.prompt: the table has no column 'p'; it has q, id$"):
        check_columns(table, job_with().input)
    with pytest.raises(JobError, match=r"^input.prompt: the table has no column 'b'; it has q, id$"):
        check_columns(table, job_with(prompt="{q} {b}").input)
    with pytest.raises(JobError, match=r"^input.sampling: the table has no column 's'; it has q, id$"):
        check_columns(table, input_spec(prompt="q", sampling="s"))


@pytest.mark.parametrize("kind", [pa.int64(), pa.binary(), pa.list_(pa.string()), pa.struct([("role", pa.string())])], ids=str)
def test_a_column_of_another_type_is_refused_with_its_type_and_a_way_out(kind: pa.DataType) -> None:
    with pytest.raises(JobError, match=r"column 'p' is .* use a template, as in \"\{p\}\"") as caught:
        check_columns(pa.schema([("p", kind)]), input_spec(prompt="p"))
    assert str(kind) in str(caught.value)


@pytest.mark.parametrize("prompt", ["p", "Say {p}"], ids=["column", "template"])
def test_a_sampling_column_of_another_type_is_refused(prompt: str) -> None:
    table = pa.schema([("p", pa.string()), ("s", pa.float64())])
    with pytest.raises(JobError, match=r"input.sampling: column 's' is double; allowed are JSON text or a struct"):
        check_columns(table, input_spec(prompt=prompt, sampling="s"))


def test_a_prompt_column_that_is_there_twice_is_refused() -> None:
    table = pa.schema([("p", pa.string()), ("p", pa.string())])
    with pytest.raises(JobError, match="the table has 2 columns named 'p'; rename them"):
        check_columns(table, input_spec(prompt="p"))


@pytest.mark.parametrize(("options", "what"), [({"system": "s"}, "system"), ({"chat": False}, "chat: false")])
def test_messages_in_a_plain_column_do_not_go_with_system_or_without_chat(options: dict[str, Any], what: str) -> None:
    with pytest.raises(JobError, match=f"input.{what} does not go with column 'p', which holds chat messages"):
        check_columns(pa.schema([("p", MESSAGES_TYPE)]), input_spec(prompt="p", **options))


def test_a_template_takes_any_type() -> None:
    check_columns(pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string()))]), input_spec(prompt="{a} {b}"))


@pytest.mark.parametrize(
    ("spec", "kind", "needed"),
    [
        (input_spec(prompt="p"), pa.string(), False),
        (input_spec(prompt="p"), MESSAGES_TYPE, True),
        (input_spec(prompt={"messages": "p"}), pa.string(), True),
        (input_spec(prompt="p", system="s"), pa.string(), True),
        (input_spec(prompt="p", chat=True), pa.string(), True),
        (input_spec(prompt="{p}", chat=False), pa.string(), False),
        (input_spec(prompt="{p}"), MESSAGES_TYPE, False),
    ],
)
def test_only_some_prompts_need_the_chat_template(spec: InputSpec, kind: pa.DataType, needed: bool) -> None:
    assert needs_chat(pa.schema([("p", kind)]), spec) is needed


def test_a_prompts_columns_are_those_it_is_made_of() -> None:
    assert prompt_columns(input_spec(prompt="{a} {b}", sampling="s")) == ["a", "b", "s"]
    assert prompt_columns(input_spec(prompt={"messages": "m"})) == ["m"]
