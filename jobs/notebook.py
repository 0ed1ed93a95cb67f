"""What notebooks import: `jobs.run(...)`, `jobs.submit(...)`, `jobs.attach(...)`. A job in any form in, a handle out."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.api import load_job
from jobs.handle import Job
from jobs.handle import attach as attach
from jobs.staging import is_table
from jobs.staging import stage
from jobs.started import start
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.job import DEMO_MODEL
from schemas.job import JobSpec
from schemas.job import parse_job

__all__ = ["Job", "attach", "run", "submit"]

_FIELDS = {
    "name": "name",
    "model": "model",
    "prompt": "input.prompt",
    "messages": "input.prompt",
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


def run(
    job: Any = None,
    /,
    *,
    model: str | Path | None = None,
    prompt: str | None = None,
    messages: str | None = None,
    system: str | None = None,
    output: str | Path | Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    sampling: Mapping[str, Any] | None = None,
    engine: str | Mapping[str, Any] | None = None,
    cluster: str | Mapping[str, Any] | None = None,
    canary: int | None = None,
    limits: Mapping[str, Any] | None = None,
    reuse: str | Path | Sequence[str | Path] | None = None,
    storage: Mapping[str, Any] | None = None,
    show: bool = True,
    **fields: Any,
) -> Job:
    """Run a job and wait for it, with a live display. See `submit`; raises JobFailed where it was refused, units failed or it was killed.

    An interrupt ends the waiting, not the job; nor does a restart of the kernel: `jobs.attach(output)` gets the handle back.
    """
    started = submit(
        job,
        model=model,
        prompt=prompt,
        messages=messages,
        system=system,
        output=output,
        max_tokens=max_tokens,
        temperature=temperature,
        sampling=sampling,
        engine=engine,
        cluster=cluster,
        canary=canary,
        limits=limits,
        reuse=reuse,
        storage=storage,
        **fields,
    )
    return started.wait(show=show)


def submit(
    job: Any = None,
    /,
    *,
    model: str | Path | None = None,
    prompt: str | None = None,
    messages: str | None = None,
    system: str | None = None,
    output: str | Path | Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    sampling: Mapping[str, Any] | None = None,
    engine: str | Mapping[str, Any] | None = None,
    cluster: str | Mapping[str, Any] | None = None,
    canary: int | None = None,
    limits: Mapping[str, Any] | None = None,
    reuse: str | Path | Sequence[str | Path] | None = None,
    storage: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Job:
    """Start a job in a process of its own and return its handle at once.

    `job` is a JobSpec, the path of a job file, a URI or glob of Parquet, or a table: pyarrow, pandas, polars, or a dask dataframe, which
    is stored below the output under a name made of its content, so that the same call again goes on where it stopped. Fields as
    on the command line: model="demo", prompt="question", output="out/", max_tokens=128, reuse="out-of-last-week/" or a list of such;
    or sections of the job file as mappings: sampling={"top_p": 0.9}. More fields: name, chat, prefix, profile, replicas, input.
    Raises JobError where the job is wrong.
    """
    given = {
        "model": model,
        "prompt": prompt,
        "messages": messages,
        "system": system,
        "output": output,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "sampling": sampling,
        "engine": engine,
        "cluster": cluster,
        "canary": canary,
        "limits": limits,
        "reuse": reuse,
        "storage": storage,
        **fields,
    }
    spec = make_job(job, {key: value for key, value in given.items() if value is not None})
    return Job(spec.output.uri, start(spec))


def make_job(job: Any, fields: dict[str, Any]) -> JobSpec:
    """A job in any form to a JobSpec, with paths absolute, since its process may have another folder. Raises JobError.

    From here on this process reaches storage as the job says. A table is stored below the output, once all else is checked.
    """
    if isinstance(job, JobSpec):
        if fields:
            raise JobError(f"{', '.join(fields)}: a JobSpec says all; change it with model_copy, or give keywords alone")
        data = _plain(job)
    else:
        data = _plain(load_job(job)) if _is_job_file(job) else {}
        _put_all(data, fields)
        if not _is_job_file(job):
            _put_input(data, job)
    spec = parse_job(data)
    if spec.cluster.kind == "azure-batch":
        raise JobError(
            "cluster.kind: azure-batch is put onto Batch by `tokenmill submit job.yaml`, its table in storage; "
            f"jobs.attach({spec.output.uri!r}) then gets the handle, from storage alone"
        )
    storage.use(spec.storage)
    if is_table(job):
        data["input"]["uri"] = stage(job, spec.output.uri)
        spec = parse_job(data)
    return parse_job(_absolute(_plain(spec)))


def _is_job_file(job: Any) -> bool:
    return isinstance(job, str | Path) and Path(job).suffix in (".yaml", ".yml", ".json")


def _plain(spec: JobSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def _put_input(data: dict[str, Any], job: Any) -> None:
    """A path, or the place below which a table will be stored."""
    if isinstance(job, str | Path):
        data.setdefault("input", {})["uri"] = str(job)
    elif is_table(job):
        output = data.get("output", {}).get("uri")
        if not isinstance(output, str):
            raise JobError('output: a table needs a folder to be stored below, as in output="out/"')
        data.setdefault("input", {})["uri"] = storage.join(output, layout.STAGED)
    elif job is not None:
        raise JobError(f"found a {type(job).__name__}; give a JobSpec, a path, a pyarrow, pandas or polars table, or a dask dataframe")


def _put_all(data: dict[str, Any], fields: dict[str, Any]) -> None:
    if "prompt" in fields and "messages" in fields:
        raise JobError("prompt and messages: give one of them")
    for key, value in fields.items():
        if key in _SECTIONS and isinstance(value, Mapping):
            data[key] = {**data.get(key, {}), **value}
            continue
        if key not in _FIELDS:
            if key in _SECTIONS:
                raise JobError(f"{key}: found a {type(value).__name__}, expected a mapping, as that section of a job file has it")
            raise JobError(f"{key}: unknown; fields are {', '.join(_FIELDS)}, sections are {', '.join(_SECTIONS)}")
        *parents, last = _FIELDS[key].split(".")
        inner = data
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = _as_data(key, value)


def _as_data(key: str, value: Any) -> Any:
    if key == "messages":
        return {"messages": value}
    if key == "reuse":
        return _listed(value)
    return str(value) if isinstance(value, Path) else value


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
