"""Sampling: ranges, what does not go together, and a row's values over the job's."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import describe_validation
from schemas.sampling import Sampling
from schemas.sampling import StructuredOutputs


def refusal(values: dict[str, Any]) -> str:
    """What the user reads."""
    with pytest.raises(ValidationError) as caught:
        Sampling.model_validate(values)
    return describe_validation(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("seed", -1),
        ("seed", 2**63),
        ("n", 0),
        ("n", 65),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop_token_ids", [-1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_its_name_and_itself(field: str, value: Any) -> None:
    message = refusal({field: value})
    assert message.startswith(field)
    shown = value[0] if isinstance(value, list) and value else value
    assert f"(found {shown!r})" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0.0),
        ("top_p", 1.0),
        ("top_k", -1),
        ("min_p", 1.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 2.0),
        ("seed", 2**63 - 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("allowed_token_ids", [0]),
    ],
)
def test_the_ends_of_each_range_are_allowed(field: str, value: Any) -> None:
    assert getattr(Sampling.model_validate({field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", "8"), ("max_tokens", 8.0), ("max_tokens", True), ("temperature", "0.5"), ("ignore_eos", 1), ("stop_token_ids", ["2"])],
)
def test_text_and_other_types_are_not_turned_into_numbers(field: str, value: Any) -> None:
    assert refusal({field: value}).startswith(field)


def test_a_whole_number_is_a_temperature() -> None:
    assert Sampling.model_validate({"temperature": 1}).temperature == 1.0


def test_a_misspelt_key_is_refused() -> None:
    assert refusal({"max_token": 8}) == "max_token: unknown key"


def test_several_greedy_choices_are_refused() -> None:
    assert refusal({"n": 2}) == "(the whole): n is 2 with temperature 0: greedy choices are all the same; raise temperature or drop n"
    assert Sampling.model_validate({"n": 2, "temperature": 0.5}).n == 2


def test_more_least_tokens_than_most_tokens_are_refused() -> None:
    assert refusal({"min_tokens": 9, "max_tokens": 8}) == "(the whole): min_tokens is 9, above max_tokens 8"
    assert Sampling.model_validate({"min_tokens": 8, "max_tokens": 8}).min_tokens == 8


@pytest.mark.parametrize("stop", ["", [""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: Any) -> None:
    assert "empty string" in refusal({"stop": stop})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert Sampling.model_validate({"stop": "END"}) == Sampling(stop=["END"])


def test_a_sampling_cannot_be_changed() -> None:
    sampling = Sampling()
    with pytest.raises(ValidationError, match="frozen"):
        sampling.max_tokens = 3


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "none"),
        ({"disable_any_whitespace": True}, "none"),
        ({"regex": "a+", "choice": ["a"]}, "regex, choice"),
        ({"json": {"type": "object"}, "json_object": True}, "json, json_object"),
    ],
)
def test_structured_outputs_take_exactly_one_kind(values: dict[str, Any], found: str) -> None:
    expected = f"structured_outputs: found {found}; give exactly one of json, regex, choice, grammar, json_object"
    assert refusal({"structured_outputs": values}) == expected


@pytest.mark.parametrize(
    "values", [{"json": {"type": "object"}}, {"regex": "a+"}, {"choice": ["a", "b"]}, {"grammar": "root ::= 'a'"}, {"json_object": True}]
)
def test_each_kind_of_structured_output_is_taken_and_comes_back(values: dict[str, Any]) -> None:
    sampling = Sampling.model_validate({"structured_outputs": values})
    assert sampling.model_dump(by_alias=True, exclude_unset=True) == {"structured_outputs": values}


def test_an_empty_choice_of_outputs_is_refused() -> None:
    assert refusal({"structured_outputs": {"choice": []}}).startswith("structured_outputs.choice: ")


def test_an_unknown_kind_of_structured_output_is_refused_with_its_path() -> None:
    assert refusal({"structured_outputs": {"regexp": "a", "regex": "a"}}) == "structured_outputs.regexp: unknown key"


def test_a_row_changes_only_what_it_names() -> None:
    job = Sampling(max_tokens=32, temperature=0.5, stop=["END"])
    assert job.merged({"temperature": 0.9, "top_k": 5}) == Sampling(max_tokens=32, temperature=0.9, stop=["END"], top_k=5)
    assert job.merged({}) == job


def test_a_rows_logit_bias_may_have_jsons_text_keys_and_replaces_the_jobs() -> None:
    job = Sampling(logit_bias={3: 1.0})
    assert job.merged({"logit_bias": {"17": -100, "4": 0.5}}).logit_bias == {17: -100.0, 4: 0.5}
    assert job.merged({}).logit_bias == {3: 1.0}


def test_a_logit_bias_for_no_token_id_is_refused() -> None:
    assert refusal({"logit_bias": {"seventeen": 1.0}}).startswith("logit_bias.seventeen")


def test_a_rows_structured_outputs_replace_the_jobs() -> None:
    job = Sampling(structured_outputs=StructuredOutputs(regex="a+"))
    assert job.merged({"structured_outputs": {"json": {"type": "object"}}}).structured_outputs == StructuredOutputs(json={"type": "object"})
    assert job.merged({"max_tokens": 3}).structured_outputs == StructuredOutputs(regex="a+")


@pytest.mark.parametrize("row", [{"max_tokens": 0}, {"best_of": 2}, {"n": 2}, {"min_tokens": 33}])
def test_a_row_is_checked_together_with_the_job(row: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sampling(max_tokens=32).merged(row)


def test_a_row_may_make_the_jobs_values_possible() -> None:
    assert Sampling(max_tokens=4).merged({"max_tokens": 64, "min_tokens": 33}).min_tokens == 33
