"""`tokenmill scheduler`: what it refuses, where it listens, whom it tells, and how it ends."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from click.testing import CliRunner
from distributed import Client

from jobs.cli import main
from jobs.scheduler import SCHEDULER_CONFIG
from jobs.scheduler import SchedulerSpec
from pipeline import rendezvous
from pipeline import tls
from schemas.errors import JobError
from tests.commands import Command
from tests.commands import listening

StartScheduler = Callable[..., Command]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    return str(tls.make_keys(tmp_path / "keys", valid_days=1).folder)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartScheduler]:
    """Starts schedulers on a free port of the loopback interface, and ends what is left of them."""
    started: list[Command] = []

    def make(*arguments: str) -> Command:
        started.append(Command(tmp_path / "logs", "scheduler", "--listen", "tls://127.0.0.1:0", "--dashboard", "none", *arguments))
        return started[-1]

    yield make
    for command in started:
        command.kill()


def address_of(command: Command) -> str:
    command.wait_for("scheduler at ")
    (address,) = re.findall(r"^scheduler at (\S+)", command.log, re.MULTILINE)
    assert isinstance(address, str)
    return address


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "--listen: no keys"),
        ({"listen": "tcp://0.0.0.0:8786"}, "--listen: no keys"),
        ({"listen": "tcp://0.0.0.0:8786", "keys": "k"}, "--listen: found 'tcp://0.0.0.0:8786', which is not encrypted"),
        ({"listen": "0.0.0.0:8786", "keys": "k"}, "--listen: found '0.0.0.0:8786', expected tls://HOST:PORT"),
        ({"keys": "k", "dashboard": "0.0.0.0:8787"}, "asks for no password.*ssh -L"),
        ({"keys": "k", "dashboard": ":8787"}, "asks for no password"),
        ({"keys": "rv/k", "rendezvous": "rv"}, "lie in one another"),
    ],
)
def test_what_is_not_safe_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(JobError, match=message):
        SchedulerSpec(**fields)  # type: ignore[arg-type]


def test_tcp_has_to_be_asked_for() -> None:
    assert SchedulerSpec(listen="tcp://127.0.0.1:0", insecure=True).insecure
    refused = CliRunner().invoke(main, ["scheduler", "--listen", "tcp://127.0.0.1:0"])
    assert refused.exit_code == 2
    assert "--insecure" in refused.output


def test_missing_keys_are_told_before_anything_listens(tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["scheduler", "--keys", str(tmp_path / "nothing")])
    assert refused.exit_code == 2
    assert "make keys with `tokenmill keys" in refused.output


def test_every_configured_key_is_one_that_dask_knows() -> None:
    """A misspelt key would be ignored in silence."""
    unknown = object()
    assert [key for key in SCHEDULER_CONFIG if dask.config.get(key, default=unknown) is unknown] == []


@pytest.mark.chaos
def test_it_publishes_itself_listens_where_it_was_told_and_ends_on_sigterm(start: StartScheduler, keys: str, tmp_path: Path) -> None:
    place = str(tmp_path / "cluster")
    command = start("--keys", keys, "--rendezvous", place)
    address = address_of(command)
    entry = rendezvous.look_up(place)
    assert entry is not None
    assert (entry.number, entry.address) == (1, address)
    assert address.startswith("tls://127.0.0.1:")
    assert listening(command.family()) == {"127.0.0.1"}
    command.send(signal.SIGTERM)
    assert command.end() == 0
    assert "Traceback" not in command.log


@pytest.mark.chaos
def test_our_configuration_takes_effect_in_its_process(start: StartScheduler, keys: str) -> None:
    address = address_of(start("--keys", keys))
    with Client(address, security=tls.security(keys), set_as_default=False) as client:
        found = client.run_on_scheduler(
            lambda dask_scheduler: (dask_scheduler.allowed_failures, dask_scheduler.WORKER_SATURATION, dask_scheduler.UNKNOWN_TASK_DURATION)
        )
    assert found == (0, 1.0, 600.0)


@pytest.mark.chaos
def test_its_pages_show_no_logs_and_take_no_orders(tmp_path: Path, keys: str) -> None:
    command = Command(tmp_path / "logs", "scheduler", "--listen", "tls://127.0.0.1:0", "--keys", keys, "--dashboard", "127.0.0.1:0")
    try:
        command.wait_for("dashboard at ")
        (place,) = re.findall(r"^dashboard at (http://127\.0\.0\.1:\d+)/status, on this machine only", command.log, re.MULTILINE)
        assert listening(command.family()) == {"127.0.0.1"}

        def status(path: str) -> int:
            try:
                with urllib.request.urlopen(place + path, timeout=30) as answer:
                    code: int = answer.status
                    return code
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        open_pages = {path: status(path) for path in ("/health", "/status")}
        assert open_pages == {"/health": 200, "/status": 200}
        others = ["/info/main/workers.html", "/info/logs.html", "/json/identity.json", "/proxy/8787/127.0.0.1/status"]
        others.append("/api/v1/retire_workers")
        assert {status(path) for path in others} == {404}
    finally:
        command.kill()


@pytest.mark.chaos
def test_a_newer_scheduler_takes_its_place(start: StartScheduler, keys: str, tmp_path: Path) -> None:
    place = str(tmp_path / "cluster")
    first = start("--keys", keys, "--rendezvous", place)
    address_of(first)
    second = start("--keys", keys, "--rendezvous", place)
    address = address_of(second)
    assert first.end() == 1
    assert f"scheduler 2 at {address} took this one's place: ending" in first.log
    found = rendezvous.look_up(place)
    assert found is not None
    assert (found.number, found.address) == (2, address)


@pytest.mark.chaos
def test_a_port_that_is_taken_is_told(start: StartScheduler, keys: str, tmp_path: Path) -> None:
    address = address_of(start("--keys", keys))
    second = Command(tmp_path / "logs", "scheduler", "--listen", address, "--keys", keys, "--dashboard", "none")
    try:
        assert second.end() == 2
        assert f"tokenmill: --listen: cannot listen on {address}" in second.log
    finally:
        second.kill()


@pytest.mark.chaos
def test_a_store_that_takes_nothing_is_told(start: StartScheduler, keys: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(str(time.time()))
    command = start("--keys", keys, "--rendezvous", str(tmp_path / "file" / "cluster"))
    assert command.end() == 2
    assert "tokenmill: --rendezvous: cannot publish in" in command.log
    assert "Traceback" not in command.log
