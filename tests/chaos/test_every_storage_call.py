"""Every storage call and every message of a small job fails once before and once after it took effect: one by one, and in pairs.

Whatever fails, a run completes or ends as the project says runs end, and the same run without faults completes: the
independent checker and `verify` both say so, and no part that was seen has changed.

On a local folder, on memory://, and with a smaller job on Azure Blob, as Azurite plays it.

Pairs are sampled; TOKENMILL_PAIRS=3000 takes so many (or `all`), TOKENMILL_BLOB_PAIRS the same on Azure Blob, TOKENMILL_SEED another
sample:

    TOKENMILL_PAIRS=1500 .venv/bin/pytest -s -q tests/chaos/test_every_storage_call.py --timeout 7200
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import jobs.driver
import pipeline.replica
from jobs.accept import Accepted
from jobs.accept import accept
from jobs.api import run
from jobs.cli import main
from jobs.cluster.cluster import Cluster
from jobs.verify import verify
from pipeline import storage
from pipeline.flight import Flight
from pipeline.flight import Tag
from pipeline.segments import record_death
from pipeline.segments import save_segment
from schemas.errors import TokenmillError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.unit import WorkUnit
from tests.azurite import Azurite
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.chaos.faults import COMPOSITE
from tests.chaos.faults import PURE
from tests.chaos.faults import Faults
from tests.chaos.faults import Injected
from tests.chaos.faults import Point
from tests.chaos.faults import store_calls

pytestmark = pytest.mark.chaos

_LOCAL_ROWS = (20, 20)
"""Rows of each input object. Forty rows: three units, one of which reads both objects."""
_BLOB_ROWS = (20,)
"""Two units. Each call is a request there, and each point a job or two."""
_SEED = int(os.environ.get("TOKENMILL_SEED", "20261125"))
_PAIRS = os.environ.get("TOKENMILL_PAIRS", "40")
_BLOB_PAIRS = os.environ.get("TOKENMILL_BLOB_PAIRS", "12")
_MAX_FAULTY_RUNS = 3
_ENDS = {"complete", "failed", "Injected", "JobError", "ForeignOutput", "UnitError"}
"""How a run may end whose store fails; nobody asks it to drain."""
_RARE = ("status.json", "control/")
"""Asked or told by the clock: how often says nothing about the run."""


@dataclass(slots=True)
class Figures:
    """What was done to one store."""

    points: int = 0
    fired: int = 0
    runs: int = 0
    ends: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        return f"{self.points} fault points armed, {self.fired} of them struck, in {self.runs} runs: {ends}"


class Rig:
    """One store, one small job, and the faults before it."""

    def __init__(
        self,
        root: str,
        model: Path,
        faults: Faults,
        *,
        rows: Iterable[int] = _LOCAL_ROWS,
        options: Mapping[str, Any] | None = None,
        cluster_of: Callable[[Accepted], Cluster] | None = None,
    ) -> None:
        """`rows`: of each input object; `options`: how fsspec reaches the store; `cluster_of`: as jobs.api.run has it."""
        self.root, self.faults, self._model, self._cluster_of = root, faults, model, cluster_of
        self._fs: Any = fsspec.core.url_to_fs(root, **(options or {"auto_mkdir": True}))[0]
        self.figures = Figures()
        self._begun: dict[str, bytes] = {}
        self.reset()
        first = 0
        for number, count in enumerate(rows):
            ids, first, data = range(first, first + count), first + count, io.BytesIO()
            pq.write_table(pa.table({"id": list(ids), "prompt": [f"question {row}" for row in ids]}), data)
            self._put(f"{root}/in/{number}.parquet", data.getvalue())

    @property
    def input_uri(self) -> str:
        return f"{self.root}/in"

    @property
    def out_uri(self) -> str:
        return f"{self.root}/out"

    @property
    def store(self) -> str:
        """For a line of figures."""
        return self.root.partition("://")[0] if "://" in self.root else "local"

    def job(self, **input_fields: Any) -> JobSpec:
        return parse_job(
            {
                "model": str(self._model),
                "input": {"uri": self.input_uri, "prompt": "prompt", **input_fields},
                "output": {"uri": self.out_uri},
                "sampling": {"max_tokens": 4},
                "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1e7, "prefill_tokens_per_s": 1e8}},
                "cluster": {"kind": "inline"},
            }
        )

    def reset(self) -> None:
        """The output as a strike begins: empty, or begun by a run that was evicted."""
        path = self._path(self.out_uri)
        if self.store == "az":  # has no folders, which adlfs would look for all the same
            for name in self._fs.find(path):
                self._fs.rm_file(name)
        elif self._fs.exists(path):
            self._fs.rm(path, recursive=True)
        for name, data in self._begun.items():
            self._put(f"{self.out_uri}/{name}", data)

    def _path(self, uri: str) -> str:
        return str(self._fs._strip_protocol(uri))

    def _put(self, uri: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(uri), data)

    def begin_with_segments(self, job: JobSpec) -> int:
        """From now on every strike begins where replicas were evicted and died: half of each unit's rows lie in segments.

        The rows are those of a real run. Returns how many lie there.
        """
        assert self._run(job) == "complete"
        accepted, saved = accept(job), 0
        fingerprint = accepted.record.fingerprint
        for unit in accepted.plan.units:
            table = pq.read_table(io.BytesIO(self._fs.cat_file(self._path(f"{self.out_uri}/{unit.part_name(fingerprint)}"))))
            half = table.select(table.column_names[2:]).slice(0, unit.num_rows // 2).combine_chunks().to_batches()[0]
            positions = range(unit.position, unit.position + half.num_rows)
            save_segment(unit, self.out_uri, fingerprint, positions=positions, rows=half, begun={}, engine={})
            saved += half.num_rows
        lost = Tag(out_uri=self.out_uri, fingerprint=fingerprint, unit=1)
        last = unit_rows(accepted.plan.units[1])[-3:]
        record_death(Flight(moved_at=0.0, steps=9, rows_finished=9, rows={lost: frozenset(last)}), "signal SIGKILL")
        names = map(str, self._fs.find(self._path(self.out_uri)))
        kept = [name for name in names if "/part-" not in name and not name.endswith(("SUCCESS", "manifest.parquet"))]
        self._begun = {name.split("/out/", 1)[1]: self._fs.cat_file(name) for name in kept}
        return saved

    def points(self, job: JobSpec) -> list[Point]:
        """Every call of a whole run and of a run over a finished output, each way of failing. Sorted, so that a seed means something."""
        found = set()
        self.reset()
        for _ in range(2):
            self.faults.arm()
            assert self._run(job) == "complete"
            found |= self.faults.seen
        self._prove()
        return sorted(point for point in found if not (any(rare in point.name for rare in _RARE) and point.number > 1))

    def strike(self, job: JobSpec, points: Iterable[Point]) -> list[str]:
        """From an empty output: runs under these faults until one completes, then one without; how the first ones ended."""
        points = list(points)
        self.reset()
        history, ends = History(self.out_uri), list[str]()
        self.faults.arm(points)
        while "complete" not in ends and len(ends) < _MAX_FAULTY_RUNS:
            ends.append(self._run(job))
            history.look()
        if self.faults.waiting:  # at a call that only a run over a finished output makes, or behind one that did not come
            ends.append(self._run(job))
            history.look()
        fired = len(self.faults.fired)
        self.faults.arm()
        last = self._run(job)
        history.look()
        told = f"{[str(point) for point in points]}: {ends}"
        assert last == "complete", told
        assert set(ends) <= _ENDS, told
        assert history.fine, f"{told}\n{history.describe()}"
        self._prove(told)
        self.figures.points += len(points)
        self.figures.fired += fired
        self.figures.runs += len(ends) + 1
        self.figures.ends.update(ends)
        return ends

    def _run(self, job: JobSpec) -> str:
        """How it ended: a state, or an error that the command turns into a message and an exit code."""
        self.faults.begin_run()
        try:
            result = run(job, stream=io.StringIO(), cluster_of=self._cluster_of)
        except (TokenmillError, Injected) as error:
            return type(error).__name__
        assert (result.state == "complete") == (result.exit_code == 0)
        return result.state

    def _prove(self, told: str = "") -> None:
        found = check(self.input_uri, self.out_uri)
        assert found.fine, f"{told}\n{found.describe()}"
        assert found.error_rows == 0, told
        verdict = verify(self.out_uri)
        assert (verdict.problems, verdict.complete) == ([], True), told


def unit_rows(unit: WorkUnit) -> range:
    """Positions in the input table."""
    return range(unit.position, unit.position + unit.num_rows)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that waits for nothing, and one tokenizer for all runs."""
    monkeypatch.setattr(pipeline.replica, "load_tokenizer", functools.cache(pipeline.replica.load_tokenizer))  # the real one, once
    for name, wait_s in (("_BACKOFF_S", 0.001), ("_LOSS_WAIT_S", 0.001), ("_TICK_S", 0.02)):
        monkeypatch.setattr(jobs.driver, name, wait_s)


