"""Publishing and finding a scheduler: numbers only go up, whoever races, comes late or is not heard."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.rendezvous import Rendezvous
from pipeline.rendezvous import look_up
from pipeline.rendezvous import name_of
from pipeline.rendezvous import newest
from pipeline.rendezvous import publish
from pipeline.rendezvous import successor
from schemas.errors import JobError


@pytest.fixture(params=["local", "memory", pytest.param("azurite", marks=pytest.mark.azurite)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "cluster")
    elif request.param == "memory":
        yield "memory://rendezvous-test/cluster"
        fsspec.filesystem("memory").store.clear()
    else:
        yield f"az://{request.getfixturevalue('container')}/cluster"


def test_the_highest_number_counts_and_other_names_do_not() -> None:
    assert newest([]) == 0
    assert newest(["rendezvous-00000002.json", "rendezvous-00000010.json", "rendezvous-00000009.json"]) == 10
    assert newest(["job.json", "rendezvous-7.json", "rendezvous-00000099.json.tmp", "x-rendezvous-00000050.json"]) == 0


def test_nobody_has_published_yet(place: str) -> None:
    assert look_up(place) is None


def test_each_publisher_takes_the_next_number_and_readers_find_the_last(place: str) -> None:
    first = publish(place, "tls://10.0.0.4:8786", now=1.0)
    second = publish(place, "tls://10.0.0.5:8786", now=2.0)
    assert [first.number, second.number] == [1, 2]
    assert look_up(place) == second == Rendezvous(number=2, address="tls://10.0.0.5:8786", made_at=2.0)


def test_a_scheduler_knows_who_took_its_place(place: str) -> None:
    first = publish(place, "tls://10.0.0.4:8786", now=1.0)
    assert successor(place, first) is None
    second = publish(place, "tls://10.0.0.5:8786", now=2.0)
    assert successor(place, first) == second
    assert successor(place, second) is None


def test_of_many_that_publish_at_once_each_has_its_own_number(place: str) -> None:
    count = 12
    start = threading.Barrier(count)

    def one(index: int) -> Rendezvous:
        start.wait()
        return publish(place, f"tls://10.0.0.{index}:8786", now=float(index))

    with ThreadPoolExecutor(count) as pool:
        entries = list(pool.map(one, range(count)))
    assert sorted(entry.number for entry in entries) == list(range(1, count + 1))
    last = max(entries, key=lambda entry: entry.number)
    assert look_up(place) == last
    assert [successor(place, entry) for entry in entries if entry != last] == [last] * (count - 1)


def test_a_publisher_that_is_not_heard_takes_a_higher_number(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The create went well, and the store's retry, or its answer, says that the name is taken."""
    real, calls = storage.create_once, []

    def applied_but_refused(uri: str, data: bytes) -> None:
        real(uri, data)
        calls.append(uri)
        if len(calls) == 1:
            raise FileExistsError(uri)

    monkeypatch.setattr(storage, "create_once", applied_but_refused)
    mine = publish(place, "tls://10.0.0.4:8786", now=1.0)
    assert mine.number == 2
    assert look_up(place) == mine
    assert successor(place, mine) is None


def test_a_create_that_takes_effect_late_is_not_found_any_more(place: str) -> None:
    """A publisher's first try hangs in the network; it is dead, another took number 2, and then number 1 appears."""
    storage.create_once(storage.join(place, name_of(2)), json.dumps({"number": 2, "address": "tls://new:1", "made_at": 2.0}).encode())
    storage.create_once(storage.join(place, name_of(1)), json.dumps({"number": 1, "address": "tls://old:1", "made_at": 1.0}).encode())
    found = look_up(place)
    assert found is not None
    assert (found.number, found.address) == (2, "tls://new:1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[" * 100_000,
        b"[]",
        b'{"number": 3}',
        b'{"number": 4, "address": "tls://h:1", "made_at": 1}',
        b'{"number": 3, "address": 7, "made_at": 1}',
    ],
)
def test_an_object_that_is_not_ours_is_named(place: str, content: bytes) -> None:
    storage.create_once(storage.join(place, name_of(3)), content)
    with pytest.raises(JobError, match=r"rendezvous-00000003\.json.*remove it, or name another folder"):
        look_up(place)


def test_what_is_published_is_an_address_and_nothing_secret(place: str) -> None:
    publish(place, "tls://10.0.0.4:8786", now=1.0)
    assert list(storage.list_names(place)) == ["rendezvous-00000001.json"]
    stored = json.loads(storage.read_bytes(storage.join(place, name_of(1))))
    assert stored == {"number": 1, "address": "tls://10.0.0.4:8786", "made_at": 1.0}
