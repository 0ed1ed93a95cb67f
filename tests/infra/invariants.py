"""What must be true of everything that infra/ creates. Each check returns what is wrong, in words; nothing wrong, nothing returned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.infra import bicep
from tests.infra.bicep import Template
from tests.infra.bicep import text_of
from tests.infra.deployment import Deployed
from tests.infra.deployment import Resource

POOL = "Microsoft.Batch/batchAccounts/pools"
SCALE_SET = "Microsoft.Compute/virtualMachineScaleSets"
BATCH = "Microsoft.Batch/batchAccounts"
STORAGE = "Microsoft.Storage/storageAccounts"
REGISTRY = "Microsoft.ContainerRegistry/registries"
VAULT = "Microsoft.KeyVault/vaults"
RULES = "Microsoft.Network/networkSecurityGroups"
ROLE = "Microsoft.Authorization/roleAssignments"

ROLES = {
    "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1": ("Storage Blob Data Reader", f"{STORAGE}/blobServices/containers"),
    "ba92f5b4-2d11-453d-a403-e96b0029c9fe": ("Storage Blob Data Contributor", f"{STORAGE}/blobServices/containers"),
    "7f951dda-4ed3-4680-a7ca-43fe172d538d": ("AcrPull", REGISTRY),
    "8311e382-0749-4cb8-b61a-304f252e45ec": ("AcrPush", REGISTRY),
    "48e5e92e-a480-4e71-aa9c-2778f4c13781": ("Azure Batch Job Submitter", BATCH),
    "b86a8fe4-44ce-4948-aee5-eccb2c155cd7": ("Key Vault Secrets Officer", VAULT),
    "a35466a1-cfd6-450a-b35e-683fcdf30363": ("Azure Batch Service Orchestration Role", "subscription"),
}
"""Every role that may be given, and the one kind of thing on which."""
_SECRET_KEYS = re.compile(r"password|secret|accountKey|connectionString|sharedKey|sasToken|username", re.IGNORECASE)
_NO_SECRETS = ("allowSharedKeyAccess", "disablePasswordAuthentication")
_EVERYWHERE = ("*", "Internet", "0.0.0.0/0", "::/0", "Any")


def no_public_access(deployed: Deployed, operators: list[str]) -> list[str]:
    wrong = []
    for one in _made(deployed, STORAGE, REGISTRY, BATCH, VAULT):
        has = one.body["properties"]
        network = has.get("networkAcls") or has.get("networkRuleSet") or has.get("networkProfile", {}).get("accountAccess", {})
        ranges = [rule["value"] for rule in network.get("ipRules", [])]
        allowed = [] if one.type == VAULT else operators
        if has.get("publicNetworkAccess") != ("Enabled" if allowed else "Disabled"):
            wrong.append(f"{one}: publicNetworkAccess is {has.get('publicNetworkAccess')} with operators at {allowed}")
        open_ = has.get("publicNetworkAccess") != "Disabled"  # then the rules decide; else they may be left out
        if (network or open_) and (network.get("defaultAction") != "Deny" or ranges != allowed):
            wrong.append(f"{one}: lets in {ranges} and otherwise does {network.get('defaultAction')}; expected {allowed} and Deny")
        nodes = has.get("networkProfile", {}).get("nodeManagementAccess", {})
        if one.type == BATCH and open_ and (nodes.get("defaultAction") != "Deny" or nodes.get("ipRules")):
            wrong.append(f"{one}: lets nodes in from outside: {nodes}")
    flags = [(STORAGE, "allowBlobPublicAccess"), (STORAGE, "isSftpEnabled"), (REGISTRY, "anonymousPullEnabled")]
    for kind, flag in flags:
        wrong += [f"{one}: {flag} is not false" for one in _made(deployed, kind) if one.body["properties"].get(flag) is not False]
    for one in _made(deployed, f"{STORAGE}/blobServices/containers"):
        if one.body["properties"].get("publicAccess") != "None":
            wrong.append(f"{one}: publicAccess is not None")
    return wrong + _no_way_in(deployed)


def _no_way_in(deployed: Deployed) -> list[str]:
    """No machine has an address on the internet, and no rule lets the internet in."""
    wrong = []
    for one in _made(deployed, POOL):
        network = one.body["properties"].get("networkConfiguration", {})
        if network.get("publicIPAddressConfiguration") != {"provision": "NoPublicIPAddresses"} or "endpointConfiguration" in network:
            wrong.append(f"{one}: its nodes may have public addresses or forwarded ports: {network}")
    for path, value in _walk(deployed, SCALE_SET):
        if path.endswith("publicIPAddressConfiguration"):
            wrong.append(f"{path}: a public address: {value}")
    through_nat = {
        address["id"] for nat in _made(deployed, "Microsoft.Network/natGateways") for address in nat.body["properties"]["publicIpAddresses"]
    }
    wrong += [
        f"{one}: an address that is no NAT gateway's"
        for one in _made(deployed, "Microsoft.Network/publicIPAddresses")
        if one.id not in through_nat
    ]
    for group in _made(deployed, RULES):
        rules = [rule["properties"] for rule in group.body["properties"]["securityRules"]]
        incoming = [rule for rule in rules if rule["direction"] == "Inbound"]
        wrong += [
            f"{group}: lets in from everywhere"
            for rule in incoming
            if rule["access"] == "Allow" and rule["sourceAddressPrefix"] in _EVERYWHERE
        ]
        last: dict[str, Any] = max(incoming, key=lambda rule: rule["priority"], default={})
        if (last.get("access"), last.get("sourceAddressPrefix"), last.get("destinationPortRange"), last.get("protocol")) != (
            "Deny",
            "*",
            "*",
            "*",
        ):
            wrong.append(f"{group}: its last inbound rule does not deny everything")
    for network in _made(deployed, "Microsoft.Network/virtualNetworks"):
        for subnet in network.body["properties"]["subnets"]:
            if "networkSecurityGroup" not in subnet["properties"] or subnet["properties"].get("defaultOutboundAccess") is not False:
                wrong.append(f"{network}: subnet {subnet['name']} lacks a security group, or has Azure's default way out")
    return wrong


def no_keys(deployed: Deployed) -> list[str]:
    """Identities alone: no key that somebody could copy is accepted, and none is written down."""
    expected = [
        (STORAGE, "allowSharedKeyAccess", False),
        (STORAGE, "isLocalUserEnabled", False),
        (REGISTRY, "adminUserEnabled", False),
        (BATCH, "allowedAuthenticationModes", ["AAD"]),
        (VAULT, "enableRbacAuthorization", True),
    ]
    wrong = [
        f"{one}: {name} is {one.body['properties'].get(name)}, expected {value}"
        for kind, name, value in expected
        for one in _made(deployed, kind)
        if one.body["properties"].get(name) != value
    ]
    for one in _made(deployed, "Microsoft.OperationalInsights/workspaces"):
        if one.body["properties"].get("features", {}).get("disableLocalAuth") is not True:
            wrong.append(f"{one}: features.disableLocalAuth is not true")
    for path, value in _walk(deployed):
        key = path.rsplit(".", 1)[-1]
        if _SECRET_KEYS.search(key) and key not in (*_NO_SECRETS, "adminUsername"):
            wrong.append(f"{path} looks like a secret: {value}")
    return wrong


def no_key_is_asked_for(template: Template) -> list[str]:
    """A template that asks for keys has them in the deployment's history."""
    wrong = []
    for node in bicep.walk(template.root):
        if node.type == "call_expression" and re.match(r"(.*\.)?(list\w+|getSecret)$", text_of(node.named_children[0])):
            wrong.append(f"{bicep.where(template.path, node)}: {text_of(node)[:60]} asks for a secret")
    wrong += [f"{template.path.name}: {one.name} takes a secret" for one in template.of("param") if "secure" in one.decorators]
    return wrong


