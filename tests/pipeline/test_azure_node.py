"""What the metadata service says, told by a server that plays it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.azure_node import describe
from pipeline.azure_node import this_azure_node
from pipeline.eviction import ENVIRONMENT_VARIABLE
from schemas.preflight import AzureNode

INSTANCE = {"name": "nd_3", "vmSize": "Standard_ND96isr_H100_v5", "priority": "Spot", "location": "eastus", "zone": "1", "vmId": "x"}


class _Service(BaseHTTPRequestHandler):
    """Answers for the instance; for events after as long as it is told, which is how a first call for them is."""

    events_after_s = 0.0
    silence = threading.Event()

    def do_GET(self) -> None:
        if "scheduledevents" in self.path:
            self.silence.wait(self.events_after_s)
        document: dict[str, Any] = {"Events": []} if "scheduledevents" in self.path else INSTANCE
        self.send_response(200 if self.headers.get("Metadata") == "true" else 400)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Service]]:
    _Service.events_after_s, _Service.silence = 0.0, threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, f"http://127.0.0.1:{server.server_port}")
    yield _Service
    _Service.silence.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_size_spot_place_and_events_are_told(service: type[_Service]) -> None:
    assert this_azure_node() == AzureNode(vm_size="Standard_ND96isr_H100_v5", priority="Spot", location="eastus", zone="1", events=())


def test_a_service_that_is_slow_with_events_costs_them_alone(service: type[_Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service.events_after_s = 60.0
    found = this_azure_node(timeout_s=2.0)
    assert found is not None
    assert (found.vm_size, found.events) == ("Standard_ND96isr_H100_v5", None)


@pytest.mark.parametrize("address", ["off", "http://127.0.0.1:1"])
def test_elsewhere_nothing_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, address)
    assert this_azure_node() is None


def test_events_of_other_machines_of_the_scale_set_are_not_ours() -> None:
    events = {
        "Events": [
            {"EventType": "Reboot", "Resources": ["nd_3"], "NotBefore": "Mon, 19 Sep 2026 18:29:47 GMT"},
            {"EventType": "Preempt", "Resources": ["nd_4"], "NotBefore": ""},
            {"EventType": "Freeze", "Resources": ["nd_4", "nd_3"], "NotBefore": ""},
        ]
    }
    assert describe(INSTANCE, events).events == ("Reboot not before Mon, 19 Sep 2026 18:29:47 GMT", "Freeze not before now")


@pytest.mark.parametrize("events", [None, [], {"Events": None}, {"Events": [3, {"Resources": None}]}])
def test_what_is_no_answer_is_taken_for_none(events: Any) -> None:
    assert describe({}, events).events in (None, ())
