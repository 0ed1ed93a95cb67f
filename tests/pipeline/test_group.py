"""Nodes that hold one replica together: how they meet, and that all of them hear when one is gone."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pipeline import group
from pipeline import storage
from pipeline.group import Group
from pipeline.group import Seat
from pipeline.group import gather
from pipeline.group import next_seat
from pipeline.tls import make_keys
from pipeline.tls import security
from schemas.errors import JobError
from tests.commands import PATIENCE_S
from tests.commands import wait_until


def seats(names: list[str], size: int = 2, above: int = 0) -> tuple[int, int]:
    seat = next_seat(names, size, above)
    return seat.group, seat.rank


def test_seats_are_taken_in_order_and_a_full_group_is_followed_by_another() -> None:
    assert seats([]) == (1, 0)
    assert seats(["00000001-0.json"]) == (1, 1)
    assert seats(["00000001-0.json", "00000001-1.json"]) == (2, 0)
    assert seats(["00000001-0.json", "00000001-1.json", "00000002-0.json"], size=3) == (2, 1)


def test_a_group_that_was_tried_is_not_tried_again_and_other_objects_do_not_matter() -> None:
    assert seats(["00000004-0.json"], above=4) == (5, 0)
    assert seats(["00000004-0.json", "00000005-0.json"], above=4) == (5, 1)
    assert seats(["rendezvous-00000009.json", "00000001-0.json.tmp", "1-0.json"]) == (1, 0)


class Nodes:
    """Each gathers in a thread of its own."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.said: dict[str, list[str]] = {}
        self._groups: list[Group] = []

    def start(self, name: str, size: int = 2, **more: Any) -> Future[Group]:
        future: Future[Group] = Future()
        said = self.said.setdefault(name, [])

        def meet() -> None:
            try:
                found = gather(self.uri, size, name=name, own_host=lambda: "127.0.0.1", say=said.append, **more)
            except BaseException as error:
                future.set_exception(error)
            else:
                self._groups.append(found)
                future.set_result(found)

        threading.Thread(target=meet, daemon=True).start()
        return future

    def waits(self, name: str, what: str) -> Callable[[], bool]:
        return lambda: any(what in line for line in self.said[name])

    def close(self) -> None:
        for one in self._groups:
            one.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(str(tmp_path / "groups"))
    yield made
    made.close()


def sent_away(port: int, words: bytes, context: ssl.SSLContext | None = None) -> bool:
    """Whether a leader ends the connection of one who says so."""
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as door, contextlib.ExitStack() as stack:
            talk = stack.enter_context(context.wrap_socket(door)) if context is not None else door
            talk.sendall(words)
            return talk.recv(1) == b""
    except (ConnectionResetError, BrokenPipeError, ssl.SSLError):
        return True