def identities(deployed: Deployed) -> list[str]:
    """Whatever runs our code has exactly one identity, which may pull the image, and pulls by it."""
    wrong = []
    may_pull = {one.body["properties"]["principalId"] for one in _made(deployed, ROLE) if _role(one)[0] == "AcrPull"}
    known = {one.id for one in _made(deployed, "Microsoft.ManagedIdentity/userAssignedIdentities")}
    for one in _made(deployed, POOL, SCALE_SET):
        identity = one.body.get("identity", {})
        its = set(identity.get("userAssignedIdentities", {}))
        if identity.get("type") != "UserAssigned" or len(its) != 1 or not its <= known:
            wrong.append(f"{one}: its identity is {identity}, expected one of {sorted(known)}")
    for one in _made(deployed, POOL):
        machine = one.body["properties"]["deploymentConfiguration"]["virtualMachineConfiguration"]
        registries = machine.get("containerConfiguration", {}).get("containerRegistries", [])
        if not registries or any(set(one.body["identity"]["userAssignedIdentities"]) != {_pulls(registry)} for registry in registries):
            wrong.append(f"{one}: does not pull its image by its own identity: {registries}")
    if not may_pull:
        wrong.append("nobody may pull the image")
    return wrong


def least_roles(deployed: Deployed) -> list[str]:
    """Each role is one of a few, on the one thing that it is for."""
    wrong = []
    for one in _made(deployed, ROLE):
        name, kind = _role(one)
        at = re.findall(r"/providers/([^/]+)((?:/[^/]+/[^/]+)+)$", one.scope)
        found = (
            at[0][0] + "".join(f"/{part}" for part in at[0][1].split("/")[1::2])
            if at
            else "subscription"
            if one.scope.count("/") == 2
            else one.scope
        )
        if found != kind:
            wrong.append(f"{one}: {name} is given on {found}, expected {kind or 'no such role'}")
        if not one.body["properties"].get("principalType"):
            wrong.append(f"{one}: no principalType, so it fails while a new identity is not known everywhere")
    return wrong