@pytest.fixture(params=["local", "memory"])
def rig(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path, hasty: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The job on a local folder and on memory://."""
    root = str(tmp_path / "store") if request.param == "local" else f"memory://every-call-{os.getpid()}"
    made = Rig(root, tiny_model, Faults(monkeypatch, root))
    yield made
    if request.param == "memory":
        fsspec.filesystem("memory").rm(root.removeprefix("memory:/"), recursive=True)
    else:
        shutil.rmtree(root)


@pytest.fixture
def blob_rig(azurite: Azurite, container: str, tiny_model: Path, hasty: None, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A smaller job on Azure Blob."""
    root = f"az://{container}"
    # Said outright, or fsspec hands out the instance that it made for an earlier account.
    options = {"connection_string": azurite.connection_string, "use_listings_cache": False}
    return Rig(root, tiny_model, Faults(monkeypatch, root), rows=_BLOB_ROWS, options=options)


def test_every_public_function_of_storage_is_known_here() -> None:
    """A new one has to be counted, or named as one that touches no store."""
    assert set(store_calls()) == {
        "create_once", "info", "list_names", "list_objects", "open_read", "read_bytes", "remove", "replace", "sweep_temporaries",
    }  # fmt: skip
    assert all(callable(getattr(storage, name)) for name in PURE | COMPOSITE)


def test_the_same_points_are_seen_in_every_run(rig: Rig) -> None:
    """Else a point would mean nothing, and pairs could not be sampled by a seed."""
    assert rig.points(rig.job()) == rig.points(rig.job())


def strike_one_by_one(rig: Rig) -> None:
    job = rig.job()
    points = rig.points(job)
    calls = rig.faults.num_calls
    assert {point.function for point in points} >= {
        "create_once",
        "info",
        "list_names",
        "list_objects",
        "open_read",
        "read_bytes",
        "replace",
    }
    for point in points:
        rig.strike(job, [point])
    print(f"\n{rig.store}: {len(points)} points of {calls} calls a run, one by one: {rig.figures}")
    assert rig.figures.fired == rig.figures.points == len(points)


def strike_pairs(rig: Rig, num_pairs: str) -> None:
    """So many, or `all`."""
    job = rig.job()
    pairs = list(itertools.combinations(rig.points(job), 2))
    chosen = pairs if num_pairs == "all" else random.Random(_SEED).sample(pairs, min(int(num_pairs), len(pairs)))
    for pair in chosen:
        rig.strike(job, pair)
    print(f"\n{rig.store}: {len(chosen)} of {len(pairs)} pairs (seed {_SEED}): {rig.figures}")
    assert rig.figures.fired >= rig.figures.points * 0.9  # a second fault may stand behind what the first one ended


def test_a_single_failure_anywhere_costs_no_row(rig: Rig) -> None:
    strike_one_by_one(rig)


@pytest.mark.azurite
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_single_failure_anywhere_costs_no_row_on_azure_blob(blob_rig: Rig) -> None:
    strike_one_by_one(blob_rig)


@pytest.mark.long
def test_two_failures_anywhere_cost_no_row(rig: Rig) -> None:
    strike_pairs(rig, _PAIRS)


@pytest.mark.azurite
@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_failures_anywhere_cost_no_row_on_azure_blob(blob_rig: Rig) -> None:
    strike_pairs(blob_rig, _BLOB_PAIRS)


@pytest.mark.long
def test_a_store_that_fails_while_planning_costs_no_input_file_where_unreadable_ones_are_skipped(rig: Rig) -> None:
    """A file that the store did not give is not a file that is no Parquet."""
    job = rig.job(unreadable="skip")
    points = [point for point in rig.points(job) if point.function in ("info", "open_read", "list_objects") and "/in" in point.name]
    assert points
    for point in points:
        rig.strike(job, [point])


@pytest.mark.long
def test_a_single_failure_where_evicted_units_are_taken_up_costs_no_row(rig: Rig) -> None:
    """Segments are read, added to, and removed behind the commit."""
    job = rig.job()
    saved = rig.begin_with_segments(job)
    points = rig.points(job)
    assert any(point.function == "read_bytes" and "/segments/" in point.name for point in points)
    assert any(point.function == "remove" and "/segments/" in point.name for point in points)
    for point in points:
        rig.strike(job, [point])
    print(f"\n{rig.store}: {len(points)} points over {saved} saved rows, one by one: {rig.figures}")
    assert rig.figures.fired == rig.figures.points == len(points)


def test_the_command_tells_a_failure_without_a_traceback_and_with_an_exit_code(rig: Rig, tmp_path: Path) -> None:
    job, points = rig.job(), rig.points(rig.job())
    (tmp_path / "job.yaml").write_text(json.dumps(job.model_dump(mode="json", by_alias=True, exclude_unset=True)))
    codes = Counter[int]()
    for point in [point for point in points if point.when == "before" and "/_" in point.name]:
        rig.reset()
        rig.faults.arm([point])
        rig.faults.begin_run()
        ended = CliRunner().invoke(main, ["run", str(tmp_path / "job.yaml")])
        assert ended.exception is None or isinstance(ended.exception, SystemExit), f"{point}: {ended.exception!r}"
        assert ended.exit_code in (0, 1, 2), f"{point}: {ended.output}"
        assert ended.exit_code == 0 or "injected" in ended.output
        codes[ended.exit_code] += 1
    print(f"\nexit codes: {dict(codes)}")
    assert codes[0]
    assert codes[1]
