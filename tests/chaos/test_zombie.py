"""A zombie: a real worker, frozen just before it creates a part, that wakes when another replica has committed the unit.

Its create comes late, finds the part there, and changes nothing. No time is waited for: a proxy between the worker and the store
holds the create, so that it is known where the worker stands.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.verify import verify
from pipeline import storage
from pipeline.commit import read_report
from schemas import layout
from schemas.ledger import RunAccount
from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.chaos.proxy import Fault
from tests.chaos.proxy import FaultyProxy
from tests.chaos.proxy import before
from tests.chaos.storm import overtaken_units
from tests.commands import Command
from tests.commands import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.azurite, pytest.mark.long, pytest.mark.timeout(900)]

_UNITS, _UNIT_ROWS = 6, 16
_ROWS = _UNITS * _UNIT_ROWS
_OPTIONS = {"decode_tokens_per_s": 150, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5, "lengths": "max"}
"""About half a second for a unit of 4 tokens a row: others are in mid-generation when one is at its commit."""


class Site:
    """One job, for any number of drivers, and what they leave in a container."""

    def __init__(self, folder: Path, model: Path, service: Azurite, container: str, proxy: FaultyProxy) -> None:
        self.proxy, self._folder, self._service = proxy, folder, service
        self.out, self.input = f"az://{container}/out", str(folder / "prompts.parquet")
        pq.write_table(pa.table({"id": list(range(_ROWS)), "prompt": [f"question {row}" for row in range(_ROWS)]}), self.input)
        data = {
            "model": str(model),
            "input": {"uri": self.input, "prompt": "prompt"},
            "output": {"uri": self.out},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": _OPTIONS},
            "cluster": {"kind": "local", "replicas": 1},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(data))
        self.started: list[Command] = []

    def run(self, *, through_proxy: bool) -> Command:
        service = self.proxy.service if through_proxy else self._service
        environment = {CONNECTION_STRING: service.connection_string}
        self.started.append(Command(self._folder, "run", "job.yaml", environment=environment))
        return self.started[-1]

    def attempts(self) -> dict[str, str]:
        """Whose each part is."""
        names = [name for name in storage.list_names(self.out) if name.startswith("part-")]
        return {name: read_report(storage.join(self.out, name)).attempt for name in names}

    def accounts(self) -> list[RunAccount]:
        """Of runs that came to their end."""
        folder = storage.join(self.out, layout.RUNS)
        names = [name for name in storage.list_names(folder) if not name.endswith(".last.json")]
        return [RunAccount.model_validate_json(storage.read_bytes(storage.join(folder, name))) for name in names]

    def overtaken(self) -> int:
        """Of the driver that spoke last, which found nothing done when it began."""
        return overtaken_units(json.loads(storage.read_bytes(storage.join(self.out, layout.STATUS))), done_at_start=0)

    @property
    def late(self) -> list[str]:
        """Parts that somebody behind the proxy wanted to create, and the store had them already."""
        return [name for name in self.proxy.found_there if name.startswith("part-")]


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path, azurite: Azurite, container: str) -> Iterator[Site]:
    """See Site; whatever still runs at the end is killed, frozen or not."""
    with before(azurite) as proxy:
        made = Site(tmp_path, tiny_model, azurite, container, proxy)
        yield made
        for command in made.started:
            command.kill()


def frozen_worker(command: Command) -> psutil.Process:
    """Its only replica, which does nothing any more."""
    found = []
    for process in command.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if "pipeline.worker" in process.cmdline() else []
    (worker,) = found
    worker.send_signal(signal.SIGSTOP)
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED, "the worker to stand still")
    return worker


@pytest.mark.parametrize(
    ("create", "fault"), [("on its way when the worker froze", None), ("sent anew by the worker when it woke", "reset_before")]
)
def test_a_worker_that_wakes_when_it_was_overtaken_finds_the_part_there_and_changes_nothing(
    site: Site, create: str, fault: Fault | None
) -> None:
    history = History(site.out)
    with history.watch():
        hold = site.proxy.hold("Put Blob", "/out/part-")
        first = site.run(through_proxy=True)
        first.wait_for("the create of a part", lambda: hold.request is not None)
        zombie = frozen_worker(first)
        frozen_at = time.monotonic()
        assert hold.request is not None
        part = hold.request.target.partition("?")[0].rsplit("/", 1)[-1]
        assert part not in site.attempts()

        second = site.run(through_proxy=False)
        assert second.end() == 0, second.log
        committed = site.attempts()
        assert len(committed) == _UNITS
        assert verify(site.out).complete

        assert site.late == []
        zombie.send_signal(signal.SIGCONT)
        hold.let_go(fault)
        slept_s = time.monotonic() - frozen_at
        assert first.end() == 0, first.log
    assert part in site.late
    assert site.attempts() == committed
    assert history.fine, history.describe()
    assert history.parts == _UNITS
    found = check(site.input, site.out)
    assert found.fine, found.describe()
    verdict = verify(site.out)
    assert (verdict.problems, verdict.complete) == ([], True)
    # The process that froze is the one that came late, and each unit counts for the run that committed it.
    accounts = site.accounts()
    assert [replica.processes for account in accounts for replica in account.replicas] == [1, 1]
    assert sum(account.units for account in accounts) == _UNITS
    overtaken = site.overtaken()
    assert overtaken >= 1
    print(
        f"\na create {create}, {slept_s:.1f} s late: {len(site.late)} creates found their part there, "
        f"{overtaken} of {_UNITS} units were overtaken; 0 lost, 0 doubled, 0 changed"
    )
