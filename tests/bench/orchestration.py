"""What driver and planner cost as jobs grow: seconds per unit, a driver among thousands of replicas, and planning 100,000 objects.

.venv/bin/python -m tests.bench.orchestration
.venv/bin/python -m tests.bench.orchestration --clusters inline --units 100 1000 10000 --replicas 72 720 7200 --objects 100000

CPU seconds of each part's own process, which hold on a busy machine, and wall seconds, which do not. Asserts nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import api
from jobs.accept import Accepted
from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.driver import Driver
from jobs.plan import Plan
from jobs.plan import make_plan
from pipeline import storage
from pipeline.model import Model
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.ledger import Reading
from schemas.manifest import UnitReport
from schemas.unit import RowRange
from schemas.unit import WorkUnit
from tests.conftest import build_tiny_model

_ROWS = 16
_ROWS_PER_FILE = 50 * _ROWS
_UNIT_EVERY_S = 0.001
_HUGE_MAX_TOKENS = 262_144
"""So that the planner's own cut makes units of its fewest rows."""


def in_child(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """In a fresh process, so that its CPU and its peak memory are its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def whole_job(num_units: int, folder: str, kind: str) -> dict[str, float]:
    """A job of so many units with one replica, from accept to _SUCCESS; its units are as small as the planner makes them.

    CPU of this process. A small job goes before it, so that imports are nobody's cost.
    """
    os.environ["TOKENMILL_CACHE"] = f"{folder}/cache"
    model = build_tiny_model(Path(folder, "model"))
    _run(_small_job(folder, model, "first", 32, kind))
    return _run(_small_job(folder, model, "then", num_units, kind))


def _small_job(folder: str, model: Path, name: str, num_units: int, kind: str) -> JobSpec:
    rows, base = num_units * _ROWS, f"{folder}/{name}"
    Path(base, "in").mkdir(parents=True)
    table = pa.table({"prompt": [f"prompt {row}" for row in range(rows)], "own": [json.dumps({"max_tokens": 4})] * rows})
    for start in range(0, rows, _ROWS_PER_FILE):  # a unit reads its file's whole footer, so files do not grow with the job
        pq.write_table(table.slice(start, _ROWS_PER_FILE), Path(base, "in", f"{start:08d}.parquet"), row_group_size=_ROWS)
    return parse_job(
        {
            "model": str(model),
            "input": {"uri": f"{base}/in", "prompt": "prompt", "sampling": "own", "chat": False},
            "output": {"uri": f"{base}/out"},
            "sampling": {"max_tokens": _HUGE_MAX_TOKENS},
            "engine": {"kind": "simulated", "ordering": "off", "options": {"decode_tokens_per_s": 1e9, "prefill_tokens_per_s": 1e9}},
            "cluster": {"kind": kind},
        }
    )


def _run(job: JobSpec) -> dict[str, float]:
    began, began_cpu = time.monotonic(), time.process_time()
    result = api.run(job, stream=io.StringIO())
    cpu_s, wall_s = time.process_time() - began_cpu, time.monotonic() - began
    assert result.state == "complete"
    return {"units": result.units, "cpu_s": cpu_s, "wall_s": wall_s}


class _QuickCluster:
    """Any number of replicas whose units end one by one, the oldest first, every millisecond; knows the protocol, runs nothing."""

    dashboard = None
    client = None

    def __init__(self, num_replicas: int, window_rows: int) -> None:
        ledger = Reading(
            engine="e", age_s=100.0, start_s=1.0, busy_s=99.0, starved_s=0.0, blocked_s=0.0, pending_starved_s=0.0, pending_blocked_s=0.0,
            working_s=0.0, full=True, rows=0, prompt_tokens=0, generated_tokens=0, busy_tokens=0, kept_tokens=0,
        )  # fmt: skip
        self._said = asdict(ledger)
        self._states = [ReplicaState(name=f"node-{n // 4}-{n % 4}", window_rows=window_rows, ledger=ledger) for n in range(num_replicas)]
        self._waiting: deque[tuple[str, WorkUnit, Callable[[Result], None], str | None]] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._end_units, daemon=True)
        self._thread.start()

    def _end_units(self) -> None:
        while not self._closing.wait(_UNIT_EVERY_S):
            if self._waiting:
                self._end_one()

    def replicas(self) -> list[ReplicaState]:
        return self._states

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        self._waiting.append((fingerprint, unit, done, on))

    def _end_one(self) -> None:
        fingerprint, unit, done, on = self._waiting.popleft()
        report = UnitReport(
            unit=unit.index, fingerprint=fingerprint, attempt="a", worker=on or "", rows=unit.num_rows, error_rows=0, prompt_tokens=1,
            completion_tokens=1, started_at=0.0, finished_at=1.0, finish_reasons={"stop": unit.num_rows},
            seconds={"read": 0.1, "render": 0.1, "generate": 1.0, "write": 0.1, "commit": 0.1}, digest="d" * 64,
        )  # fmt: skip
        done({"report": asdict(report), "outcome": "created", "said": {"name": on, "ledger": self._said}})

    @property
    def num_replicas(self) -> int:
        return len(self._states)

    def notes(self) -> list[str]:
        return []

    def start_seconds(self) -> dict[str, float]:
        return {}

    def loading_seconds(self) -> dict[str, float]:
        return {}

    def evict(self) -> None:
        return

    def close(self, *, at_once: bool = False) -> None:
        self._closing.set()
        self._thread.join()


class _Record:
    fingerprint = "f" * 64


def driver_alone(num_replicas: int, units_per_replica: int) -> dict[str, float]:
    """The driver's own loop with so many replicas that take no time: CPU seconds for one unit."""
    rows = 3_000
    units = tuple(
        WorkUnit(
            index=index,
            ranges=(RowRange(uri="u", identity="i", row_start=index * rows, row_stop=(index + 1) * rows, position=index * rows),),
        )
        for index in range(num_replicas * units_per_replica)
    )
    with tempfile.TemporaryDirectory() as folder:
        job = parse_job({"model": "m", "input": {"uri": folder, "prompt": "p"}, "output": {"uri": folder}})
        model = Model(
            path="m", weights_digest="", tokenizer_digest="", template_digest="", weights_bytes=0, max_position_embeddings=1, vocab_size=1,
            kv_values_per_token=1,
        )  # fmt: skip
        record: Any = _Record()
        accepted = Accepted(job=job, record=record, plan=Plan(units=units), model=model, out_uri=folder, cut=None, done={}, begun=False)
        cluster = _QuickCluster(num_replicas, 2048)
        driver = Driver(accepted, cluster)
        began_cpu, began = time.thread_time(), time.monotonic()  # of this thread: the cluster's is no driver's
        progress = driver.run()
        cpu_s, wall_s = time.thread_time() - began_cpu, time.monotonic() - began
        cluster.close()
        assert progress.state == "complete"
        return {"units": len(units), "cpu_s": cpu_s, "wall_s": wall_s}


def planning(num_objects: int) -> dict[str, float]:
    """make_plan, its digest and its Parquet over so many objects in memory://."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(8)), "prompt": ["a prompt of some words"] * 8}), buffer)
    data = buffer.getvalue()
    for index in range(num_objects):
        storage.replace(f"memory://in/{index:06d}.parquet", data)
    job = parse_job(
        {
            "model": "m",
            "input": {"uri": "memory://in", "prompt": "prompt"},
            "output": {"uri": "memory://out"},
            "cluster": {"kind": "inline"},
        }
    )
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began, began_cpu = time.monotonic(), time.process_time()
    plan, _ = make_plan(job)
    digest = plan.digest
    stored = Plan.from_parquet(plan.to_parquet())
    cpu_s, wall_s = time.process_time() - began_cpu, time.monotonic() - began
    assert stored.digest == digest
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"units": len(plan.units), "cpu_s": cpu_s, "wall_s": wall_s, "before_mb": before_mb, "peak_mb": peak_mb}


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--clusters", nargs="*", default=["inline", "local"])
    parser.add_argument("--replicas", type=int, nargs="*", default=[72, 720, 7200])
    parser.add_argument("--units-per-replica", type=int, default=10)
    parser.add_argument("--objects", type=int, nargs="*", default=[100_000])
    options = parser.parse_args()
    for kind in options.clusters:
        what = "driver, scheduler and a worker's work in one process" if kind == "inline" else "driver and scheduler, the worker apart"
        for num_units in options.units:
            with tempfile.TemporaryDirectory(prefix="tokenmill-orchestration-") as folder:
                found = in_child(whole_job, num_units, folder, kind)
            print(f"{kind:6} {_words(found)} ({what})", flush=True)
    for num_replicas in options.replicas:
        found = in_child(driver_alone, num_replicas, options.units_per_replica)
        print(f"driver alone, {num_replicas:,} replicas: {_words(found)}", flush=True)
    for num_objects in options.objects:
        found = in_child(planning, num_objects)
        print(f"planning {num_objects:,} objects in memory://: {_words(found)}", flush=True)
        print(
            f"  in all {found['cpu_s']:.1f} CPU s; peak {found['peak_mb']:.0f} MB, {found['before_mb']:.0f} MB of it before, objects in it"
        )


def _words(found: dict[str, float]) -> str:
    units = found["units"]
    return f"{units:>6,.0f} units, {1e3 * found['cpu_s'] / units:.3f} CPU ms and {1e3 * found['wall_s'] / units:.3f} ms of wall each"


if __name__ == "__main__":
    main()
