"""Hears from Azure that this machine is about to be taken away. Polls the metadata service's scheduled events; knows no replica.

A spot machine gets a `Preempt` event at least 30 s before its end; one of a scale set that asks for it, and is not a spot one, gets
`Terminate` before it is deleted (5 minutes: infra/modules/scale-set.bicep). The first answer may take up to two minutes (that is how
the service is switched on), so polling starts with the process. Events name machines of the whole scale set: only our own counts.
Source: Azure's "Scheduled Events for Linux VMs", API version 2020-07-01, and "Terminate notification" of scale sets.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT_VARIABLE = "TOKENMILL_METADATA"
"""The metadata service's address, `off`, or by default Azure's own where this is one of Azure's machines."""

_AZURE = "http://169.254.169.254"
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"  # the chassis asset tag of every Azure virtual machine
_TAG_FILE = Path("/sys/class/dmi/id/chassis_asset_tag")
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
INSTANCE = "/metadata/instance/compute?api-version=2021-02-01"
_POLL_S = 1.0
_TIMEOUT_S = 150.0  # the first call switches the service on
_ENDS = ("Preempt", "Terminate")


def ending_event(document: Any, machine: str) -> str | None:
    """The id of the event that takes this machine away, if there is one."""
    events = document.get("Events") if isinstance(document, dict) else None
    for event in events if isinstance(events, list) else []:
        if isinstance(event, dict) and event.get("EventType") in _ENDS and machine in (event.get("Resources") or []):
            return str(event.get("EventId", ""))
    return None


def metadata_address() -> str | None:
    """Where to ask, or None where nobody would answer."""
    said = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if said == "auto":
        with contextlib.suppress(OSError):
            return _AZURE if _TAG_FILE.read_text().strip() == _AZURE_TAG else None
        return None
    return None if said == "off" else said.rstrip("/")


def ask_metadata(address: str, path: str, *, timeout_s: float = _TIMEOUT_S) -> Any:
    """The service's answer, or None where there is none."""
    request = urllib.request.Request(address + path, headers={"Metadata": "true"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the service answers this machine only, never a proxy
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


class EvictionWatch:
    """Calls `on_notice` once, from its own thread, when this machine is to go. A service that does not answer is asked again."""

    def __init__(self, address: str, on_notice: Callable[[], None]) -> None:
        self._address, self._on_notice = address, on_notice
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="scheduled-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Does not wait for a request that is under way."""
        self._ended.set()

    def _poll(self) -> None:
        machine = None
        while not self._ended.wait(_POLL_S):
            if machine is None:
                machine = (ask_metadata(self._address, INSTANCE) or {}).get("name")
            if machine is not None and ending_event(ask_metadata(self._address, EVENTS), machine) is not None:
                self._on_notice()
                return


def watch_evictions(on_notice: Callable[[], None]) -> EvictionWatch | None:
    """A watch over this machine, where there is somebody to ask."""
    address = metadata_address()
    return None if address is None else EvictionWatch(address, on_notice)
