"""What Azure's management SDKs know of a resource type, against what a template says: unknown keys and unheard-of values.

The SDKs' models are generated from the services' own descriptions, as the compiler's types are.
"""

from __future__ import annotations

import enum
import importlib
import re
from collections.abc import Iterator
from typing import Any

from tests.infra.deployment import Resource

MODELS = {
    "Microsoft.Batch/batchAccounts": "batch.BatchAccountCreateParameters",
    "Microsoft.Batch/batchAccounts/pools": "batch.Pool",
    "Microsoft.Compute/virtualMachineScaleSets": "compute.VirtualMachineScaleSet",
    "Microsoft.ContainerRegistry/registries": "containerregistry.Registry",
    "Microsoft.KeyVault/vaults": "keyvault.VaultCreateOrUpdateParameters",
    "Microsoft.Network/natGateways": "network.NatGateway",
    "Microsoft.Network/networkSecurityGroups": "network.NetworkSecurityGroup",
    "Microsoft.Network/privateDnsZones": "privatedns.PrivateZone",
    "Microsoft.Network/privateDnsZones/virtualNetworkLinks": "privatedns.VirtualNetworkLink",
    "Microsoft.Network/privateEndpoints": "network.PrivateEndpoint",
    "Microsoft.Network/privateEndpoints/privateDnsZoneGroups": "network.PrivateDnsZoneGroup",
    "Microsoft.Network/publicIPAddresses": "network.PublicIPAddress",
    "Microsoft.Network/virtualNetworks": "network.VirtualNetwork",
    "Microsoft.OperationalInsights/workspaces": "loganalytics.Workspace",
    "Microsoft.Storage/storageAccounts": "storage.StorageAccountCreateParameters",
    "Microsoft.Storage/storageAccounts/blobServices": "storage.BlobServiceProperties",
    "Microsoft.Storage/storageAccounts/blobServices/containers": "storage.BlobContainer",
    "Microsoft.Storage/storageAccounts/managementPolicies": "storage.ManagementPolicy",
}
KEYS: dict[str, dict[str, set[str]]] = {
    "Microsoft.Authorization/roleAssignments": {"properties": {"roleDefinitionId", "principalId", "principalType"}},
    "Microsoft.Insights/diagnosticSettings": {"properties": {"workspaceId", "logs", "metrics"}},
    "Microsoft.ManagedIdentity/userAssignedIdentities": {"location": set(), "tags": set()},
}
"""Of the types whose SDKs have older models: small enough to be written down."""


def unknown(resource: Resource) -> list[str]:
    """What the service would refuse, or silently not do."""
    if resource.type in KEYS:
        allowed = KEYS[resource.type]
        inner = [f"{resource}: properties.{key}" for key in resource.body.get("properties", {}) if key not in allowed["properties"]]
        return [f"{resource}: {key}" for key in resource.body if key not in allowed] + inner
    package, _, name = MODELS[resource.type].partition(".")
    models = importlib.import_module(f"azure.mgmt.{package}.models")
    return [f"{resource}: {problem}" for problem in _unknown(models, getattr(models, name)(resource.body), resource.body, "")]


def _unknown(models: Any, model: Any, said: dict[str, Any], path: str) -> Iterator[str]:
    fields = {one._rest_name: attribute for attribute, one in model._attr_to_rest_field.items()}
    for key, value in said.items():
        here = f"{path}.{key}" if path else key
        if key not in fields:
            yield f"{here} is not known to {type(model).__name__}, which knows {', '.join(fields)}"
            continue
        known = getattr(model, fields[key])
        yield from _of_enum(models, model, fields[key], value, here)
        pairs = zip(known, value, strict=True) if isinstance(known, list) else [(known, value)]
        for index, (inner, text) in enumerate(pairs):
            if hasattr(inner, "_attr_to_rest_field"):
                yield from _unknown(models, inner, text, f"{here}[{index}]" if isinstance(known, list) else here)


def _of_enum(models: Any, model: Any, attribute: str, value: Any, here: str) -> Iterator[str]:
    """Azure's enumerations are open in the models; a template means one of the known values all the same."""
    hints = {key: hint for one in reversed(type(model).__mro__) for key, hint in getattr(one, "__annotations__", {}).items()}
    for name in re.findall(r"_models\.(\w+)", str(hints.get(attribute, ""))):
        kind = getattr(models, name, None)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            known = [one.value for one in kind]
            for text in value if isinstance(value, list) else [value]:
                if text not in known:
                    yield f"{here} is {text!r}, known are {known}"
