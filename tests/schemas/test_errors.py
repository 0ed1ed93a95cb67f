"""How a validation's problems are told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas import errors
from schemas.job import OutputSpec


def described(values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        OutputSpec.model_validate(values)
    return errors.describe_validation(caught.value)


def test_a_problem_says_field_rule_and_finding() -> None:
    assert described({"uri": "o", "token_ids": "yes"}) == "token_ids: Input should be a valid boolean (found 'yes')"


def test_a_long_finding_is_cut() -> None:
    message = described({"uri": "o", "compression": "x" * 500})
    assert message.endswith("...)")
    assert len(message) < 200


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.JobError, 2),
        (errors.UnitError, 1),
        (errors.InputChanged, 1),
        (errors.ForeignOutput, 2),
        (errors.EngineStartError, 2),
        (errors.EngineDead, 1),
    ],
)
def test_every_error_is_tokenmills_and_has_its_exit_code(kind: type[errors.TokenmillError], code: int) -> None:
    assert issubclass(kind, errors.TokenmillError)
    assert kind.exit_code == code


def test_a_changed_input_is_an_error_of_its_unit_alone() -> None:
    assert issubclass(errors.InputChanged, errors.UnitError)
    assert not issubclass(errors.ForeignOutput, errors.UnitError)
