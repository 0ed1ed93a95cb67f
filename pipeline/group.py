"""Group: nodes that hold one replica together, each a stage of the model's layers, where no single one holds it.

They meet in a folder of any store, by put-if-absent alone, as schedulers do in pipeline/rendezvous.py: a node takes the next free seat
of the newest group, `00000003-1.json`, and seat 0 leads. The others connect to their leader and hold that connection for as long as the
group lasts. It ends, for all of them, when any of these connections does: then each takes a seat of a newer group. So a group needs no
heartbeat, no lock and no clean-up, and a seat that a dead node left behind costs one attempt.

The connections carry no work. What engines say to each other is theirs, and is neither encrypted nor authenticated.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import ssl
import time
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from pipeline import storage
from schemas.errors import JobError

_NAME = re.compile(r"(\d{8})-(\d{1,3})\.json")
_MAX_LOST_RACES = 100
_REACH_S = 10.0
"""For a leader to answer a connection, or for who connected to say which seat is its."""
_ABSENT_S = 60.0
"""After which a leader gives up a group, one of whose seats was taken by somebody who does not come."""
_LOOK_S = 2.0
_AGAIN_S = 0.5
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Seconds, seconds, times: a machine that vanished without a word is noticed after 25 s."""


class GroupOver(Exception):
    """Another node of the group went away, or never came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """One node's place in a group."""

    group: int
    rank: int
    size: int
    """Nodes of the group."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"{self.group:08d}-{self.rank}.json"


@dataclass(kw_only=True, slots=True)
class Group:
    """A group that is complete, seen from one of its nodes."""

    seat: Seat
    leader: str
    """The leader's host, as the others reach it."""
    own: str
    """This node's host, as the leader reaches it."""
    port: int
    """On the leader, free a moment ago: where engines meet."""
    peers: dict[int, str]
    """Names of the other nodes, by rank; of followers, the leader's alone."""
    _links: list[socket.socket] = field(default_factory=list)

    def engine_options(self) -> dict[str, Any]:
        """vLLM's engine arguments for this place."""
        return {"nnodes": self.seat.size, "node_rank": self.seat.rank, "master_addr": self.leader, "master_port": self.port}

    def wait(self) -> None:
        """Until the group is over."""
        while not self.is_over(None):
            pass

    def is_over(self, timeout_s: float | None) -> bool:
        """Whether it is, or is so many seconds from now; with None, waits for the first sign, which may be none of its end."""
        return any(map(_over, select.select(self._links, [], [], timeout_s)[0]))

    def say_leaving(self) -> None:
        """To the leader, which then saves what is in flight before it ends the group."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(b"leaving\n")  # not a half-closed connection: TLS has none

    def close(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.close()


def next_seat(names: Iterable[str], size: int, above: int = 0) -> Seat:
    """The next free one of the newest group, or the first of a new one where that is full, or not above that number."""
    taken = [(int(match.group(1)), int(match.group(2))) for name in names if (match := _NAME.fullmatch(name))]
    newest = max((group for group, _ in taken), default=0)
    ranks = {rank for group, rank in taken if group == newest}
    free = min(set(range(size)) - ranks, default=None)
    if newest <= above or free is None:
        return Seat(group=max(newest, above) + 1, rank=0, size=size)
    return Seat(group=newest, rank=free, size=size)


def gather(
    uri: str,
    size: int,
    *,
    name: str,
    own_host: Callable[[], str],
    say: Callable[[str], None],
    server_tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext | None = None,
) -> Group:
    """Take a seat and wait for the others, in one group after the other until one is complete. What it waits for is told to `say`.

    `own_host` is this node's, as others of the cluster reach it. Raises JobError where the store cannot create once, or holds
    something else.
    """
    above = 0
    while True:
        try:
            own = own_host()
            with socket.create_server((own, 0), backlog=size) as server:
                seat = _take(uri, size, above, {"name": name, "host": own, "port": server.getsockname()[1]})
                above = seat.group
                if seat.leads:
                    return _lead(uri, seat, server, own, say, server_tls)
                return _follow(uri, seat, name, say, client_tls)
        except (GroupOver, OSError) as error:  # the store's, too, which may be back in a moment
            say(f"another group of nodes: {error}")
            time.sleep(_AGAIN_S)


def _take(uri: str, size: int, above: int, mine: dict[str, Any]) -> Seat:
    for _ in range(_MAX_LOST_RACES):
        seat = next_seat(storage.list_names(uri), size, above)
        where, entry = storage.join(uri, seat.name), json.dumps(mine).encode()
        try:
            storage.create_once(where, entry)
        except FileExistsError:  # somebody was quicker, or we were and did not hear it
            if storage.read_bytes(where) != entry:
                continue
        return seat
    raise OSError(f"{uri}: lost the race for {_MAX_LOST_RACES} seats; is something starting nodes in a loop?")


def _lead(uri: str, seat: Seat, server: socket.socket, own: str, say: Callable[[str], None], tls: ssl.SSLContext | None) -> Group:
    links: dict[int, socket.socket] = {}
    names: dict[int, str] = {}
    absent_since: dict[int, float] = {}
    told, next_look = 0, 0.0
    try:
        while len(links) < seat.size - 1:
            if told != len(links) + 1:
                told = len(links) + 1
                say(f"nodes: {told} of {seat.size} of group {seat.group} are there")
            readable, _, _ = select.select([server, *links.values()], [], [], _LOOK_S)
            if any(link in readable and _over(link) for link in links.values()):
                raise GroupOver("a node left before all were there")
            if server in readable and (came := _welcome(server, seat, tls, links)) is not None:
                rank, link, peer = came
                links[rank], names[rank] = link, peer
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _LOOK_S
                with contextlib.suppress(OSError):  # it is looked at again
                    _check_absent(storage.list_names(uri), seat, links, absent_since, now)
        with socket.create_server((own, 0)) as free:
            port = free.getsockname()[1]
        for link in links.values():
            link.sendall(json.dumps({"port": port}).encode() + b"\n")
    except BaseException:
        for link in links.values():
            link.close()
        raise
    return Group(seat=seat, leader=own, own=own, port=port, peers=names, _links=list(links.values()))


def _welcome(
    server: socket.socket, seat: Seat, tls: ssl.SSLContext | None, links: dict[int, socket.socket]
) -> tuple[int, socket.socket, str] | None:
    """Who connected, if it has a seat of this group; a stranger, or somebody who says nothing, is sent away."""
    link, _ = server.accept()
    try:
        link.settimeout(_REACH_S)
        if tls is not None:
            link = tls.wrap_socket(link, server_side=True)
        said = json.loads(_line(link))
        rank = said["rank"]
        if (said["group"], said["size"]) != (seat.group, seat.size) or rank in links or rank not in range(1, seat.size):
            raise ValueError(f"not a seat that is free here: {said}")
        name = str(said["name"])
        link.sendall(b"welcome\n")
    except (GroupOver, OSError, ValueError, KeyError, TypeError):
        link.close()
        return None
    _hold(link)
    return rank, link, name


def _check_absent(names: Iterable[str], seat: Seat, links: dict[int, socket.socket], since: dict[int, float], now: float) -> None:
    """Raises GroupOver where a seat was taken long ago and nobody came from it."""
    taken = {int(match.group(2)) for one in names if (match := _NAME.fullmatch(one)) and int(match.group(1)) == seat.group}
    for rank in taken - {seat.rank} - set(links):
        if now - since.setdefault(rank, now) > _ABSENT_S:
            raise GroupOver(f"whoever took seat {rank} of group {seat.group} did not come within {_ABSENT_S:.0f} s")


def _follow(uri: str, seat: Seat, name: str, say: Callable[[str], None], tls: ssl.SSLContext | None) -> Group:
    where = storage.join(uri, Seat(group=seat.group, rank=0, size=seat.size).name)
    try:
        led = json.loads(storage.read_bytes(where))
        host, port, leader = str(led["host"]), int(led["port"]), str(led["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{where} is no seat of this version: {type(error).__name__}: {error}; remove it, or name another folder") from None
    link = socket.create_connection((host, port), _REACH_S)
    try:
        if tls is not None:
            link = tls.wrap_socket(link)
        said = {"group": seat.group, "rank": seat.rank, "size": seat.size, "name": name}
        link.sendall(json.dumps(said).encode() + b"\n")
        if _line(link) != b"welcome\n":
            raise GroupOver(f"somebody else answers where {leader} was")
        own = link.getsockname()[0]
        say(f"nodes: number {seat.rank} of group {seat.group}, which {leader} leads")
        _hold(link)
        told = json.loads(_line(link))
    except ValueError as error:
        link.close()
        raise GroupOver(f"{leader} says no sense: {error}") from None
    except BaseException:
        link.close()
        raise
    return Group(seat=seat, leader=host, own=own, port=int(told["port"]), peers={0: leader}, _links=[link])


def _line(link: socket.socket) -> bytes:
    """Byte by byte: what comes after it is another's to read. Raises GroupOver where the connection ends before it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        if not byte or len(line) > 1000:
            raise GroupOver("the connection to another node ended")
        line += byte
    return line


def _over(link: socket.socket) -> bool:
    """Whether a connection on which something came has ended, or its other end says that it leaves."""
    link.setblocking(False)
    try:
        link.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return False  # TLS's own messages
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            link.setblocking(True)
    return True


def _hold(link: socket.socket) -> None:
    """For as long as the group lasts, without a word."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # Linux's names
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
