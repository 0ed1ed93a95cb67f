"""What infra/README.md says of files, names and roles is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.infra import bicep
from tests.infra.deployment import deploy_file
from tests.infra.invariants import ROLES

pytestmark = pytest.mark.batch
_ROOT = Path(__file__).resolve().parents[2]
_INFRA = _ROOT / "infra"
_README = (_INFRA / "README.md").read_text()
_VALUES = {"TOKENMILL_BATCH_SERVICE": "0" * 36, "TOKENMILL_OPERATORS": "1" * 36}


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"`((?:modules|environments|node|image)/[\w./-]+)`", _README)
    assert named
    assert [path for path in named if not (_INFRA / path).exists()] == []
    whole = re.findall(r"(?:^|[\s`])((?:infra|tests|pipeline)/[\w./-]+\w)", _README)
    assert [path for path in whole if not (_ROOT / path).exists()] == []


def test_every_role_that_may_be_given_is_explained_and_no_other() -> None:
    told = dict(re.findall(r"\| ([A-Z][A-Za-z ]+) \| ([0-9a-f-]{36}) \|", _README))
    assert told == {name: role for role, (name, _) in ROLES.items()}


def test_every_variable_of_the_parameter_files_is_told() -> None:
    asked = {name for path in _INFRA.rglob("*.bicepparam") for name in re.findall(r"readEnvironmentVariable\('(\w+)'", path.read_text())}
    assert asked
    assert [name for name in asked if f"export {name}=" not in _README and f'{name}="' not in _README] == []


def test_every_parameter_that_is_named_is_one() -> None:
    parameters = {one.name for one in bicep.read(_INFRA / "main.bicep").of("param")}
    named = set(re.findall(r"\b([a-z]+[A-Z]\w*)=", _README)) | {"outboundInternet", "undeleteDays", "logDailyCapGb", "maxWorkers", "ubuntu"}
    assert named <= parameters


def test_the_number_of_resources_is_right() -> None:
    deployed = deploy_file(_INFRA / "environments" / "prod.bicepparam", _VALUES)
    created = [one for one in deployed.resources if not one.existing]
    told = re.search(r"resources that would be created \((\d+) for `prod`\)", _README)
    assert told is not None
    assert int(told.group(1)) == len(created)


def test_the_outputs_that_are_asked_for_are_there() -> None:
    outputs = {one.name for one in bicep.read(_INFRA / "main.bicep").of("output")}
    queries = re.findall(r"properties\.outputs\.(\{[^}]+\}|\w+\.value)", _README)
    assert len(queries) == 2
    assert {name for query in queries for name in re.findall(r"(\w+)\.value", query)} <= outputs
