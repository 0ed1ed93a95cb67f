"""Hosts that lose sight of each other, over TLS and a real blob service: nothing lost, nothing doubled, no engine loaded twice.

Each host is a network namespace: `control` has driver and scheduler, `spare` is where they come back, three hosts have a worker
each, `store` has Azurite. The engine is simulated at a low rate, so that there is time to cut. The workers live through all
tests; each test is a job of its own.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from distributed import Client

from jobs.verify import verify
from pipeline import rendezvous
from pipeline import storage
from pipeline import tls
from pipeline.commit import read_report
from pipeline.worker import registration
from pipeline.worker import replica_metrics
from schemas.manifest import UnitReport
from tests import azurite
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.chaos.namespaces import Host
from tests.chaos.namespaces import Network
from tests.chaos.namespaces import Process
from tests.chaos.namespaces import inside
from tests.chaos.namespaces import network
from tests.commands import TOKENMILL
from tests.conftest import build_tiny_model

pytestmark = [pytest.mark.chaos, pytest.mark.azurite, pytest.mark.long]

_PATIENCE_S = 180.0
_OPTIONS = {"decode_tokens_per_s": 240, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5, "lengths": "max"}
_UNIT_ROWS = 16
"""Of a table of fewer than 512 rows. A unit of 160 tokens a row takes a replica 11 s, and twice that beside another one."""
_WORKERS = ("one", "two", "three")
_ENVIRONMENT = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "11s",  # Dask's least; a silent peer counts as gone after so long
    "PYTHONUNBUFFERED": "1",
}
_CUT_S = 6.0
_HEARD_S = 2.0
"""By then a worker has told its scheduler how it fares: it does so once a second or oftener."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One replica, as its scheduler knows it."""

    pid: int
    rows: int
    """Finished since its engine came up."""
    in_flight: int
    """Units."""


class Site:
    """The network, what runs on it, and where results go. Its processes are ended with the network."""

    def __init__(self, net: Network, folder: Path, container: str, model: Path) -> None:
        self.net, self.folder, self.model = net, folder, model
        self.uri, self.place = f"az://{container}", f"az://{container}/cluster"
        self.keys = str(tls.make_keys(folder / "keys", valid_days=1).folder)
        self.workers = {name: self._start(self.hosts[name], *self._worker(name)) for name in _WORKERS}

    @property
    def hosts(self) -> Mapping[str, Host]:
        return self.net.hosts

    def scheduler_on(self, host: Host) -> Process:
        listen = f"tls://{host.address}:8786"
        command = ("scheduler", "--listen", listen, "--keys", self.keys, "--rendezvous", self.place, "--dashboard", "none")
        started = self._start(host, *command)
        wait_for(lambda: f"scheduler at {listen}" in started.log, "the scheduler", started)
        return started

    def members(self) -> dict[str, Member]:
        """By name, once they are at rest: a second copy of a unit may outlive its job, and what they say comes with a heartbeat."""
        seen: list[dict[str, Member]] = []

        def at_rest() -> bool:
            seen.append(self.look())
            return len(seen) > 1 and seen[-1] == seen[-2] and not any(member.in_flight for member in seen[-1].values())

        wait_for(at_rest, "workers at rest", every_s=_HEARD_S)
        return seen[-1]

    def look(self) -> dict[str, Member]:
        """By name, as they are at this moment."""
        entry = rendezvous.look_up(self.place)
        assert entry is not None
        with Client(entry.address, security=tls.security(self.keys), set_as_default=False, timeout=10) as client:
            workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
        found = {}
        for info in workers.values():
            said = registration(info)
            assert said is not None
            counters = replica_metrics(info)
            found[str(info["name"])] = Member(pid=said["pid"], rows=counters["rows"], in_flight=counters["in_flight"])
        return found

    def all_are_members(self) -> bool:
        return set(self.look()) == {f"{name}-0" for name in _WORKERS}

    def _start(self, host: Host, *arguments: str) -> Process:
        return host.start(TOKENMILL, *arguments, cwd=self.folder, environment=_ENVIRONMENT)

    def _worker(self, name: str) -> list[str]:
        options = [word for key, value in _OPTIONS.items() for word in ("--set", f"engine.options.{key}={value}")]
        where = ["--rendezvous", self.place, "--keys", self.keys, "--name", name, "--replicas", "1"]
        return ["worker", "--model", str(self.model), "--engine", "simulated", *where, *options]


