"""A machine of plan, run, crash, zombie, duplicate, lost acknowledgement, deletion and change, over memory://.

Hypothesis looks for an order of these in which a row is lost, or a committed part changes. After each step the set of committed
parts has only grown, but for the rule that deletes, and their bytes are what they were; `verify` says complete exactly where the
independent checker finds nothing and the job was closed. At the end everything is healed and run, and the rows are a bijection.

TOKENMILL_EXAMPLES=500 looks longer, TOKENMILL_SEED=1 elsewhere; each search prints its seed, by default another one each time.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import seed
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import run_state_machine_as_test

import pipeline.replica
from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from jobs.api import run
from jobs.verify import verify
from pipeline import storage
from pipeline.model import resolve_model
from pipeline.replica import Replica
from pipeline.segments import save_segment
from schemas import layout
from schemas.errors import ForeignOutput
from schemas.errors import InputChanged
from schemas.errors import JobError
from schemas.errors import UnitError
from schemas.job import JobSpec
from schemas.job import SimulatedOptions
from schemas.job import parse_job
from schemas.manifest import META_REPORT
from schemas.unit import WorkUnit
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.conftest import build_tiny_model

_OBJECTS, _ROWS_EACH = 2, 40
"""Five units, the third of which reads both objects."""
_OPTIONS = {"decode_tokens_per_s": 1e7, "prefill_tokens_per_s": 1e8}
_EXAMPLES = int(os.environ.get("TOKENMILL_EXAMPLES", "20"))
_SEED = int(os.environ.get("TOKENMILL_SEED", random.SystemRandom().randrange(10**6)))
_numbers = itertools.count()


class Crash(Exception):
    """A process that ends where it stands."""


class Job(RuleBasedStateMachine):
    """One output, several processes after and beside each other."""

    model: Path
    replica: Replica
    done: Counter[str]
    """Over all examples of a search."""

    @initialize()
    def begin(self) -> None:
        self.done["examples"] += 1
        self.fs = fsspec.filesystem("memory")
        self.root = f"/state-machine-{os.getpid()}-{next(_numbers)}"
        self.input_uri, self.out_uri = f"memory:/{self.root}/in", f"memory:/{self.root}/out"
        for number in range(_OBJECTS):
            self.write_object(number, "question")
        self.history = History(self.out_uri)
        self.accepted: Accepted | None = None
        self.zombies: list[tuple[str, bytes]] = []  # parts that processes which were taken for dead have still to create
        self.kept: dict[str, Any] = {}  # planned input objects whose place another one has

    # What a process does.

    @rule()
    def plan(self) -> None:
        """A driver comes up: accept, and store or find job and plan."""
        self.accepted = store(accept(self.job()))

    @precondition(lambda self: self.accepted is not None)
    @rule(count=st.integers(1, 3))
    def run_units(self, count: int) -> None:
        for unit in self.todo()[:count]:
            with self.only_if_changed(unit):
                assert self.attempt(unit)["outcome"] == "created"

    @precondition(lambda self: self.accepted is not None)
    @rule()
    def crash(self) -> None:
        """The driver is gone, with all it knew."""
        self.accepted = None

    @precondition(lambda self: self.accepted is not None)
    @rule(number=st.integers(0, 7))
    def freeze_before_the_commit(self, number: int) -> None:
        """An attempt stops just before it creates its part, and is taken for dead."""
        frozen = self.frozen_attempt(self.any_unit(number))
        if frozen is not None:
            self.zombies.append(frozen)

    @precondition(lambda self: self.accepted is not None and self.todo())
    @rule(number=st.integers(0, 7), rows=st.sets(st.integers(0, 15), max_size=8))
    def evict(self, number: int, rows: set[int]) -> None:
        """An attempt saves some finished rows, and is gone before its commit."""
        assert self.accepted is not None
        unit = self.todo()[number % len(self.todo())]
        frozen = self.frozen_attempt(unit)
        if frozen is None or not rows:
            return
        table = pq.read_table(io.BytesIO(frozen[1]))
        kept = table.select(table.column_names[2:]).take(sorted(rows)).combine_chunks().to_batches()[0]
        positions = [unit.position + row for row in sorted(rows)]
        fingerprint = self.accepted.record.fingerprint
        save_segment(unit, self.out_uri, fingerprint, positions=positions, rows=kept, begun={}, engine={})

    @precondition(lambda self: self.zombies)
    @rule(number=st.integers(0, 7))
    def wake_a_zombie(self, number: int) -> None:
        """Its create comes late, whoever was there before."""
        uri, data = self.zombies.pop(number % len(self.zombies))
        was_there = storage.exists(uri)
        try:
            storage.create_once(uri, data)
        except FileExistsError:
            assert was_there
        else:
            assert not was_there

    @precondition(lambda self: self.accepted is not None)
    @rule(number=st.integers(0, 7))
    def run_twice_at_once(self, number: int) -> None:
        """A second attempt that began before the first had committed."""
        unit = self.any_unit(number)
        was_there = storage.exists(self.part_of(unit))
        with self.blind(), self.only_if_changed(unit):
            assert self.attempt(unit)["outcome"] == ("race_lost" if was_there else "created")

    @precondition(lambda self: self.accepted is not None)
    @rule(number=st.integers(0, 7))
    def run_where_a_part_is(self, number: int) -> None:
        """What is there stays, and is not generated again."""
        unit = self.any_unit(number)
        if storage.exists(self.part_of(unit)):
            assert self.attempt(unit)["outcome"] == "already"

    @precondition(lambda self: self.accepted is not None and self.todo())
    @rule()
    def lose_an_acknowledgement(self) -> None:
        unit, create = self.todo()[0], storage.create_once

        def created_but_raised(uri: str, data: bytes, *how: Any) -> None:
            create(uri, data, *how)
            if "/part-" in uri:
                raise ConnectionResetError(errno.ECONNRESET, "reset by peer", uri)

        with mock.patch.object(storage, "create_once", created_but_raised), self.only_if_changed(unit):
            assert self.attempt(unit)["outcome"] == "acknowledgement_lost"

    @precondition(lambda self: self.accepted is not None and self.todo())
    @rule()
    def lose_a_create(self) -> None:
        unit, create = self.todo()[0], storage.create_once

        def refused(uri: str, data: bytes, *how: Any) -> None:
            if "/part-" in uri:
                raise OSError(errno.EBUSY, "the server is busy", uri)
            create(uri, data, *how)

        with mock.patch.object(storage, "create_once", refused), pytest.raises(UnitError):
            self.attempt(unit)

    @rule()
    def resume(self) -> None:
        """The same command again."""
        result = run(self.job(attempts=1), stream=io.StringIO())
        assert result.state == ("complete" if not result.failed else "failed")
        assert bool(result.failed) <= bool(self.kept)
        assert all("InputChanged" in reason for reason in result.failed.values())
        self.accepted = None

    @rule(change=st.sampled_from([{"sampling": {"max_tokens": 5}}, {"input": {"prompt": "again: {prompt}"}}, {"output": {"prefix": "x_"}}]))
    def ask_for_another_job(self, change: dict[str, dict[str, Any]]) -> None:
        """Refused once the output is begun, and changes nothing."""
        if not storage.exists(f"{self.out_uri}/{layout.JOB}"):
            return
        before = dict(self.fs.store)
        with pytest.raises(JobError, match="another job"):
            run(self.job(**change), stream=io.StringIO())
        assert {path: id(file) for path, file in self.fs.store.items()} == {path: id(file) for path, file in before.items()}

    # What others do to it.

    @rule(number=st.integers(0, 7))
    def delete_a_part(self, number: int) -> None:
        names = sorted(self.fs.glob(f"{self.root}/out/part-*.parquet"))
        if names:
            name = names[number % len(names)]
            self.fs.rm_file(name)
            self.history.forget(name.rsplit("/", 1)[-1])

    @precondition(lambda self: storage.exists(f"{self.out_uri}/{layout.PLAN}"))
    @rule(number=st.integers(0, _OBJECTS - 1))
    def change_an_object(self, number: int) -> None:
        path = f"{self.root}/in/{number}.parquet"
        if path not in self.kept:
            self.kept[path] = self.fs.store[path]
            self.write_object(number, "another question")

    @rule()
    def put_the_objects_back(self) -> None:
        self.fs.store.update(self.kept)
        self.kept.clear()

    # What has to hold.

    @invariant()
    def what_is_committed_stays(self) -> None:
        if hasattr(self, "history"):
            self.history.look()
            assert self.history.fine, self.history.describe()

    @invariant()
    def each_step_is_counted(self) -> None:
        """Called when it has begun, and after each event."""
        self.done["steps"] += 1

    @rule()
    def verify_agrees_with_the_checker(self) -> None:
        if not storage.exists(f"{self.out_uri}/{layout.PLAN}"):
            return
        found, verdict = check(self.input_uri, self.out_uri), verify(self.out_uri)
        closed = storage.exists(f"{self.out_uri}/{layout.SUCCESS}") and self.parts_are_the_manifests()
        changed = bool(self.kept)  # verify will not vouch for a row whose input is not the planned one; the checker cannot know
        assert verdict.complete == (found.fine and closed and not changed), f"{found.describe()}\n{verdict.problems}"

    def teardown(self) -> None:
        if not hasattr(self, "history"):
            return
        try:
            self.put_the_objects_back()
            result = run(self.job(), stream=io.StringIO())
            assert (result.state, result.failed) == ("complete", {})
            while self.zombies:
                self.wake_a_zombie(0)
            self.what_is_committed_stays()
            found = check(self.input_uri, self.out_uri)
            assert found.fine, found.describe()
            assert (found.rows_out, found.error_rows) == (_OBJECTS * _ROWS_EACH, 0)
            assert verify(self.out_uri).complete
            self.done["proven"] += 1
        finally:
            self.fs.rm(self.root, recursive=True)

    # Helpers.

    def write_object(self, number: int, word: str) -> None:
        ids = range(number * _ROWS_EACH, (number + 1) * _ROWS_EACH)
        with self.fs.open(f"{self.root}/in/{number}.parquet", "wb") as file:
            pq.write_table(pa.table({"id": list(ids), "prompt": [f"{word} {row}" for row in ids]}), file)

    def job(self, attempts: int = 3, **sections: dict[str, Any]) -> JobSpec:
        data: dict[str, Any] = {
            "model": str(self.model),
            "input": {"uri": self.input_uri, "prompt": "prompt"},
            "output": {"uri": self.out_uri},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": _OPTIONS},
            "cluster": {"kind": "inline"},
            "limits": {"attempts": attempts},
        }
        for key, value in sections.items():
            data[key] = {**data[key], **value}
        return parse_job(data)

    def parts_are_the_manifests(self) -> bool:
        """Not where a part was deleted once the job was closed, and made again by a driver that had come up before."""
        manifest = pq.read_table(io.BytesIO(self.fs.cat_file(f"{self.root}/out/{layout.MANIFEST}")))
        parts = [io.BytesIO(self.fs.cat_file(name)) for name in sorted(self.fs.glob(f"{self.root}/out/part-*.parquet"))]
        attempts = [json.loads(pq.read_metadata(part).metadata[META_REPORT])["attempt"] for part in parts]
        return bool(attempts == manifest["attempt"].to_pylist())

    def todo(self) -> list[WorkUnit]:
        """Units without a part now, whatever the driver believes."""
        assert self.accepted is not None
        return [unit for unit in self.accepted.plan.units if not storage.exists(self.part_of(unit))]

    def any_unit(self, number: int) -> WorkUnit:
        assert self.accepted is not None
        return self.accepted.plan.units[number % len(self.accepted.plan.units)]

    def part_of(self, unit: WorkUnit) -> str:
        assert self.accepted is not None
        return storage.join(self.out_uri, unit.part_name(self.accepted.record.fingerprint))

    def attempt(self, unit: WorkUnit) -> dict[str, Any]:
        assert self.accepted is not None
        return self.replica.run(self.out_uri, self.accepted.record.fingerprint, unit.to_dict())

    def frozen_attempt(self, unit: WorkUnit) -> tuple[str, bytes] | None:
        """The part that an attempt was about to create when it stopped; None where it did not come that far."""
        frozen: list[tuple[str, bytes]] = []
        create = storage.create_once

        def freeze(uri: str, data: bytes, *how: Any) -> None:
            if "/part-" not in uri:
                create(uri, data, *how)
                return
            frozen.append((uri, bytes(data)))
            raise Crash

        with self.blind(), mock.patch.object(storage, "create_once", freeze), contextlib.suppress(Crash, UnitError):
            self.attempt(unit)
        return frozen[0] if frozen else None

    @contextlib.contextmanager
    def blind(self) -> Iterator[None]:
        """As an attempt that looked before anybody had committed."""
        exists = storage.exists
        with mock.patch.object(storage, "exists", lambda uri: False if "/part-" in uri else exists(uri)):
            yield

    @contextlib.contextmanager
    def only_if_changed(self, unit: WorkUnit) -> Iterator[None]:
        """An attempt fails exactly where one of its objects is not the planned one."""
        changed = any(f"/{rows.uri.removeprefix('memory://').lstrip('/')}" in self.kept for rows in unit.ranges)
        with pytest.raises(InputChanged) if changed else contextlib.nullcontext():
            yield


@pytest.fixture(scope="module", autouse=True)
def replica() -> Iterator[None]:
    """One for all examples, as a node's replica serves one job after the other; the tokenizer is loaded once."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(pipeline.replica, "load_tokenizer", functools.cache(pipeline.replica.load_tokenizer))
        Job.model = build_tiny_model(Path(folder) / "model")
        options = SimulatedOptions(**_OPTIONS).model_dump()
        Job.replica = Replica(name="machine-0", model=resolve_model(str(Job.model)), kind="simulated", options=options)
        yield
        Job.replica.close()


