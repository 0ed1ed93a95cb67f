"""What Azure's instance metadata service says of this machine: size, spot, scheduled events. Elsewhere there is nobody to ask."""

from __future__ import annotations

from typing import Any

from pipeline.eviction import EVENTS
from pipeline.eviction import INSTANCE
from pipeline.eviction import ask_metadata
from pipeline.eviction import metadata_address
from schemas.preflight import AzureNode

_TIMEOUT_S = 2.0
"""The service answers in milliseconds, but for a first call for events, which switches them on and may take two minutes."""


def this_azure_node(*, timeout_s: float = _TIMEOUT_S) -> AzureNode | None:
    """None where this is none of Azure's machines, or the service does not answer."""
    address = metadata_address()
    instance = ask_metadata(address, INSTANCE, timeout_s=timeout_s) if address is not None else None
    if address is None or not isinstance(instance, dict):
        return None
    return describe(instance, ask_metadata(address, EVENTS, timeout_s=timeout_s))


def describe(instance: dict[str, Any], events: Any) -> AzureNode:
    """Of the service's two documents. Events name machines of the whole scale set: only this one's are kept."""
    words = {field: str(instance.get(key) or "") for field, key in _FIELDS.items()}
    listed = events.get("Events") if isinstance(events, dict) else None
    machine = instance.get("name")
    mine = None
    if isinstance(listed, list):
        own = [event for event in listed if isinstance(event, dict) and machine in (event.get("Resources") or [])]
        mine = tuple(f"{event.get('EventType', 'something')} not before {event.get('NotBefore') or 'now'}" for event in own)
    return AzureNode(**words, events=mine)


_FIELDS = {"vm_size": "vmSize", "priority": "priority", "location": "location", "zone": "zone"}
"""Ours to the service's. Source: "Azure Instance Metadata Service", API version 2021-02-01."""