class Job:
    """One job at a site, and what is known of its parts over time."""

    def __init__(self, site: Site, name: str, units: int, max_tokens: int) -> None:
        self.site, self.rows = site, units * _UNIT_ROWS
        self.folder, self.out = site.folder / name, f"{site.uri}/{name}"
        self.input = str(self.folder / "in" / "prompts.parquet")
        (self.folder / "in").mkdir(parents=True)
        table = {"id": list(range(self.rows)), "prompt": [f"question {row}" for row in range(self.rows)]}
        pq.write_table(pa.table(table), self.input, row_group_size=_UNIT_ROWS)
        data = {
            "name": name,
            "model": str(site.model),
            "input": {"uri": self.input, "prompt": "prompt"},
            "output": {"uri": self.out},
            "sampling": {"max_tokens": max_tokens},
            "engine": {"kind": "simulated", "options": _OPTIONS},
            "cluster": {"kind": "address", "rendezvous": site.place, "keys": site.keys},
        }
        (self.folder / "job.yaml").write_text(yaml.safe_dump(data))
        self.history = History(self.out)

    def run_on(self, host: Host) -> Process:
        return host.start(TOKENMILL, "run", "job.yaml", cwd=self.folder, environment=_ENVIRONMENT)

    def wait_for_flight(self, process: Process) -> None:
        """Until the driver says that units are in flight."""
        wait_for(lambda: re.search(r"\([1-9]\d* in flight\)", process.log), "units in flight", process)

    def wait_for_a_part(self, process: Process) -> None:
        """One more than there are."""
        goal = self.history.parts + 1
        wait_for(lambda: self.history.parts >= goal, f"{goal} parts", process)

    def late_commit_of(self, replica: str, since: float) -> bool:
        """Whether it committed a unit after a moment (Unix seconds)."""
        return any(report.worker == replica and report.finished_at > since for report in self.reports())

    def reports(self) -> list[UnitReport]:
        return [read_report(storage.join(self.out, name)) for name in storage.list_names(self.out) if name.startswith("part-")]

    def prove(self) -> None:
        verdict = verify(self.out)
        assert (verdict.problems, verdict.complete) == ([], True)
        found = check(self.input, self.out)
        assert found.fine, found.describe()
        assert found.rows_out == found.completions == self.rows
        assert self.history.fine, self.history.describe()


def wait_for(condition: Callable[[], Any], what: str, process: Process | None = None, *, every_s: float = 0.1) -> None:
    """Fails where the process ends before, or patience does."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        log = process.log if process else ""
        assert process is None or process.running or condition(), f"it ended before {what}:\n{log}"
        assert time.monotonic() < deadline, f"waited in vain for {what}:\n{log}"
        time.sleep(every_s)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = azurite.why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        net = stack.enter_context(network("control", "spare", "store", *_WORKERS))
        with inside(net.hosts["store"]):
            service = stack.enter_context(azurite.running(host=net.hosts["store"].address))
        patch.setenv(azurite.CONNECTION_STRING, service.connection_string)
        made = Site(net, folder, service.new_container(), build_tiny_model(folder / "model"))
        yield made


@pytest.fixture(scope="module")
def control(site: Site) -> dict[str, Process]:
    """The scheduler that runs on the control host; tests that end it put its successor there."""
    return {"scheduler": site.scheduler_on(site.hosts["control"])}


@pytest.fixture
def members(site: Site, control: dict[str, Process]) -> dict[str, Member]:
    """Every worker, as it is before a test."""
    wait_for(site.all_are_members, "three members")
    return site.members()


def pids(members: Mapping[str, Member]) -> dict[str, int]:
    """A replica's process is the same one only if its engine is."""
    return {name: member.pid for name, member in members.items()}


def repeated_rows(job: Job, before: Mapping[str, Member], after: Mapping[str, Member]) -> int:
    """Generated more than once, as the engines count."""
    return sum(member.rows for member in after.values()) - sum(member.rows for member in before.values()) - job.rows


def tell(what: str, job: Job, repeated: int, **seconds: float) -> None:
    """The figures, for whoever reads them (pytest -rP)."""
    times = ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in seconds.items())
    units = f"{repeated / _UNIT_ROWS:.1f} of {job.rows // _UNIT_ROWS} units generated again"
    print(f"{what}: {times}; {units}; 0 lost, 0 doubled")


