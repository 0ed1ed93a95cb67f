"""Every property that a template sets is one that Azure's management SDKs know, and the pools pass through theirs unharmed."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from azure.core.credentials import AccessToken
from azure.core.pipeline.transport import RequestsTransport
from azure.mgmt.batch import BatchManagementClient
from azure.mgmt.batch import models
from requests import PreparedRequest
from requests import Response
from requests import Session
from requests.adapters import BaseAdapter
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

from tests.infra import arm_models
from tests.infra.deployment import Deployed
from tests.infra.deployment import Resource
from tests.infra.deployment import deploy_file

pytestmark = pytest.mark.batch
_ENVIRONMENTS = Path(__file__).resolve().parents[2] / "infra" / "environments"
_VALUES = {"TOKENMILL_BATCH_SERVICE": "0" * 36, "TOKENMILL_OPERATORS": "1" * 36}
_VARIANTS: list[dict[str, Any]] = [
    {},
    {"operatorAddressRanges": ["203.0.113.7"], "outboundInternet": True, "spotWorkers": False},
    {"workerSize": "Standard_ND128isr_GB300_v6", "sshPublicKey": "ssh-ed25519 AAAA test", "scaleSetNodes": 3},
]
_POOL = "Microsoft.Batch/batchAccounts/pools"
_MACHINE = "properties.deploymentConfiguration.virtualMachineConfiguration"


def made(**instead: Any) -> Deployed:
    return deploy_file(_ENVIRONMENTS / "prod.bicepparam", _VALUES, **instead)


def changed(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy in which one key, given as a.b.c, has another value."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    *way, last = path.split(".")
    inner: Any = copy
    for key in way:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    return copy


@pytest.mark.parametrize("instead", _VARIANTS, ids=lambda instead: " ".join(instead) or "as it stands")
def test_every_property_and_every_choice_is_known_to_the_sdk(instead: dict[str, Any]) -> None:
    found = [problem for one in made(**instead).resources if not one.existing for problem in arm_models.unknown(one)]
    assert found == []


def test_every_type_that_is_created_is_looked_at() -> None:
    types = {one.type for instead in _VARIANTS for one in made(**instead).resources if not one.existing}
    assert types == {*arm_models.MODELS, *arm_models.KEYS}


@pytest.mark.parametrize(
    ("kind", "path", "value", "found"),
    [
        (_POOL, "properties.taskSlots", 1, "properties.taskSlots is not known to PoolProperties"),
        (_POOL, "properties.startTask.containerSettings.workingDirectory", "TaskFolder", "TaskFolder"),
        (_POOL, f"{_MACHINE}.containerConfiguration.containerRegistries.0.server", "x", "server"),
        (_POOL, "properties.networkConfiguration.publicIPAddressConfiguration.provision", "None", "NoPublicIPAddresses"),
        ("Microsoft.Batch/batchAccounts", "properties.allowedAuthenticationModes", ["Entra"], "'Entra'"),
        ("Microsoft.Storage/storageAccounts", "properties.allowSharedKeys", False, "allowSharedKeys"),
        ("Microsoft.Storage/storageAccounts/managementPolicies", "properties.policy.rules.0.definition.actions.versions", {}, "versions"),
        ("Microsoft.Network/networkSecurityGroups", "properties.securityRules.0.properties.access", "Refuse", "Refuse"),
        ("Microsoft.Network/virtualNetworks", "properties.subnets.0.properties.nsg", {}, "nsg"),
        ("Microsoft.KeyVault/vaults", "properties.enableRbac", True, "enableRbac"),
        ("Microsoft.ContainerRegistry/registries", "properties.adminEnabled", False, "adminEnabled"),
        ("Microsoft.Authorization/roleAssignments", "properties.principal", "x", "properties.principal"),
    ],
)  # fmt: skip
def test_a_property_or_choice_that_is_not_known_is_found(kind: str, path: str, value: Any, found: str) -> None:
    one = next(one for one in made().of(kind) if not one.existing)
    problems = arm_models.unknown(replace(one, body=changed(one.body, path, value)))
    assert len(problems) == 1
    assert found in problems[0]


class Wire(BaseAdapter):
    """Keeps what is sent, and answers with it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, str, dict[str, Any]]] = []

    def send(self, request: PreparedRequest, *_: Any, **__: Any) -> Response:
        assert isinstance(request.body, str | bytes)
        body = json.loads(request.body)
        self.sent.append((str(request.method), str(request.url), body))
        raw = HTTPResponse(
            io.BytesIO(json.dumps(body).encode()), headers={"Content-Type": "application/json"}, status=200, preload_content=False
        )
        return HTTPAdapter().build_response(request, raw)

    def close(self) -> None:
        return None


class Anybody:
    """A credential for a wire that asks for none."""

    def get_token(self, *_: str, **__: Any) -> AccessToken:
        return AccessToken("none", 1 << 40)


def test_pools_pass_through_the_management_client_with_no_key_lost() -> None:
    session, wire = Session(), Wire()
    session.mount("https://", wire)
    transport = RequestsTransport(session=session, session_owner=False)
    client = BatchManagementClient(Anybody(), "00000000-0000-0000-0000-00000000cafe", transport=transport)
    pools = made().of(_POOL)
    for one in pools:
        account, name = one.name.split("/")
        answer = client.pool.create("group", account, name, models.Pool(one.body))
        method, url, body = wire.sent[-1]
        assert (method, body) == ("PUT", one.body)
        assert f"/batchAccounts/{account}/pools/{name}?api-version={one.version}" in url
        assert answer.as_dict() == one.body
        assert typed(answer) == typed(models.Pool(one.body))
    assert [one.name.split("/")[1] for one in pools] == ["drivers", "workers"]
    session.close()


def typed(pool: models.Pool) -> tuple[Any, ...]:
    """What the SDK itself reads out of a pool, through its own attributes."""
    has = pool.properties
    assert has is not None
    assert has.deployment_configuration is not None
    machine = has.deployment_configuration.virtual_machine_configuration
    assert machine is not None
    assert has.scale_settings is not None
    assert has.network_configuration is not None
    return (
        has.vm_size,
        has.task_slots_per_node,
        has.scale_settings.auto_scale,
        has.network_configuration.subnet_id,
        machine.node_agent_sku_id,
        machine.image_reference,
        machine.container_configuration,
        has.start_task,
        pool.identity,
    )


def test_no_two_of_a_kind_share_a_name() -> None:
    named: list[Resource] = [one for one in made().resources if not one.existing]
    assert [key for key, count in Counter((one.type, one.name, one.scope) for one in named).items() if count > 1] == []
