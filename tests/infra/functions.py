"""Bicep's functions, those that infra/ calls, and the place that templates are deployed to."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from tests.infra.bicep import BicepError
from tests.infra.bicep import Template

SUBSCRIPTION = "/subscriptions/00000000-0000-0000-0000-00000000cafe"
GROUP = f"{SUBSCRIPTION}/resourceGroups/tokenmill-tests"
TENANT = "00000000-0000-0000-0000-0000000000aa"


def known(template: Template, environment: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """By name, for one file: some depend on where it lies."""

    def read_environment_variable(name: str, default: str | None = None) -> str:
        value = environment.get(name, default)
        if value is None:
            raise BicepError(f"{template.path.name} needs the environment variable {name}")
        return value

    def load_text(path: str) -> str:
        return (template.path.parent / path).read_text()

    return {
        "base64": lambda text: base64.b64encode(text.encode()).decode(),
        "concat": lambda *lists: [one for part in lists for one in part],
        "contains": lambda whole, part: part in whole,
        "empty": lambda value: not value,
        "environment": lambda: {"suffixes": {"storage": "core.windows.net", "acrLoginServer": ".azurecr.io"}},
        "guid": lambda *parts: str(uuid.uuid5(uuid.NAMESPACE_URL, "-".join(parts))),
        "loadTextContent": load_text,
        "readEnvironmentVariable": read_environment_variable,
        "replace": lambda text, old, new: text.replace(old, new),
        "resourceGroup": lambda: {"id": GROUP, "name": GROUP.split("/")[-1], "location": "westeurope"},
        "scope": lambda: SUBSCRIPTION if template.scope == "subscription" else GROUP,
        "string": to_string,
        "subscription": lambda: {"id": SUBSCRIPTION, "subscriptionId": SUBSCRIPTION.split("/")[-1]},
        "subscriptionResourceId": lambda kind, name: f"{SUBSCRIPTION}/providers/{kind}/{name}",
        "take": lambda value, count: value[:count],
        "tenant": lambda: {"tenantId": TENANT},
        "union": lambda first, *others: {key: value for one in (first, *others) for key, value in one.items()},
        "uniqueString": lambda *parts: base64.b32encode(hashlib.sha256("-".join(parts).encode()).digest()).decode().lower()[:13],
    }


def to_string(value: Any) -> str:
    """As interpolation and string() write it."""
    return value if isinstance(value, str) else json.dumps(value)
