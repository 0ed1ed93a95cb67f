"""How long a report takes, and how large it is: an output of many units, made by the real writers, and `tokenmill report` on it.

    .venv/bin/python -m tests.bench.report --units 10000

Asked: under 20 s and under 5 MB for 10,000 units. Measured of a finished job, whose manifest says it all in one read, and of the same
job unfinished, where every part's footer is read.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.accept import Accepted
from jobs.accept import make_record
from jobs.finish import finish
from jobs.plan import Plan
from pipeline.commit import PartWriter
from pipeline.commit import commit
from pipeline.model import resolve_model
from schemas import layout
from schemas.completions import Choice
from schemas.completions import Completion
from schemas.completions import completion_arrays
from schemas.completions import output_schema
from schemas.job import parse_job
from schemas.ledger import RunAccount
from schemas.manifest import UnitReport
from schemas.prompts import RowError
from schemas.unit import RowRange
from schemas.unit import WorkUnit
from tests.conftest import build_tiny_model

_BEGAN_AT = 1_795_000_000.0
_UNIT_S = 40.0
_PER_REPLICA = 4
"""Units in flight."""


def build(folder: Path, *, units: int, rows: int, replicas: int, done: int | None = None, limits: dict[str, Any] | None = None) -> Path:
    """An output of a job of so many units of so many rows, of which `done` are committed (all: the job is closed)."""
    done = units if done is None else done
    rng = random.Random(7)
    model = build_tiny_model(folder / "model")
    table = pa.table({"id": pa.array([], pa.int64()), "prompt": pa.array([], pa.string())})
    (folder / "in").mkdir()
    pq.write_table(table, folder / "in" / "prompts.parquet")
    job = parse_job(
        {
            "name": "tickets",
            "model": str(model),
            "input": {"uri": str(folder / "in" / "*.parquet"), "prompt": "prompt", "system": "Answer in one sentence."},
            "output": {"uri": str(folder / "out")},
            "sampling": {"max_tokens": 512},
            "engine": {"kind": "simulated", "options": {"max_num_seqs": 256}},
            "limits": limits or {},
        }
    )
    source = str(folder / "in" / "prompts.parquet")
    plan = Plan(
        units=tuple(
            WorkUnit(index=index, ranges=(RowRange(uri=source, identity="v1", row_start=first, row_stop=first + rows, position=first),))
            for index in range(units)
            for first in (index * rows,)
        )
    )
    record = make_record(job, plan, table.schema, resolve_model(str(model)), {})
    out = folder / "out"
    (out / layout.RUNS).mkdir(parents=True)
    (out / layout.JOB).write_bytes(record.to_json())
    (out / layout.PLAN).write_bytes(plan.to_parquet())
    schema = output_schema(table.schema, job)
    names = [f"nd-h100-{node:03d}-{number}" for node in range(-(-replicas // 8)) for number in range(8)][:replicas]
    reports = []
    for unit in plan.units[:done]:
        completions = [_completion(rng, unit.position + row) for row in range(rows)]
        report = _report(rng, unit, completions, record.fingerprint, names)
        writer = PartWriter(schema, "zstd")
        keys = [pa.array(range(unit.position, unit.position + rows)), pa.array([f"question {row}" for row in range(rows)])]
        writer.write(pa.RecordBatch.from_arrays([*keys, *completion_arrays(completions, job)], schema=schema))
        commit(str(out / unit.part_name(record.fingerprint)), writer.finish(report, {}), report)
        reports.append(report)
    price = job.limits.usd_per_hour or 98.32
    account = _account(rng, reports, record.fingerprint, names, over=done == units, usd_per_hour=price)
    if done == units:
        (out / layout.RUNS / f"{account.run}.json").write_text(account.model_dump_json())
    said = {
        "state": account.state, "updated_at": time.time(), "host": "driver-0", "error_rows": account.error_rows, "replicas": [],
        "output_tokens_per_s": 1.0, "eta_s": None, "failed_units": {}, "account": account.model_dump(mode="json"),
        "units_done": len(reports), "rows_done": account.rows,
    }  # fmt: skip
    (out / layout.STATUS).write_text(json.dumps(said))
    if done == units:
        accepted = Accepted(
            job=job, record=record, plan=plan, model=resolve_model(str(model)), out_uri=str(out), cut=None, done={}, begun=True
        )
        finish(accepted)
    return out


def _completion(rng: random.Random, position: int) -> Completion:
    if position % 97 == 5:
        return Completion(prompt_tokens=0, error=RowError(kind="empty_prompt", message="the prompt is empty"))
    if position % 331 == 7:
        return Completion(prompt_tokens=9120, error=RowError(kind="too_long", message="prompt has 9,120 tokens, the model takes 8,192"))
    count = min(512, int(rng.lognormvariate(4.7, 0.7)) + 1)
    choice = Choice(text="yes " * 5, finish_reason="length" if count == 512 else "stop", token_ids=[7] * count)
    return Completion(prompt_tokens=int(rng.lognormvariate(5.2, 0.5)) + 12, choices=(choice,))


def _report(rng: random.Random, unit: WorkUnit, completions: list[Completion], fingerprint: str, names: list[str]) -> UnitReport:
    reasons: dict[str, int] = {}
    errors: dict[str, int] = {}
    examples = []
    for row, completion in enumerate(completions):
        reasons[completion.finish_reason] = reasons.get(completion.finish_reason, 0) + 1
        if completion.error is not None:
            errors[completion.error.kind] = errors.get(completion.error.kind, 0) + 1
            examples.append({"row": unit.position + row, "kind": completion.error.kind, "message": completion.error.message})
    begun = _BEGAN_AT + 60 + unit.index // (len(names) * _PER_REPLICA) * _UNIT_S * 0.9 + rng.uniform(0, _UNIT_S)
    return UnitReport(
        unit=unit.index, fingerprint=fingerprint, attempt=f"{unit.index:08x}", worker=names[unit.index % len(names)], rows=len(completions),
        error_rows=sum(errors.values()), prompt_tokens=sum(completion.prompt_tokens for completion in completions),
        completion_tokens=sum(completion.completion_tokens for completion in completions), started_at=begun,
        finished_at=begun + rng.uniform(0.6, 1.3) * _UNIT_S, finish_reasons=reasons, errors=errors, examples=examples[:3],
        seconds={"read": 0.1, "render": 0.2, "generate": 38.0, "decode": 0.1, "write": 0.1, "commit": 0.2},
        resumed_rows=3 if unit.index % 50 == 0 else 0, resumed_tokens=300 if unit.index % 50 == 0 else 0,
    )  # fmt: skip


def _account(
    rng: random.Random, reports: list[UnitReport], fingerprint: str, names: list[str], *, over: bool, usd_per_hour: float
) -> RunAccount:
    ended_at = max(report.finished_at for report in reports) + 5
    elapsed_s = ended_at - _BEGAN_AT
    tokens = sum(report.completion_tokens for report in reports)
    made = []
    for name in names:
        seconds = {
            "start": rng.uniform(40, 60),
            "starved": rng.uniform(1, 6),
            "commit_blocked": 0.6,
            "tail": rng.uniform(2, 20),
            "lost": rng.uniform(0, 2),
        }
        seconds["busy"] = max(1.0, elapsed_s - sum(seconds.values()))
        own = sum(report.completion_tokens for report in reports if report.worker == name)
        made.append(
            {
                "name": name, "processes": 1, "seconds": seconds, "rows": 1, "prompt_tokens": 1, "generated_tokens": int(own * 1.01),
                "output_tokens": own, "busy_s": seconds["busy"], "busy_tokens": own,
            }
        )  # fmt: skip
    return RunAccount.model_validate(
        {
            "run": "20261118T112000Z-0000000a", "fingerprint": fingerprint, "state": "complete" if over else "running", "host": "driver-0",
            "whole": over, "began_at": _BEGAN_AT, "ended_at": ended_at if over else time.time(), "elapsed_s": elapsed_s,
            "units": len(reports), "rows": sum(report.rows for report in reports),
            "error_rows": sum(report.error_rows for report in reports),
            "prompt_tokens": sum(report.prompt_tokens for report in reports), "output_tokens": tokens, "retries": 12,
            "profile": "nd96isr-h100-v5", "usd_per_hour": usd_per_hour,
            "engine": {"kind": "simulated", "version": "1", "dtype": "float32", "options": {"max_num_seqs": 256}},
            "versions": {"tokenmill": "0.1.0", "distributed": "2026.3", "python": "3.11"}, "replicas": tuple(made),
        }
    )  # fmt: skip


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=16, help="of each unit")
    parser.add_argument("--replicas", type=int, default=256)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenmill-report-") as folder:
        began = time.perf_counter()
        out = build(Path(folder), units=asked.units, rows=asked.rows, replicas=asked.replicas)
        print(f"built {asked.units:,} units of {asked.rows} rows in {time.perf_counter() - began:.1f} s", flush=True)
        measure("finished", out)
        (out / layout.MANIFEST).unlink()
        (out / layout.SUCCESS).unlink()
        measure("unfinished", out)


def measure(what: str, out: Path) -> None:
    """Print how long the command takes, by the clock and of CPU, and the page's size."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.cli", "report", str(out)], check=True, stdout=subprocess.DEVNULL)
    took_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{what}: {took_s:.1f} s, {cpu_s:.1f} s of CPU, {(out / layout.REPORT).stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