def watched(deployed: Deployed) -> list[str]:
    """Whatever holds data or runs jobs writes its log into the workspace."""
    logged = {one.scope.split("/blobServices/")[0] for one in _made(deployed, "Microsoft.Insights/diagnosticSettings")}
    return [f"{one}: has no diagnostic setting" for one in _made(deployed, STORAGE, REGISTRY, BATCH, VAULT) if one.id not in logged]


def private_endpoints(deployed: Deployed) -> list[str]:
    """Storage, registry and both sides of Batch have an address inside, and a name that leads there."""
    parts: dict[str, set[str]] = {}
    named = {one.name.split("/")[0] for one in _made(deployed, "Microsoft.Network/privateEndpoints/privateDnsZoneGroups")}
    wrong = []
    for one in _made(deployed, "Microsoft.Network/privateEndpoints"):
        for link in one.body["properties"]["privateLinkServiceConnections"]:
            parts.setdefault(link["properties"]["privateLinkServiceId"], set()).update(link["properties"]["groupIds"])
        if one.name not in named:
            wrong.append(f"{one}: no DNS zone leads to it")
    expected = {STORAGE: {"blob"}, REGISTRY: {"registry"}, BATCH: {"batchAccount", "nodeManagement"}}
    for kind, needed in expected.items():
        wrong += [
            f"{one}: lacks private endpoints {sorted(needed - parts.get(one.id, set()))}"
            for one in _made(deployed, kind)
            if needed - parts.get(one.id, set())
        ]
    return wrong


def pools(deployed: Deployed) -> list[str]:
    """They cost nothing while there is no work; drivers stay; image and agent fit."""
    wrong = []
    for one in _made(deployed, POOL):
        has = one.body["properties"]
        formula = has["scaleSettings"].get("autoScale", {}).get("formula", "")
        goal = re.findall(r"\$Target(Dedicated|LowPriority)Nodes = min\(\d+, max\((\d+), ", formula)
        if "fixedScale" in has["scaleSettings"] or len(goal) != 1 or "taskcompletion" not in formula:
            wrong.append(f"{one}: does not shrink to nothing after its tasks: {has['scaleSettings']}")
        elif one.name.endswith("/drivers") and goal[0][0] != "Dedicated":
            wrong.append(f"{one}: drivers on nodes that may be taken away")
        if one.name.endswith("/workers") and goal and goal[0][1] != "0":
            wrong.append(f"{one}: {goal[0][1]} GPU nodes stay without work")
        if one.name.endswith("/workers") and has["taskSlotsPerNode"] != 1:
            wrong.append(f"{one}: a worker takes a whole node, found {has['taskSlotsPerNode']} slots")
        machine = has["deploymentConfiguration"]["virtualMachineConfiguration"]
        release = machine["imageReference"]["sku"][:4]
        if machine["nodeAgentSkuId"] != f"batch.node.ubuntu {release[:2]}.{release[2:]}":
            wrong.append(f"{one}: image {machine['imageReference']['sku']} with agent {machine['nodeAgentSkuId']}")
        if not has.get("startTask", {}).get("waitForSuccess"):
            wrong.append(f"{one}: takes work before its disk is there")
    return wrong


def documented(template: Template) -> list[str]:
    """A file says what it is for, and so does each of its parameters and outputs."""
    wrong = []
    if not any(node.type == "metadata_declaration" for node in template.root.named_children):
        wrong.append(f"{template.path.name}: has no metadata description")
    for one in template.of("param", "output"):
        text = bicep.literal(bicep.items(one.decorators["description"])[0]) if "description" in one.decorators else ""
        if len(text) < 8 or not text.endswith("."):
            wrong.append(f"{template.path.name}: {one.kind} {one.name} is described as {text!r}, expected a sentence")
    return wrong


def unused(template: Template) -> list[str]:
    """Parameters and variables that nothing asks for."""
    names = [text_of(node) for node in bicep.walk(template.root) if node.type == "identifier"]
    return [f"{template.path.name}: {one.kind} {one.name} is not used" for one in template.of("param", "var") if names.count(one.name) < 2]


def _made(deployed: Deployed, *types: str) -> list[Resource]:
    return [one for one in deployed.resources if one.type in types and not one.existing]


def _role(one: Resource) -> tuple[str, str]:
    role = one.body["properties"]["roleDefinitionId"].rsplit("/", 1)[-1]
    return ROLES.get(role, (role, ""))


def _pulls(registry: dict[str, Any]) -> str | None:
    named: str | None = registry.get("identityReference", {}).get("resourceId")
    return named


def _walk(deployed: Deployed, *types: str) -> Iterator[tuple[str, Any]]:
    for one in deployed.resources:
        if not types or one.type in types:
            yield from _leaves(str(one), one.body)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{path}[{index}]", inner)
