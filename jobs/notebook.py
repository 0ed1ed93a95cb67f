"""What notebooks import: `jobs.run(...)`, `jobs.submit(...)`, `jobs.attach(...)`. A job in any form in, a handle out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.api import load_job
from jobs.handle import Job
from jobs.handle import attach as attach
from jobs.staging import is_table
from jobs.staging import stage
from jobs.started import start
from pipeline import storage
from schemas.errors import JobError
from schemas.job import DEMO_MODEL
from schemas.job import JobSpec
from schemas.job import parse_job

__all__ = ["Job", "attach", "run", "submit"]

_FIELDS = {
    "name": "name",
    "model": "model",
    "prompt": "input.prompt",
    "messages": "input.prompt.messages",
    "system": "input.system",
    "chat": "input.chat",
    "output": "output.uri",
    "prefix": "output.prefix",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "engine": "engine.kind",
    "profile": "engine.profile",
    "cluster": "cluster.kind",
    "replicas": "cluster.replicas",
    "canary": "canary",
    "reuse": "reuse",
}
"""Flat keywords, as the command line has them; any other is a section of the job file, as a mapping."""
_SECTIONS = ("input", "output", "sampling", "engine", "cluster", "limits", "storage")


def run(job: Any = None, /, *, show: bool = True, **fields: Any) -> Job:
    """Run a job and wait for it, with a live display. See `submit`; raises JobFailed where it was refused or units failed.

    An interrupt ends the waiting, not the job; nor does a restart of the kernel: `jobs.attach(output)` gets the handle back.
    """
    return submit(job, **fields).wait(show=show)


def submit(job: Any = None, /, **fields: Any) -> Job:
    """Start a job in a process of its own and return its handle at once.

    `job` is a JobSpec, the path of a job file, a URI or glob of Parquet, or a table: pyarrow, pandas, polars, or a dask dataframe, which
    is stored below the output under a name made of its content, so that the same call again goes on where it stopped. Fields as
    on the command line: model="demo", prompt="question", output="out/", max_tokens=128, reuse="out-of-last-week/" or a list of such;
    or sections of the job file as mappings: sampling={"top_p": 0.9}. Raises JobError where the job is wrong.
    """
    spec = make_job(job, fields)
    storage.use(spec.storage)
    return Job(spec.output.uri, start(spec))


def make_job(job: Any, fields: dict[str, Any]) -> JobSpec:
    """A job in any form to a JobSpec, with paths absolute, since its process may have another folder. Raises JobError."""
    if isinstance(job, JobSpec):
        if fields:
            raise JobError(f"{', '.join(fields)}: a JobSpec says all; change it with model_copy, or give keywords alone")
        data = job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    elif isinstance(job, str | Path) and Path(job).suffix in (".yaml", ".yml", ".json"):
        data = load_job(job).model_dump(mode="json", by_alias=True, exclude_defaults=True)
        _put_all(data, fields)
    else:
        data = {}
        _put_all(data, fields)
        if is_table(job):
            output = data.get("output", {}).get("uri")
            if not isinstance(output, str):
                raise JobError('output: a table needs a folder to be stored below, as in output="out/"')
            data.setdefault("input", {})["uri"] = stage(job, output)
        elif isinstance(job, str | Path):
            data.setdefault("input", {})["uri"] = str(job)
        elif job is not None:
            raise JobError(f"found a {type(job).__name__}; give a JobSpec, a path, a pyarrow, pandas or polars table, or a dask dataframe")
    spec = parse_job(data)
    return parse_job(_absolute(spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)))


def _put_all(data: dict[str, Any], fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if key in _SECTIONS and isinstance(value, dict):
            data[key] = {**data.get(key, {}), **value}
            continue
        if key not in _FIELDS:
            raise JobError(f"{key}: unknown; fields are {', '.join(_FIELDS)}, sections are {', '.join(_SECTIONS)}")
        *parents, last = _FIELDS[key].split(".")
        inner = data
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = _listed(value) if key == "reuse" else str(value) if isinstance(value, Path) else value


def _listed(value: Any) -> Any:
    """One earlier output, or several; what is neither is left for the job's own check."""
    many = [value] if isinstance(value, str | Path) else value
    return [str(one) if isinstance(one, Path) else one for one in many] if isinstance(many, list | tuple) else many


def _absolute(data: dict[str, Any]) -> dict[str, Any]:
    uri = data["input"]["uri"]
    data["input"]["uri"] = storage.absolute(uri) if isinstance(uri, str) else [storage.absolute(each) for each in uri]
    data["output"]["uri"] = storage.absolute(data["output"]["uri"])
    if "reuse" in data:
        data["reuse"] = [storage.absolute(each) for each in data["reuse"]]
    if data["model"] != DEMO_MODEL and Path(data["model"]).exists():
        data["model"] = str(Path(data["model"]).resolve())
    return data
