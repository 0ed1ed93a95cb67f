"""Input rows in, Prompts out: which columns are asked, in which form, with which sampling. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Iterator
from string import Formatter
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.job import InputSpec
from schemas.job import JobSpec
from schemas.job import PromptMessages
from schemas.job import PromptTemplate
from schemas.prompts import ROLES
from schemas.prompts import Message
from schemas.prompts import Prompt
from schemas.prompts import RowError
from schemas.sampling import Sampling

Content = str | tuple[Message, ...]


class _BadRow(Exception):
    """Carries the RowError of a row that cannot be asked."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.error = RowError(kind=kind, message=message)


def template_columns(template: str) -> list[str]:
    """The columns that a template names, in order. Raises JobError on anything but plain {column}."""
    columns = []
    try:
        for _, name, spec, conversion in Formatter().parse(template):
            if name is None:
                continue
            if not name or spec or conversion or name.isdigit():
                raise ValueError(f"found {{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}")
            columns.append(name)
    except ValueError as error:
        raise JobError(
            f"input.prompt: {error} in the template; braces hold a column's name alone, and literal braces are doubled: {{{{ }}}}"
        ) from None
    if not columns:
        raise JobError("input.prompt: the template names no column, so every row would ask the same; write {column} into it")
    return columns


def prompt_columns(spec: InputSpec) -> list[str]:
    """Every input column that a prompt is made of."""
    source = spec.source
    if isinstance(source, PromptTemplate):
        columns = template_columns(source.template)
    else:
        columns = [source.messages if isinstance(source, PromptMessages) else source.column]
    return columns + ([spec.sampling] if spec.sampling else [])


