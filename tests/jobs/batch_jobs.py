"""A job for Azure Batch as data, whole, for tests."""

from __future__ import annotations

from typing import Any

IDENTITY = (
    "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/mill/providers/"
    "Microsoft.ManagedIdentity/userAssignedIdentities/mill-nodes"
)
CLIENT_ID = "00000000-0000-0000-0000-000000000002"


def batch_job(**sections: Any) -> dict[str, Any]:
    """Sections given as keyword arguments are merged in; None takes a value away."""
    data: dict[str, Any] = {
        "name": "night",
        "model": "az://models/llama-3.1-70b",
        "input": {"uri": "az://prompts/*.parquet", "prompt": "question"},
        "output": {"uri": "az://results/night"},
        "storage": {"account_name": "millstore"},
        "cluster": {
            "kind": "azure-batch",
            "endpoint": "https://mill.westeurope.batch.azure.com",
            "driver_pool": "driver",
            "worker_pool": "nd-h100",
            "nodes": 2,
            "image": "mill.azurecr.io/tokenmill:1.0",
            "identity": IDENTITY,
            "client_id": CLIENT_ID,
            "keys": "az://tokenmill-keys",
        },
    }
    for key, value in sections.items():
        merged = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
        data[key] = {name: each for name, each in merged.items() if each is not None} if isinstance(merged, dict) else merged
    return data
