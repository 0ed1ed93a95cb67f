"""A faulty HTTP proxy before a blob service: resets, errors, slow and cut answers, at random by seed or where it is told to.

A fault's place is named by operation, object and how often that was asked before, so that a seed means the same faults
whatever the threads do. It can also hold one request for as long as it is told to. It reads requests and answers whole; it knows
nothing of what they mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from typing import get_args
from urllib.parse import parse_qs
from urllib.parse import urlsplit

from tests.azurite import Azurite

Fault = Literal["reset_before", "reset_after", "error_before", "error_after", "busy", "slow", "truncated"]
"""before: nothing happened at the store; after: it did, and the client does not hear of it. busy: 503 with Retry-After."""
ALL_FAULTS: tuple[Fault, ...] = get_args(Fault)

_SLOW_S = 0.5
_UNIQUE = re.compile(r"^/[^/]*/[^/]*|[0-9a-f]{32}|(?<=-)[0-9a-f]{8}(?=\.)")
"""What differs between two runs of one test: account and container, unique names, a part's fingerprint (of etags, too)."""
_ERROR_BODY = b'<?xml version="1.0" encoding="utf-8"?><Error><Code>%s</Code><Message>injected</Message></Error>'
_IS_THERE = (409, 412)
"""How a store refuses to create what is there already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request, as far as a proxy needs it."""

    method: str
    target: str
    headers: dict[str, str]
    raw: bytes

    @property
    def operation(self) -> str:
        """As Azure's documentation calls it."""
        query = parse_qs(urlsplit(self.target).query)
        comp, restype = query.get("comp", [""])[0], query.get("restype", [""])[0]
        return {
            ("PUT", "", ""): "Put Blob",
            ("PUT", "block", ""): "Put Block",
            ("PUT", "blocklist", ""): "Put Block List",
            ("GET", "", ""): "Get Blob",
            ("HEAD", "", ""): "Get Blob Properties",
            ("DELETE", "", ""): "Delete Blob",
            ("GET", "list", "container"): "List Blobs",
        }.get((self.method, comp, restype), f"{self.method} {comp} {restype}".strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer, whole."""

    status: int
    head: bytes
    body: bytes


class Hold:
    """One request that is kept back: the first of its operation for an object with this in its name."""

    def __init__(self, loop: asyncio.AbstractEventLoop, operation: str, name: str) -> None:
        self._loop, self._operation, self._name = loop, operation, name
        self._freed = asyncio.Event()
        self._fault: Fault | None = None
        self.request: Request | None = None
        """Once it came."""

    def wants(self, request: Request) -> bool:
        return request.operation == self._operation and self._name in urlsplit(request.target).path

    def let_go(self, fault: Fault | None = None) -> None:
        """It goes on to the store, or meets this fault."""
        self._fault = fault
        self._loop.call_soon_threadsafe(self._freed.set)

    async def keep(self, request: Request) -> Fault | None:
        """Until it is let go; the fault that it then meets."""
        self.request = request
        await self._freed.wait()
        return self._fault


class FaultyProxy:
    """Runs in a thread of its own. Its methods are safe from every thread."""

    def __init__(self, service: Azurite) -> None:
        self._upstream = (service.host, service.port)
        self._lock = threading.Lock()
        self._told: list[tuple[str, Fault]] = []
        self._seed, self._rate, self._kinds, self._operations = 0, 0.0, ALL_FAULTS, frozenset[str]()
        self._asked: Counter[tuple[str, str]] = Counter()
        self.requests: Counter[str] = Counter()
        """By operation."""
        self.faults: Counter[str] = Counter()
        """Done, by kind."""
        self.seen: list[Request] = []
        self.found_there: list[str] = []
        """Names of objects that somebody wanted to create, and the store had them already."""
        self._hold: Hold | None = None
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.service = service.at(self._server.sockets[0].getsockname()[1])
        """The blob service as reached through this proxy."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._thread.start()

    def strike(self, operation: str, *faults: Fault) -> None:
        """The next requests of that operation meet these faults, one each."""
        with self._lock:
            self._told += [(operation, fault) for fault in faults]

    def harass(self, seed: int, rate: float, *, kinds: Iterable[Fault] = ALL_FAULTS, operations: Iterable[str] = ()) -> None:
        """From now on so many of all requests (0 to 1), or of these operations, meet a fault, which ones the seed says."""
        with self._lock:
            self._seed, self._rate, self._kinds, self._operations = seed, rate, tuple(kinds), frozenset(operations)
            self._asked.clear()

    def hold(self, operation: str, name: str) -> Hold:
        """The next request of that operation for an object with this in its name is kept back."""
        with self._lock:
            self._hold = Hold(self._loop, operation, name)
            return self._hold

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._rate, self._told = 0.0, []

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            mine = asyncio.current_task()
            others = [task for task in asyncio.all_tasks() if task is not mine]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _choose(self, request: Request) -> Fault | None:
        operation = request.operation
        with self._lock:
            self.requests[operation] += 1
            self.seen.append(request)
            for told in self._told:
                if told[0] == operation:
                    self._told.remove(told)
                    self.faults[told[1]] += 1
                    return told[1]
            if not self._rate or (self._operations and operation not in self._operations):
                return None
            name = _UNIQUE.sub("*", urlsplit(request.target).path)
            self._asked[operation, name] += 1
            dice = random.Random(f"{self._seed}/{operation}/{name}/{self._asked[operation, name]}")
            if dice.random() >= self._rate:
                return None
            fault = dice.choice(self._kinds)
            self.faults[fault] += 1
            return fault

    def _kept(self, request: Request) -> Hold | None:
        """The hold that wants this request."""
        with self._lock:
            hold = self._hold
            if hold is None or not hold.wants(request):
                return None
            self._hold = None
            return hold

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's connection, and one of its own to the service."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while (request := await _read_request(reader)) is not None:
                fault = self._choose(request)
                if (hold := self._kept(request)) is not None:
                    fault = await hold.keep(request)
                if fault == "reset_before":
                    _reset(writer)
                    return
                if fault in ("error_before", "busy"):
                    writer.write(_refusal(request, fault))
                    await writer.drain()
                    continue
                if upstream is not None and upstream[0].at_eof():  # the service closes connections that rest
                    upstream[1].close()
                    upstream = None
                if upstream is None:
                    upstream = await asyncio.open_connection(*self._upstream, limit=1 << 20)
                upstream[1].write(request.raw)
                await upstream[1].drain()
                answer = await _read_answer(upstream[0], request.method)
                if request.operation == "Put Blob" and answer.status in _IS_THERE:
                    self.found_there.append(urlsplit(request.target).path.rsplit("/", 1)[-1])
                if fault == "reset_after":
                    _reset(writer)
                    return
                if fault == "error_after":
                    writer.write(_refusal(request, fault))
                    await writer.drain()
                    continue
                if fault == "slow":
                    await asyncio.sleep(_SLOW_S)
                if fault == "truncated":
                    whole = answer.head + answer.body
                    writer.write(whole[: len(answer.head) + len(answer.body) // 2] if answer.body else whole[: len(whole) // 2])
                    await writer.drain()
                    return
                writer.write(answer.head + answer.body)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # either side went away
        finally:
            for end in (writer, upstream[1] if upstream else None):
                if end is not None:
                    with contextlib.suppress(OSError, RuntimeError):
                        end.close()


@contextmanager
def before(service: Azurite) -> Iterator[FaultyProxy]:
    """A proxy that lets everything through until it is told otherwise."""
    proxy = FaultyProxy(service)
    try:
        yield proxy
    finally:
        proxy.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """An RST, not a FIN."""
    end: socket.socket | None = writer.get_extra_info("socket")
    if end is not None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _refusal(request: Request, fault: Fault) -> bytes:
    status, code = ("503 Service Unavailable", b"ServerBusy") if fault == "busy" else ("500 Internal Server Error", b"InternalError")
    body = b"" if request.method == "HEAD" else _ERROR_BODY % code
    retry = "Retry-After: 1\r\n" if fault == "busy" else ""
    fields = f"x-ms-error-code: {code.decode()}\r\n{retry}Content-Type: application/xml\r\nContent-Length: {len(body)}"
    return f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + body


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes] | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    first, *lines = raw.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    return first, headers, raw


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while True:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            parts += [line, await reader.readexactly(size + 2)]
            if not size:
                return b"".join(parts)
    return await reader.readexactly(int(headers.get("content-length", 0)))


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    found = await _read_head(reader)
    if found is None:
        return None
    first, headers, raw = found
    method, target, _ = first.split(" ", 2)
    return Request(method=method, target=target, headers=headers, raw=raw + await _read_body(reader, headers))


async def _read_answer(reader: asyncio.StreamReader, method: str) -> Answer:
    found = await _read_head(reader)
    if found is None:
        raise ConnectionResetError("the service closed its connection")
    first, headers, raw = found
    status = int(first.split(" ")[1])
    empty = method == "HEAD" or status in (204, 304) or status < 200
    return Answer(status=status, head=raw, body=b"" if empty else await _read_body(reader, headers))