def test_a_worker_host_cut_off_from_the_scheduler_only(site: Site, members: dict[str, Member]) -> None:
    """Storage stays in its sight: it commits what it has in flight late, while others run the same units again."""
    job, lonely = Job(site, "cut-worker", units=9, max_tokens=160), site.hosts["three"]
    with job.history.watch():
        run = job.run_on(site.hosts["control"])
        job.wait_for_flight(run)
        cut_at = time.time()
        site.net.cut(site.hosts["control"], lonely)
        wait_for(lambda: "replica three-0 is gone" in run.log, "the driver's word that it is gone", run)
        noticed_at = time.time()
        wait_for(lambda: "lost tls://" in site.workers["three"].log, "the worker's word that it is alone", site.workers["three"])
        wait_for(lambda: job.late_commit_of("three-0", noticed_at), "a late commit", run)
        site.net.heal(site.hosts["control"], lonely)
        assert run.wait(_PATIENCE_S) == 0, run.log
        wait_for(site.all_are_members, "the worker's return")
    back = {int(unit) for unit in re.findall(r"unit (\d+) came back, again in", run.log)}
    assert back, run.log
    job.prove()
    after = site.members()
    assert pids(after) == pids(members)
    all_at = max(report.finished_at for report in job.reports() if report.unit in back)
    tell(
        "worker host cut off from the scheduler", job, repeated_rows(job, members, after),
        noticed_after=noticed_at - cut_at, all_its_units_committed_after=all_at - cut_at,
    )  # fmt: skip


def test_storage_cut_off_from_everybody(site: Site, members: dict[str, Member]) -> None:
    job = Job(site, "cut-storage", units=24, max_tokens=64)
    with job.history.watch():
        run = job.run_on(site.hosts["control"])
        job.wait_for_a_part(run)
        users = [site.hosts[name] for name in ("control", *_WORKERS)]
        for host in users:
            site.net.cut(site.hosts["store"], host)
        time.sleep(_CUT_S)
        for host in users:
            site.net.heal(site.hosts["store"], host)
        healed_at = time.monotonic()
        job.wait_for_a_part(run)
        first_s = time.monotonic() - healed_at
        assert run.wait(_PATIENCE_S) == 0, run.log
    job.prove()
    after = site.members()
    assert pids(after) == pids(members)
    repeated = repeated_rows(job, members, after)
    tell(f"storage cut off from everybody for {_CUT_S:.0f} s", job, repeated, first_commit_after_its_return=first_s)


def test_a_killed_scheduler_costs_no_engine_and_the_driver_goes_on(
    site: Site, control: dict[str, Process], members: dict[str, Member]
) -> None:
    job = Job(site, "kill-scheduler", units=9, max_tokens=128)
    with job.history.watch():
        run = job.run_on(site.hosts["control"])
        job.wait_for_flight(run)
        killed_at = time.time()
        control["scheduler"].send(signal.SIGKILL)
        control["scheduler"].wait(_PATIENCE_S)
        wait_for(lambda: "lost the scheduler at" in run.log, "the driver's word that it is gone", run)
        control["scheduler"] = site.scheduler_on(site.hosts["control"])
        restarted_at = time.time()
        assert run.wait(_PATIENCE_S) == 0, run.log
        wait_for(site.all_are_members, "all workers' return")
    job.prove()
    after = site.members()
    assert pids(after) == pids(members)
    repeated = repeated_rows(job, members, after)
    doubled = run.log.count("is run a second time")  # of two copies of a unit that holds up the end one is in vain
    assert 0 <= repeated <= doubled * _UNIT_ROWS, run.log  # else every unit is sent to the replica that never stopped working on it
    first = min(report.finished_at for report in job.reports() if report.finished_at > restarted_at)
    up_s, first_s = restarted_at - killed_at, first - killed_at
    tell("scheduler killed", job, repeated, new_one_up_after=up_s, first_commit_then_after=first_s)


def test_the_host_of_driver_and_scheduler_dies_and_another_takes_over(
    site: Site, control: dict[str, Process], members: dict[str, Member]
) -> None:
    job = Job(site, "kill-host", units=18, max_tokens=160)  # more than are in flight, or nothing new would be left to begin
    with job.history.watch():
        first_run = job.run_on(site.hosts["control"])
        job.wait_for_flight(first_run)
        killed_at = time.time()
        site.hosts["control"].kill()
        first_run.wait(_PATIENCE_S)
        assert not verify(job.out).complete
        control["scheduler"] = site.scheduler_on(site.hosts["spare"])
        restarted_at = time.time()
        run = job.run_on(site.hosts["spare"])
        assert run.wait(_PATIENCE_S) == 0, run.log
        wait_for(site.all_are_members, "all workers' return")
    job.prove()
    after = site.members()
    assert pids(after) == pids(members)
    first = min(report.finished_at for report in job.reports() if report.started_at > restarted_at)
    repeated = repeated_rows(job, members, after)
    up_s, first_s = restarted_at - killed_at, first - killed_at
    tell("host of driver and scheduler killed", job, repeated, new_scheduler_up_after=up_s, first_new_unit_committed_after=first_s)
