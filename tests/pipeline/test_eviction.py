"""Azure's notice that this machine goes, a spot one or one of a scale set: among other events, from a service that comes and goes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.eviction import ENVIRONMENT_VARIABLE
from pipeline.eviction import EvictionWatch
from pipeline.eviction import ending_event
from pipeline.eviction import metadata_address
from pipeline.eviction import watch_evictions

PREEMPT = {"EventId": "A-1", "EventType": "Preempt", "ResourceType": "VirtualMachine", "Resources": ["nd_0", "nd_3"]}
REBOOT = {"EventId": "B-2", "EventType": "Reboot", "ResourceType": "VirtualMachine", "Resources": ["nd_0"]}
TERMINATE = {"EventId": "C-3", "EventType": "Terminate", "ResourceType": "VirtualMachine", "Resources": ["nd_0"], "NotBefore": ""}


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"DocumentIncarnation": 1, "Events": [REBOOT, PREEMPT]}, "A-1"),
        ({"Events": [REBOOT, TERMINATE]}, "C-3"),
        ({"Events": [{**TERMINATE, "Resources": ["nd_1"]}]}, None),
        ({"Events": [REBOOT]}, None),
        ({"Events": [{**PREEMPT, "Resources": ["nd_1"]}]}, None),
        ({"Events": [{**PREEMPT, "Resources": None}, "x", None]}, None),
        ({"Events": None}, None),
        ([], None),
        (None, None),
    ],
)
def test_only_an_event_that_ends_this_machine_counts(document: Any, found: str | None) -> None:
    assert ending_event(document, "nd_0") == found


class Service(ThreadingHTTPServer):
    """The metadata service: refuses at first, then says what it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusals, self.events, self.asked = 2, [REBOOT], 0


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        service = self.server
        service.asked += 1
        if self.headers.get("Metadata") != "true" or service.refusals:
            service.refusals -= 1
            self.send_error(503)
            return
        if service.asked > 6:
            service.events = [REBOOT, PREEMPT]
        body: Any = {"name": "nd_3"} if "/instance/" in self.path else {"DocumentIncarnation": 1, "Events": service.events}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_notice_is_heard_once_although_the_service_refused_at_first(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.eviction._POLL_S", 0.01)
    heard = threading.Event()
    watch = EvictionWatch(f"http://127.0.0.1:{service.server_port}", heard.set)
    assert heard.wait(30)
    watch.close()
    assert service.asked > 6


def test_nobody_is_asked_where_this_is_none_of_azures_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    assert metadata_address() is None
    assert watch_evictions(lambda: None) is None
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "http://127.0.0.1:9/")
    assert metadata_address() == "http://127.0.0.1:9"
