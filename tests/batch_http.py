"""The tests' Batch service over https on the loopback interface, with a certificate and an identity endpoint of its own."""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.parse import unquote
from urllib.parse import urlsplit

import trustme

from tests import batch_nodes
from tests.azurite import Azurite
from tests.batch_service import Refused
from tests.batch_service import Service


class _Handler(BaseHTTPRequestHandler):
    """Requests to Service. The class is made anew for each service."""

    service: Service
    protocol_version = "HTTP/1.1"

    def _answer(self, method: str) -> None:
        service = self.service
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        parts = urlsplit(self.path)
        service.requests.append((method, unquote(parts.path)))
        try:
            if parse_qs(parts.query).get("api-version") != ["2025-06-01"]:
                raise Refused(400, "InvalidQueryParameterValue", "api-version")
            if self.headers.get("Authorization") != f"Bearer {service.token}":
                raise Refused(401, "AuthenticationFailed", "Server failed to authenticate the request.")
            refused = service.refuse.get((method, unquote(parts.path)))
            if refused is not None:
                raise refused
            with service.lock:
                status, answer = route(service, method, [unquote(each) for each in parts.path.strip("/").split("/")], body)
        except Refused as error:
            status = error.status
            answer = {"code": error.code, "message": {"lang": "en-us", "value": f"{error.message}\nRequestId:1\nTime:2"}, "values": []}
        data = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response_only(status)
        self.send_header("Date", formatdate(time.time() + service.clock_ahead_s, usegmt=True))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(answer, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def log_message(self, *_: Any) -> None:
        return


def route(service: Service, method: str, path: list[str], body: dict[str, Any]) -> tuple[int, Any]:
    """Status and answer. Raises Refused."""
    match method, path:
        case "GET", ["pools", name]:
            if name not in service.pools:
                raise Refused(404, "PoolNotFound", "The specified pool does not exist.")
            return 200, service.pools[name].body()
        case "POST", ["jobs"]:
            service.create_job(body)
            return 201, None
        case "GET", ["jobs", name]:
            return 200, service.job(name).body()
        case "PATCH", ["jobs", name]:
            service.job(name).spec.update(body)
            return 200, None
        case "POST", ["jobs", name, "terminate"]:
            service.terminate_job(name, body.get("terminateReason", "UserTerminate"))
            return 202, None
        case "POST", ["jobs", name, "tasks", task, "terminate"]:
            service.terminate_task(name, task)
            return 204, None
        case "POST", ["jobs", name, "addtaskcollection"]:
            return 200, {"value": service.add_tasks(name, body["value"])}
        case "GET", ["jobs", name, "tasks"]:
            return 200, {"value": [task.body() for task in service.job(name).tasks.values()]}
        case "GET", ["jobs", name, "tasks", task, "files", file]:
            path_ = service.folder / service.job(name).id.replace(":", "-") / task / file
            if not path_.is_file():
                raise Refused(404, "FileNotFound", "The specified file does not exist.")
            return 200, path_.read_bytes()
        case "POST", ["jobschedules"]:
            service.create_schedule(body)
            return 201, None
        case "GET", ["jobschedules"]:
            return 200, {"value": [each.body() for each in service.schedules.values()]}
        case "GET", ["jobschedules", name]:
            return 200, service.schedule(name).body()
        case "POST", ["jobschedules", name, ("disable" | "enable") as verb]:
            service.schedule(name).state = "disabled" if verb == "disable" else "active"
            return 204, None
        case "DELETE", ["jobschedules", name]:
            service.delete_schedule(name)
            return 202, None
        case "GET", ["jobschedules", name, "jobs"]:
            return 200, {"value": [job.body() for job in service.jobs.values() if job.schedule == name]}
    raise Refused(405, "UnsupportedHttpVerb", f"{method} {path}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A running service and how to reach it."""

    service: Service
    endpoint: str
    environment: dict[str, str]
    """For processes that call it: whom to trust, and where to get a token."""


class _TokenHandler(BaseHTTPRequestHandler):
    """The identity endpoint that azure-identity asks on App Service; it is the one that can be anywhere."""

    service: Service
    secret: str

    def do_GET(self) -> None:
        right = self.headers.get("X-IDENTITY-HEADER") == self.secret
        said = {"access_token": self.service.token, "expires_on": str(int(time.time()) + 3600), "token_type": "Bearer", "resource": "batch"}
        data = json.dumps(said if right else {"error": "unauthorized"}).encode()
        self.send_response(200 if right else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def serving(folder: Path, azurite: Azurite) -> Iterator[Site]:
    """The service over https with a certificate of its own, until the block ends; all its tasks end with it."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    bundle = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    environment = {**batch_nodes.base_environment(), "AZURE_STORAGE_CONNECTION_STRING": azurite.connection_string}
    service = Service(folder / "nodes", azurite, environment)
    secret = secrets.token_hex(8)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    api = _server(_Handler, {"service": service})
    api.socket = context.wrap_socket(api.socket, server_side=True)
    tokens = _server(_TokenHandler, {"service": service, "secret": secret})
    environment |= {
        "REQUESTS_CA_BUNDLE": str(bundle),
        "IDENTITY_ENDPOINT": f"http://127.0.0.1:{tokens.server_port}/msi/token",
        "IDENTITY_HEADER": secret,
    }
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in (api, tokens)]
    for thread in threads:
        thread.start()
    try:
        yield Site(service=service, endpoint=f"https://127.0.0.1:{api.server_port}", environment=environment)
    finally:
        service.close()
        for server, thread in zip((api, tokens), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _server(handler: type[BaseHTTPRequestHandler], values: dict[str, Any]) -> ThreadingHTTPServer:
    made: Callable[..., Any] = type(handler.__name__, (handler,), values)
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)  # type: ignore[arg-type]
    server.daemon_threads = True
    return server
