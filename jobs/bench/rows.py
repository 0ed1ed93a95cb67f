"""A job in, its rows as requests out: accepted and rendered as in a run, but with nothing written to the job's own output."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import cut_for
from pipeline.engine.engine import Request
from pipeline.profile import ReplicaPlan
from pipeline.prompts import read_prompts
from pipeline.read import read_unit
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from schemas.errors import JobError
from schemas.job import JobSpec

_BATCH_ROWS = 256
_MIN_GROUP_ROWS = 16
_GROUPS = 32
"""Row groups of a shortened table: as fine as the planner cuts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A job's rows for the engine, in input order. The position of each is its place in the table."""

    requests: list[Request]
    references: list[str]
    """What the reference column says of each request; empty where none was asked for."""
    error_rows: int
    """Rows that never reach an engine."""
    renderer: Renderer


def accept_for_bench(job: JobSpec, folder: Path, num_rows: int | None = None) -> Accepted:
    """Accept a job whose output lies under `folder`, over its first rows only where so many are given. Raises JobError.

    Engines are cut as for a job without end: starts are not part of what is measured, and few rows no reason for slower engines.
    """
    if job.cluster.kind != "local":
        raise JobError(f"cluster.kind: found {job.cluster.kind}; a benchmark starts replicas of its own on this machine: local")
    accepted = _accept(into(job, folder / "out"))
    if num_rows is None or num_rows >= accepted.plan.num_rows:
        return accepted
    path = folder / "in" / "rows.parquet"
    path.parent.mkdir(parents=True)
    table = pa.Table.from_batches(_batches(accepted), accepted.record.input_schema).slice(0, num_rows)
    pq.write_table(table, path, row_group_size=max(_MIN_GROUP_ROWS, -(-num_rows // _GROUPS)))
    return _accept(into(job.model_copy(update={"input": job.input.model_copy(update={"uri": str(path)})}), folder / "out"))


def _accept(job: JobSpec) -> Accepted:
    accepted = accept(job)
    return replace(accepted, cut=cut_for(job, accepted.model, {}, accepted.plan, None))


def into(job: JobSpec, folder: Path) -> JobSpec:
    """The job with its output there."""
    return job.model_copy(update={"output": job.output.model_copy(update={"uri": str(folder), "commit": "put_if_absent"})})


def with_engine(job: JobSpec, *, ordering: str | None = None, options: dict[str, Any] | None = None) -> JobSpec:
    """The job with some of its engine's settings changed; options are put over the job's own."""
    update: dict[str, Any] = {"options": {**job.engine.options, **(options or {})}}
    if ordering is not None:
        update["ordering"] = ordering
    return job.model_copy(update={"engine": job.engine.model_copy(update=update)})


def plan_of(accepted: Accepted) -> ReplicaPlan:
    """How this machine's engines are cut for it."""
    assert accepted.cut is not None  # nothing of it is done yet, and this machine does it
    return accepted.cut


def check_comparable(accepted: Accepted, what: str) -> None:
    """Raises JobError where warm replicas would answer from what an earlier turn left in their prefix cache."""
    if accepted.job.engine.kind == "vllm" and plan_of(accepted).options.get("enable_prefix_caching", True):
        raise JobError(
            f"engine.options.enable_prefix_caching: found true; {what} generate the same rows on the same warm replicas, and all but the "
            "first would find their prompts in the cache; set it false"
        )


def read_rows(accepted: Accepted, *, reference: str | None = None) -> Rows:
    """Render every row as a replica would. Raises JobError where no row can be asked, or the reference column is none."""
    job, schema = accepted.job, accepted.record.input_schema
    if reference is not None and (reference not in schema.names or not pa.types.is_string(schema.field(reference).type)):
        raise JobError(f"--reference: found {reference!r}, expected a text column of the table, which has {', '.join(schema.names)}")
    longest = plan_of(accepted).options.get("max_model_len", accepted.model.max_position_embeddings)
    tokenizer = load_tokenizer(accepted.model.path)
    renderer = Renderer(tokenizer, job, max_model_len=longest, seed_base=accepted.record.fingerprint)
    requests: list[Request] = []
    references: list[str] = []
    errors: list[str] = []
    for unit in accepted.plan.units:
        for position, batch in read_unit(unit, schema, _BATCH_ROWS):
            known = batch.column(reference).to_pylist() if reference is not None else []
            for row, item in enumerate(renderer.render(read_prompts(batch, position, job))):
                if not isinstance(item, Request):
                    errors.append(f"{item[0].kind}: {item[0].message}")
                    continue
                requests.append(item)
                if reference is not None:
                    references.append(known[row] or "")
    if not requests:
        raise JobError(f"input: none of its {len(errors)} rows can be asked; the first: {errors[0] if errors else 'there is none'}")
    return Rows(requests=requests, references=references, error_rows=len(errors), renderer=renderer)


def _batches(accepted: Accepted) -> list[pa.RecordBatch]:
    schema = accepted.record.input_schema
    return [batch for unit in accepted.plan.units for _, batch in read_unit(unit, schema, _BATCH_ROWS)]