def look(num_examples: int, *phases: Phase) -> None:
    """Let hypothesis search for an order of events that breaks something."""
    Job.done = Counter()
    try:
        run_state_machine_as_test(
            seed(_SEED)(Job),
            settings=settings(
                max_examples=num_examples,
                stateful_step_count=25,
                deadline=None,
                phases=phases or tuple(Phase),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        done = Job.done
        steps = done["steps"] - done["examples"]  # to begin is none
        print(f"\nseed {_SEED}: {done['examples']} examples of {steps} steps in all, {done['proven']} healed and proven complete")


@pytest.mark.slow
def test_no_order_of_events_loses_a_row() -> None:
    look(_EXAMPLES)
    assert Job.done["proven"] > 0


def overwrite(uri: str, data: bytes, *_: Any) -> None:
    """What `open(..., "wb")` does."""
    storage.replace(uri, data)


@pytest.mark.slow
def test_the_search_finds_a_store_that_lets_late_writers_overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the fence."""
    monkeypatch.setattr(storage, "probe", lambda *_: None)
    monkeypatch.setattr(storage, "create_once", overwrite)
    with pytest.raises(AssertionError):
        look(100, Phase.generate)


@pytest.mark.slow
def test_the_search_finds_a_commit_that_comes_short_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the bijection: a part whose last row is lost on its way into the store, with a report that fits."""
    create = storage.create_once

    def short(uri: str, data: bytes, *how: Any) -> None:
        if "/part-00000001" in uri:
            table = pq.read_table(io.BytesIO(data))
            buffer, meta = io.BytesIO(), table.schema.metadata
            report = {**json.loads(meta[b"tokenmill.report"]), "rows": table.num_rows - 1}
            meta = {**meta, b"tokenmill.report": json.dumps(report).encode()}
            pq.write_table(table.slice(0, table.num_rows - 1).replace_schema_metadata(meta), buffer)
            data = buffer.getvalue()
        create(uri, data, *how)

    monkeypatch.setattr(storage, "create_once", short)
    with pytest.raises((AssertionError, ForeignOutput)):
        look(20, Phase.generate)