def check_columns(schema: pa.Schema, spec: InputSpec) -> None:
    """Raises JobError where the table lacks a column that the prompt needs, or has it in a type that cannot be asked."""
    for column in prompt_columns(spec):
        if column not in schema.names:
            field = "input.sampling" if column == spec.sampling else "input.prompt"
            raise JobError(f"{field}: the table has no column {column!r}; it has {', '.join(schema.names)}")
        if schema.names.count(column) > 1:
            raise JobError(f"input.prompt: the table has {schema.names.count(column)} columns named {column!r}; rename them")
    if spec.sampling and not (_is_text(schema.field(spec.sampling).type) or pa.types.is_struct(schema.field(spec.sampling).type)):
        raise JobError(f"input.sampling: column {spec.sampling!r} is {schema.field(spec.sampling).type}; allowed are JSON text or a struct")
    source = spec.source
    if isinstance(source, PromptTemplate):
        return
    column = source.messages if isinstance(source, PromptMessages) else source.column
    kind = schema.field(column).type
    if _is_messages(kind):
        if spec.system is not None or spec.chat is False:
            what = "system" if spec.system is not None else "chat: false"
            raise JobError(f"input.{what} does not go with column {column!r}, which holds chat messages ({kind}); drop it")
    elif not _is_text(kind):
        raise JobError(
            f"input.prompt: column {column!r} is {kind}; allowed are text, or messages as list<struct<role: string, content: string>>; "
            f'for other types use a template, as in "{{{column}}}"'
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    names = {field.name for field in kind.value_type}
    return {"role", "content"} <= names


def needs_chat(schema: pa.Schema, spec: InputSpec) -> bool:
    """Whether the prompts only make sense through a chat template."""
    source = spec.source
    if spec.system is not None or spec.chat is True or isinstance(source, PromptMessages):
        return True
    return not isinstance(source, PromptTemplate) and _is_messages(schema.field(source.column).type)


def read_prompts(batch: pa.RecordBatch, position: int, job: JobSpec) -> Iterator[Prompt | RowError]:
    """One Prompt or RowError for each row, in order; `position` is the first row's in the whole table."""
    contents = _contents(batch, job.input)
    overrides: list[Any] = _values(batch.column(job.input.sampling)) if job.input.sampling else [None] * batch.num_rows
    for offset, override in enumerate(overrides):
        try:
            content = contents(offset)
            sampling = row_sampling(job.sampling, override)
            seed = None if sampling is job.sampling else sampling.seed
            yield Prompt(position=position + offset, content=content, sampling=sampling, seed=seed)
        except _BadRow as bad:
            yield bad.error


def _contents(batch: pa.RecordBatch, spec: InputSpec) -> Callable[[int], Content]:
    """A function from a row of the batch to its content; raises _BadRow."""
    source = spec.source
    if isinstance(source, PromptTemplate):
        values = {name: _values(batch.column(name)) for name in template_columns(source.template)}
        parts = list(Formatter().parse(source.template))

        def fill(row: int) -> Content:
            text = ""
            for literal, name, _, _ in parts:
                text += literal
                if name is not None:
                    value = values[name][row]
                    if value is None:
                        raise _BadRow("empty_prompt", f"column {name!r} is null, and the template needs it")
                    text += str(_readable(value, f"column {name!r}"))
            return with_system(_checked(text, "the filled template"), spec)

        return fill
    column = source.messages if isinstance(source, PromptMessages) else source.column
    rows = _values(batch.column(column))
    if isinstance(source, PromptMessages) or _is_messages(batch.schema.field(column).type):
        return lambda row: _messages(rows[row], column)

    def text(row: int) -> Content:
        if rows[row] is None:
            raise _BadRow("empty_prompt", f"column {column!r} is null")
        return with_system(_checked(_readable(rows[row], f"column {column!r}"), f"column {column!r}"), spec)

    return text


class _NotText:
    """Stands for a value whose bytes are no UTF-8."""


def _values(column: Any) -> list[Any]:
    """The column's values; one that Python cannot hold does not cost its neighbours theirs."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NotText()
    except (ValueError, OverflowError):  # such as a time to the nanosecond, or of the year 20000
        return scalar.cast(pa.string()).as_py()


def _readable(value: Any, where: str) -> Any:
    if isinstance(value, _NotText):
        raise _BadRow("bad_text", f"{where} is not UTF-8")
    return value


def with_system(text: str, spec: InputSpec) -> Content:
    if spec.system is None:
        return text
    return (Message(role="system", content=spec.system), Message(role="user", content=text))


def _checked(text: str, where: str) -> str:
    if not text.strip():
        raise _BadRow("empty_prompt", f"{where} is empty" if not text else f"{where} is only white space")
    return _encodable(text, where)


def _encodable(text: str, where: str) -> str:
    """JSON can smuggle in half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRow("bad_text", f"{where} holds half of a surrogate pair at character {error.start}") from None
    return text


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    where = f"column {column!r}"
    value = _readable(value, where)
    if value is None:
        raise _BadRow("empty_prompt", f"{where} is null")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise _BadRow("bad_messages", f"{where} is not JSON: {error.msg} at character {error.pos}") from None
        except RecursionError:
            raise _BadRow("bad_messages", f"{where} is JSON nested too deeply") from None
        except ValueError:
            raise _BadRow("bad_messages", f"{where} holds a number too long to read") from None
    if not isinstance(value, list):
        raise _BadRow("bad_messages", f"{where} is {type(value).__name__}, expected a list of messages")
    if not value:
        raise _BadRow("empty_prompt", f"{where} has no messages")
    messages = []
    for index, item in enumerate(value):
        place = f"message {index} of {where}"
        if not isinstance(item, dict):
            raise _BadRow("bad_messages", f"{place} is {type(item).__name__}, expected an object with role and content")
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise _BadRow("bad_messages", f"{place} has the role {str(role)[:40]!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _BadRow("bad_messages", f"{place} has {type(content).__name__} content, expected text")
        messages.append(Message(role=role, content=_encodable(content, place)))
    if not any(message.content.strip() for message in messages if message.role != "system"):
        raise _BadRow("empty_prompt", f"{where} has only empty messages")
    return tuple(messages)


def row_sampling(job: Sampling, override: Any) -> Sampling:
    """The job's sampling with a row's values (JSON text, a mapping, or null) over it."""
    override = _readable(override, "the row's sampling")
    if override is None:
        return job
    if isinstance(override, str):
        if not override.strip():
            return job
        try:
            override = json.loads(override)
        except (ValueError, RecursionError) as error:
            raise _BadRow("bad_sampling", f"the row's sampling is not JSON: {error}") from None
    if not isinstance(override, dict):
        raise _BadRow("bad_sampling", f"the row's sampling is {type(override).__name__}, expected an object")
    values = {key: value for key, value in override.items() if value is not None}
    for key, value in values.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise _BadRow("bad_sampling", f"{key}: it holds half of a surrogate pair") from None
    try:
        merged = job.merged(values)
    except ValidationError as error:
        raise _BadRow("bad_sampling", describe_validation(error).replace("\n", "; ")) from None
    # The output's columns are fixed before the first row is read.
    if merged.n > 1 and job.n == 1:
        raise _BadRow("bad_sampling", f"n: found {merged.n}, but the job's n is 1, so the output has no choices column; set sampling.n")
    if merged.logprobs is not None and job.logprobs is None:
        raise _BadRow("bad_sampling", "logprobs: the job asks for none, so the output has no such column; set sampling.logprobs")
    return merged