def ends(*groups: Group) -> None:
    """Within a moment."""
    for one in groups:
        thread = threading.Thread(target=one.wait, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"{one.seat} did not hear that its group is over"


def test_nodes_meet_each_with_a_place_of_its_own_and_the_leaders_address(nodes: Nodes) -> None:
    met = [future.result(PATIENCE_S) for future in [nodes.start(name, size=3) for name in ("a", "b", "c")]]
    assert sorted(one.seat.rank for one in met) == [0, 1, 2]
    leader = next(one for one in met if one.seat.leads)
    assert len({one.seat.group for one in met}) == 1
    assert {one.port for one in met} == {leader.port}
    assert sorted(leader.peers) == [1, 2]
    assert leader.engine_options() == {"nnodes": 3, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": leader.port}
    assert not any(one.is_over(0.1) for one in met)


def test_four_nodes_make_two_groups_of_two(nodes: Nodes) -> None:
    met = [future.result(PATIENCE_S) for future in [nodes.start(name) for name in "abcd"]]
    assert sorted((one.seat.group, one.seat.rank) for one in met) == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_when_one_node_goes_all_others_hear_of_it(nodes: Nodes, lost: int) -> None:
    met = sorted((future.result(PATIENCE_S) for future in [nodes.start(name, size=3) for name in "abc"]), key=lambda one: one.seat.rank)
    met[lost].close()
    if lost == 0:
        ends(met[1], met[2])
        return
    ends(met[0])
    met[0].close()  # what a leader then does
    ends(met[3 - lost])


def test_a_node_that_says_that_it_leaves_is_heard_before_it_is_gone(nodes: Nodes) -> None:
    met = sorted((future.result(PATIENCE_S) for future in [nodes.start(name) for name in "ab"]), key=lambda one: one.seat.rank)
    met[1].say_leaving()
    ends(met[0])
    assert not met[1].is_over(0.1)  # until the leader has saved its rows


def test_nodes_that_lost_one_another_meet_again_in_a_newer_group(nodes: Nodes) -> None:
    for one in [future.result(PATIENCE_S) for future in [nodes.start(name) for name in "ab"]]:
        one.close()
    met = [future.result(PATIENCE_S) for future in [nodes.start(name) for name in "ab"]]
    assert {one.seat.group for one in met} == {2}


def test_a_leader_that_died_while_it_waited_costs_who_comes_one_attempt(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    seat = Seat(group=1, rank=0, size=2)
    storage.create_once(storage.join(nodes.uri, seat.name), json.dumps({"name": "gone", "host": "127.0.0.1", "port": port}).encode())
    first = nodes.start("a")
    wait_until(nodes.waits("a", "1 of 2 of group 2"), "a group of its own")
    met = [first.result(PATIENCE_S) if name == "a" else nodes.start(name).result(PATIENCE_S) for name in ("b", "a")]
    assert {one.seat.group for one in met} == {2}
    assert "another group of nodes: " in nodes.said["a"][0]


def test_a_seat_whose_node_never_comes_ends_its_group(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_ABSENT_S", 0.5)
    monkeypatch.setattr(group, "_LOOK_S", 0.1)
    waiting = nodes.start("a")
    wait_until(nodes.waits("a", "1 of 2 of group 1"), "a group")
    storage.create_once(storage.join(nodes.uri, Seat(group=1, rank=1, size=2).name), b"{}")
    wait_until(nodes.waits("a", "1 of 2 of group 2"), "the next group")
    assert any("whoever took seat 1 of group 1 did not come" in line for line in nodes.said["a"])
    monkeypatch.setattr(group, "_ABSENT_S", 60.0)
    nodes.start("b").result(PATIENCE_S)
    assert waiting.result(PATIENCE_S).seat.group == 2


def test_strangers_at_a_leaders_door_are_sent_away(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_REACH_S", 1.0)
    waiting = nodes.start("a")
    wait_until(nodes.waits("a", "1 of 2 of group 1"), "a group")
    led = json.loads(Path(nodes.uri, "00000001-0.json").read_text())
    others_seat = b'{"group": 7, "rank": 1, "size": 2, "name": "x"}\n'
    no_seat = b'{"group": 1, "rank": 5, "size": 2, "name": "x"}\n'
    for words in (b"GET / HTTP/1.1\r\n\r\n", others_seat, no_seat, b"[]\n", b"", b"x" * 5000):
        assert sent_away(led["port"], words)
    monkeypatch.setattr(group, "_REACH_S", 10.0)
    nodes.start("b").result(PATIENCE_S)
    assert (waiting.result(PATIENCE_S).peers, waiting.result().seat.group) == ({1: "b"}, 1)


def test_with_keys_only_those_who_have_them_meet(nodes: Nodes, tmp_path: Path) -> None:
    def tls(folder: str) -> dict[str, Any]:
        made = security(str(make_keys(tmp_path / folder, valid_days=1).folder))
        return {
            "server_tls": made.get_listen_args("worker")["ssl_context"],
            "client_tls": made.get_connection_args("worker")["ssl_context"],
        }

    ours, others = tls("ours"), tls("others")
    waiting = nodes.start("a", **ours)
    wait_until(nodes.waits("a", "1 of 2 of group 1"), "a group")
    port = json.loads(Path(nodes.uri, "00000001-0.json").read_text())["port"]
    for context in (others["client_tls"], None):
        assert sent_away(port, b'{"group": 1, "rank": 1, "size": 2, "name": "x"}\n', context)
    assert nodes.start("b", **ours).result(PATIENCE_S).peers == {0: "a"}
    assert waiting.result(PATIENCE_S).peers == {1: "b"}
    assert not any(one.result().is_over(0.1) for one in [waiting])


def test_a_seat_that_is_none_is_named(nodes: Nodes) -> None:
    storage.create_once(storage.join(nodes.uri, "00000001-0.json"), b"[]")
    with pytest.raises(JobError, match=r"00000001-0\.json is no seat of this version: TypeError"):
        nodes.start("a").result(PATIENCE_S)
