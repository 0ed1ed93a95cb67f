"""JobSpec: what is refused, with which words, and what is understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.errors import EXIT_WRONG_JOB
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import PromptColumn
from schemas.job import PromptMessages
from schemas.job import PromptTemplate
from schemas.job import json_schema
from schemas.job import parse_job

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "schemas" / "job.schema.json"


def job_data(**sections: Any) -> dict[str, Any]:
    """A small right job with sections merged in."""
    data: dict[str, Any] = {"model": "m", "input": {"uri": "in", "prompt": "p"}, "output": {"uri": "out"}}
    for key, value in sections.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
    return data


def refusal(**sections: Any) -> str:
    with pytest.raises(JobError) as caught:
        parse_job(job_data(**sections))
    return str(caught.value)


def test_a_small_job_gets_the_defaults() -> None:
    job = parse_job(job_data())
    assert (job.name, job.engine.kind, job.engine.profile, job.cluster.kind, job.cluster.replicas) == (
        "tokenmill",
        "vllm",
        "auto",
        "local",
        None,
    )
    assert (job.sampling.temperature, job.sampling.max_tokens, job.limits.attempts, job.limits.error_rows) == (0.0, 256, 3, None)


def test_keyword_arguments_and_yaml_give_the_same_job() -> None:
    assert parse_job(yaml.safe_load("{model: m, input: {uri: in, prompt: p}, output: {uri: out}}")) == JobSpec(**job_data())


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"modle": "x"}, "modle"),
        ({"input": {"promt": "x"}}, "input.promt"),
        ({"output": {"url": "x"}}, "output.url"),
        ({"sampling": {"max_new_tokens": 3}}, "sampling.max_new_tokens"),
        ({"sampling": {"structured_outputs": {"regex": "a", "jsn": {}}}}, "sampling.structured_outputs.jsn"),
        ({"engine": {"profiles": "x"}}, "engine.profiles"),
        ({"cluster": {"replica": 2}}, "cluster.replica"),
        ({"limits": {"attempt": 2}}, "limits.attempt"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path(sections: dict[str, Any], path: str) -> None:
    assert refusal(**sections) == f"{path}: unknown key"


def test_an_unknown_key_inside_the_prompt_is_refused() -> None:
    assert "unknown key" in refusal(input={"prompt": {"colum": "p"}})
    assert "input.prompt" in refusal(input={"prompt": {"colum": "p"}})


def test_every_wrong_field_gets_its_own_line() -> None:
    message = refusal(sampling={"max_tokens": 0, "top_p": 2.0}, limits={"attempts": 0})
    assert sorted(line.split(":", 1)[0] for line in message.splitlines()) == ["limits.attempts", "sampling.max_tokens", "sampling.top_p"]


@pytest.mark.parametrize("missing", ["model", "input", "output"])
def test_a_job_without_its_model_input_or_output_is_refused(missing: str) -> None:
    data = job_data()
    del data[missing]
    with pytest.raises(JobError, match=f"^{missing}: Field required"):
        parse_job(data)


@pytest.mark.parametrize("data", [None, [], "job.yaml", 3])
def test_what_is_no_mapping_is_no_job(data: Any) -> None:
    with pytest.raises(JobError, match=f"a job is a mapping .* found {type(data).__name__}"):
        parse_job(data)


def test_a_wrong_job_is_exit_code_2() -> None:
    assert JobError.exit_code == EXIT_WRONG_JOB == 2


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "x" * 64])
def test_a_name_that_cannot_be_a_resource_name_is_refused(name: str) -> None:
    assert refusal(name=name).startswith("name: ")


@pytest.mark.parametrize("uri", ["", [], [""], ["a", ""]])
def test_an_empty_input_uri_is_refused(uri: Any) -> None:
    assert "input.uri" in refusal(input={"uri": uri})


def test_empty_model_and_output_are_refused() -> None:
    assert refusal(model="").startswith("model: ")
    assert refusal(output={"uri": ""}).startswith("output.uri: ")


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"input": {"uri": "memory://in"}}, "input.uri is memory://in"),
        ({"input": {"uri": ["in", "memory://in/a"]}}, "input.uri is memory://in/a"),
        ({"output": {"uri": "memory://out"}}, "output.uri is memory://out"),
    ],
)
def test_memory_is_refused_where_other_processes_would_not_see_it(sections: dict[str, Any], field: str) -> None:
    message = refusal(**sections)
    assert field in message
    assert "cluster.kind: inline" in message


def test_memory_is_taken_inline() -> None:
    job = parse_job(job_data(input={"uri": "memory://in"}, output={"uri": "memory://out"}, cluster={"kind": "inline"}))
    assert (job.input.uris, job.output.uri) == (["memory://in"], "memory://out")


def test_a_system_prompt_without_the_chat_template_is_refused() -> None:
    assert refusal(input={"system": "Be brief.", "chat": False}).startswith("input: system needs the chat template")


def test_messages_with_a_system_prompt_or_without_chat_are_refused() -> None:
    assert "system and prompt.messages" in refusal(input={"prompt": {"messages": "m"}, "system": "Be brief."})
    assert "prompt.messages needs the chat template" in refusal(input={"prompt": {"messages": "m"}, "chat": False})


def test_a_schedule_without_azure_batch_is_refused_rather_than_ignored() -> None:
    assert refusal(schedule="0 3 * * *").startswith("schedule: ")
    assert "schedule: needs cluster.kind azure-batch, found local; elsewhere use cron" in refusal(schedule={"every": "1d"})
    assert parse_job(job_data(schedule=None)).schedule is None


def test_an_unknown_option_of_the_simulated_engine_is_refused_by_name() -> None:
    message = refusal(engine={"kind": "simulated", "options": {"decode_tokens_per_second": 5}})
    assert message == "engine: options of the simulated engine: decode_tokens_per_second: unknown key"


def test_a_wrong_rate_of_the_simulated_engine_is_refused() -> None:
    assert "decode_tokens_per_s" in refusal(engine={"kind": "simulated", "options": {"decode_tokens_per_s": 0}})


def test_vllms_options_are_not_judged_here() -> None:
    assert parse_job(job_data(engine={"options": {"max_model_len": 64}})).engine.options == {"max_model_len": 64}


def test_inline_with_two_replicas_is_refused() -> None:
    expected = "cluster: kind inline runs one engine in one process, found replicas: 2; use kind: local"
    assert refusal(cluster={"kind": "inline", "replicas": 2}) == expected
    assert parse_job(job_data(cluster={"kind": "inline", "replicas": 1})).cluster.replicas == 1


@pytest.mark.parametrize(
    ("prompt", "source"),
    [
        ("question", PromptColumn(column="question")),
        ("Summarise: {body}", PromptTemplate(template="Summarise: {body}")),
        ("{{literal}}", PromptTemplate(template="{{literal}}")),
        ({"column": "a{b}"}, PromptColumn(column="a{b}")),
        ({"messages": "m"}, PromptMessages(messages="m")),
        ({"template": "x {y}"}, PromptTemplate(template="x {y}")),
    ],
)
def test_braces_make_a_text_a_template_unless_its_kind_is_said(prompt: Any, source: Any) -> None:
    assert parse_job(job_data(input={"prompt": prompt})).input.source == source


def test_a_job_cannot_be_changed() -> None:
    job = parse_job(job_data())
    with pytest.raises(ValueError, match="frozen"):
        job.model = "other"


def test_a_job_survives_being_written_and_read() -> None:
    job = parse_job(
        job_data(
            input={"uri": ["a", "b"], "prompt": {"messages": "m"}},
            sampling={"logit_bias": {5: 1.0}, "structured_outputs": {"json": {"type": "object"}}, "stop": "x"},
        )
    )
    assert parse_job(job.model_dump(by_alias=True, exclude_unset=True, mode="json")) == job


def test_the_committed_schema_file_is_the_specs() -> None:
    assert SCHEMA_FILE.read_text() == json_schema()
