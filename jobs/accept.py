"""A JobSpec and what its output already holds in; an accepted job out, or the reason why not. Starts nothing, generates nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import pyarrow as pa

from jobs.plan import Plan
from jobs.plan import Taken
from jobs.plan import changed_since
from jobs.plan import make_plan
from jobs.plan import untaken
from pipeline import storage
from pipeline.hardware import find_profile
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.profile import cut_machine
from pipeline.prompts import check_columns
from pipeline.prompts import needs_chat
from schemas import layout
from schemas.completions import output_schema
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import PromptTemplate
from schemas.record import JobRecord
from schemas.record import encode_schema
from schemas.unit import WorkUnit

SPEED_ONLY = frozenset(
    {
        "async_scheduling", "attention_backend", "block_size", "compilation_config", "decode_tokens_per_s",
        "distributed_executor_backend",
        "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization",
        "ir_op_priority", "kv_cache_memory_bytes", "load_format", "max_cudagraph_capture_size",
        "max_num_batched_tokens", "max_num_seqs", "nnodes", "pipeline_parallel_size",
        "prefill_tokens_per_s", "start_s", "tensor_parallel_size",
    }
)  # fmt: skip
"""Engine options that may change between runs of one job: they decide how fast, not what."""
NUMERICS = ("dtype", "kv_cache_dtype")
"""Engine options that a profile may choose and that show in the output; a job keeps those that it was begun with."""
_FEWEST_BYTES_PER_TOKEN = 2
"""Of most tables' text: English has about four, Chinese two to three."""
_PART_NAME = re.compile(r"part-(\d{8})-([0-9a-f]{8})\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A job that may run."""

    job: JobSpec
    record: JobRecord
    plan: Plan
    model: Model
    out_uri: str
    cut: ReplicaPlan | None
    """How this machine's engines are cut; None where the nodes of a cluster decide, or nothing is left to do."""
    done: dict[int, int]
    """Size in bytes of the committed part, by unit."""
    begun: bool
    """Whether the output was begun by an earlier run."""
    new_objects: tuple[str, ...] = ()
    """Objects that match the input now and were not there when the plan was made; they are not taken."""
    changed_objects: tuple[str, ...] = ()
    """Planned objects that are not the same any more; their units will fail."""
    index: str | None = None
    """Where, in the output, the index of what earlier outputs have answered is; see jobs/reuse.py."""
    usd_per_hour: float | None = None
    """Of one node; None where neither the job nor its profile says."""

    @property
    def todo(self) -> list[WorkUnit]:
        wants = wants_json(self.job)
        return [replace(unit, reuse=self.index, wants_json=wants) for unit in self.plan.units if unit.index not in self.done]


def accept(job: JobSpec, *, taken: Taken = frozenset()) -> Accepted:
    """Check everything that can be checked before an engine starts. Raises JobError.

    A new plan leaves out what is taken. From here on this process, and the workers that it starts, reach storage as the job says.
    """
    storage.use(job.storage)
    storage.commit_as(job.output.commit)
    out_uri = storage.absolute(job.output.uri)
    storage.check_can_create(out_uri)
    for uri in map(storage.absolute, job.input.uris):
        if out_uri.startswith(uri.rstrip("/") + "/"):
            raise JobError(f"output.uri: {out_uri} lies inside the input folder {uri}, whose readers would take completions for prompts")
    model = resolve_model(job.model)
    stored = load_record(out_uri)
    stored_plan = load_plan(out_uri) if stored else None
    if stored is not None and stored_plan is not None:
        plan, schema = stored_plan, stored.input_schema
    else:
        plan, schema = make_plan(job, taken)
    check_columns(schema, job.input)
    output_schema(schema, job)
    if needs_chat(schema, job.input) and not model.has_chat_template:
        raise JobError(
            f"input.prompt: the model {job.model} has no chat template, which messages, system and chat: true need; "
            "use a text column or template with chat: false, or add chat_template.jinja to the checkpoint"
        )
    staged = storage.join(out_uri, layout.STAGED) + "/"
    inside = [uri for uri in plan.objects if uri.startswith(out_uri.rstrip("/") + "/") and not uri.startswith(staged)]
    if inside:
        raise JobError(f"output.uri: the input {inside[0]} lies inside the output {out_uri}; choose another output folder")
    first_cut = None if stored else cut_for(job, model, {}, plan, plan.num_rows)
    numerics = stored_numerics(stored) if stored else _numerics(first_cut, job)
    record = make_record(job, plan, schema, model, numerics)
    if stored is not None and stored_plan is None and record.fingerprint != stored.fingerprint and not list_parts(out_uri, "")[1]:
        raise JobError(
            f"output.uri: an earlier run stopped before it could store its plan, and job or inputs changed since; "
            f"remove {storage.join(out_uri, layout.JOB)} and run this job again"
        )
    if stored is not None and (differences := record.differences(stored)):
        raise JobError(
            f"output.uri: {out_uri} was begun by another job (fingerprint {stored.fingerprint[:8]}). What differs:\n  "
            + "\n  ".join(differences)
            + "\nRun the old job again to finish it, or give this one another output."
        )
    if stored is not None and stored.spec.output.commit == "overwrite" and job.output.commit != "overwrite":
        raise JobError(f"output.commit: {out_uri} was begun with overwrite, and its parts may be; say so again, or choose another output")
    done = committed_units(out_uri, record.fingerprint)
    if stored is None and storage.exists(storage.join(out_uri, layout.SUCCESS)):
        raise JobError(
            f"output.uri: {out_uri} holds the {layout.SUCCESS} of something else, so readers would take it for finished; remove it"
        )
    left = [unit.num_rows for unit in plan.units if unit.index not in done]
    if not left:
        cut = None
    elif first_cut is not None and not done:
        cut = first_cut  # looking at the machine takes a while where it has GPUs
    else:
        cut = cut_for(job, model, numerics, plan, sum(left))
    return Accepted(
        job=job,
        record=record,
        plan=plan,
        model=model,
        out_uri=out_uri,
        cut=cut,
        done=done,
        begun=stored is not None,
        usd_per_hour=job.limits.usd_per_hour or _profile_usd_per_hour(job, cut),
        new_objects=_new_objects(job, plan, taken) if stored is not None else (),
        changed_objects=tuple(changed_since(plan)) if stored is not None else (),
    )


def wants_json(job: JobSpec) -> bool:
    """Whether completions should be JSON: sampling says so, or this run limits those that are not."""
    structured, quality = job.sampling.structured_outputs, job.limits.quality
    asked = structured is not None and (structured.json_ is not None or bool(structured.json_object))
    return asked or (quality is not None and quality.invalid_json is not None)


def row_tokens(plan: Plan, job: JobSpec) -> int | None:
    """No shorter than most of its rows with their completions, taking two bytes of prompt for a token; None where nothing says."""
    if job.input.sampling is not None or plan.row_bytes is None:
        return None
    source = job.input.source
    fixed = (source.template if isinstance(source, PromptTemplate) else "") + (job.input.system or "")
    return math.ceil((plan.row_bytes + len(fixed.encode())) / _FEWEST_BYTES_PER_TOKEN) + job.sampling.max_tokens


def cut_for(job: JobSpec, model: Model, numerics: Mapping[str, Any], plan: Plan, rows: int | None) -> ReplicaPlan | None:
    """This machine's engines for so many rows of a plan, or for no end of them; None where the nodes of a cluster decide."""
    if job.cluster.kind in ("address", "azure-batch"):
        return None
    most = None if rows is None else rows * job.sampling.n * job.sampling.max_tokens
    length = row_tokens(plan, job)
    return cut_machine(job.engine, model, replicas=job.cluster.replicas, numerics=numerics, output_tokens=most, row_tokens=length)


def _profile_usd_per_hour(job: JobSpec, cut: ReplicaPlan | None) -> float | None:
    """Nodes of a cluster are of the profile that the job names, if it is one that is found here."""
    if cut is not None:
        return cut.usd_per_hour
    with contextlib.suppress(JobError):
        return find_profile(job.engine.profile).usd_per_hour
    return None


def _numerics(cut: ReplicaPlan | None, job: JobSpec) -> dict[str, Any]:
    """What the profile, and not the job, says of them."""
    if cut is None or job.engine.kind == "simulated":
        return {}
    names = (*NUMERICS, "max_model_len") if cut.shortened else NUMERICS  # a shorter context is what the cut found, too
    return {name: cut.options[name] for name in names if name in cut.options and name not in job.engine.options}


def stored_numerics(record: JobRecord) -> dict[str, Any]:
    """Those that a job was begun with; none where it was begun by a version, or on a cluster, that did not record them."""
    found: dict[str, Any] = record.decides["engine"].get("found", {})
    return found


def make_record(job: JobSpec, plan: Plan, schema: pa.Schema, model: Model, numerics: Mapping[str, Any]) -> JobRecord:
    """What the fingerprint covers: all that decides the output, dtype included; not cluster, replicas, batch limits or versions."""
    spec = job.model_dump(by_alias=True, exclude_unset=True, mode="json")
    spec["input"]["uri"] = [storage.absolute(uri) for uri in job.input.uris]
    spec["output"]["uri"] = storage.absolute(job.output.uri)
    if job.reuse:
        spec["reuse"] = [storage.absolute(uri) for uri in job.reuse]
    decides: dict[str, Any] = {
        "plan": plan.digest,
        "input": {"uri": spec["input"]["uri"], "schemas": job.input.schemas, "unreadable": job.input.unreadable},
        "prompt": {
            "source": job.input.source.model_dump(),
            "system": job.input.system,
            "chat": model.has_chat_template if job.input.chat is None else job.input.chat,
            "sampling": job.input.sampling,
            "too_long": job.input.too_long,
        },
        "weights": model.weights_digest,
        "tokenizer": model.tokenizer_digest,
        "chat_template": model.template_digest,
        "sampling": job.sampling.model_dump(by_alias=True, mode="json"),
        "output": {"prefix": job.output.prefix, "token_ids": job.output.token_ids},
        "engine": {
            "kind": job.engine.kind,
            "options": {name: value for name, value in sorted(job.engine.options.items()) if name not in SPEED_ONLY},
            **({"found": dict(numerics)} if numerics else {}),
        },
    }
    return JobRecord(job=spec, decides=decides, schema=encode_schema(schema), tool_version=importlib.metadata.version("tokenmill"))


def store(accepted: Accepted) -> Accepted:
    """Put job and plan into the output, or find them there from a run that was quicker. Raises JobError as `accept` does."""
    out_uri = accepted.out_uri
    storage.probe(out_uri)
    # Whoever creates the job owns the output; only then may its plan follow, or two drivers could mix theirs.
    with contextlib.suppress(FileExistsError):
        storage.create_once(storage.join(out_uri, layout.JOB), accepted.record.to_json())
    record = load_record(out_uri)
    if record is None or record.fingerprint != accepted.record.fingerprint:
        raise JobError(f"output.uri: another job began {out_uri} just now; give this one another output")
    with contextlib.suppress(FileExistsError):
        storage.create_once(storage.join(out_uri, layout.PLAN), accepted.plan.to_parquet())
    plan = load_plan(out_uri)
    if plan is None or plan.digest != accepted.plan.digest:
        raise JobError(f"output.uri: {layout.PLAN} in {out_uri} is not the plan that {layout.JOB} names; give this job another output")
    success = storage.join(out_uri, layout.SUCCESS)
    # Of an earlier run, whose parts were lost since. All is looked at again, the parts last: another driver may have completed the job
    # since this one was accepted.
    if accepted.todo and storage.exists(success) and _incomplete(accepted):
        storage.remove(success)
    return accepted


def _incomplete(accepted: Accepted) -> bool:
    """Whether a unit has no part now."""
    done = committed_units(accepted.out_uri, accepted.record.fingerprint)
    return any(unit.index not in done for unit in accepted.plan.units)


def load_record(out_uri: str) -> JobRecord | None:
    """The job that an output belongs to."""
    uri = storage.join(out_uri, layout.JOB)
    try:
        return JobRecord.from_json(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise JobError(f"output.uri: {out_uri} is a file; give a folder") from None
    except OSError as error:
        raise JobError(f"output.uri: cannot read {uri}: {error}") from error
    except ValueError as error:
        raise JobError(f"output.uri: {uri} is damaged ({error}); choose another output") from None


def load_plan(out_uri: str) -> Plan | None:
    """The plan that an output was begun with."""
    uri = storage.join(out_uri, layout.PLAN)
    try:
        return Plan.from_parquet(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JobError(f"output.uri: cannot read {uri}: {error}") from error
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise JobError(f"output.uri: {uri} is damaged ({error}); choose another output") from None


def load_job_of(out_uri: str) -> tuple[JobRecord, Plan]:
    """The job that an output belongs to, and its plan. Raises JobError where there is none."""
    record, plan = load_record(out_uri), load_plan(out_uri)
    if record is None or plan is None:
        raise JobError(f"{out_uri} holds no job ({layout.JOB} is missing); give the folder that a job writes to")
    return record, plan


def committed_units(out_uri: str, fingerprint: str) -> dict[int, int]:
    """Sizes of this job's parts by unit. Raises JobError where other Parquet files lie beside them."""
    done, foreign = list_parts(out_uri, fingerprint)
    if foreign:
        raise JobError(foreign[0])
    return done


def list_parts(out_uri: str, fingerprint: str) -> tuple[dict[int, int], list[str]]:
    """Sizes of this job's parts by unit, and a sentence about each Parquet file that is not one of them."""
    try:
        names = storage.list_names(out_uri)
    except NotADirectoryError:
        raise JobError(f"output.uri: {out_uri} is a file; give a folder") from None
    except OSError as error:
        raise JobError(f"output.uri: cannot list {out_uri}: {error}") from error
    done, foreign = {}, []
    for name, size in sorted(names.items()):
        if name.startswith((".", "_")) or not name.endswith(".parquet"):
            continue
        match = _PART_NAME.fullmatch(name)
        if match is not None and match.group(2) == fingerprint[:8]:
            done[int(match.group(1))] = size
        else:
            foreign.append(
                f"output.uri: {out_uri} holds {name}, which is not this job's (its parts end in -{fingerprint[:8]}.parquet), and readers "
                "of the folder would mix the two; move it away, or give this job another output"
            )
    return done, foreign


def _new_objects(job: JobSpec, plan: Plan, taken: Taken) -> tuple[str, ...]:
    known = set(plan.objects) | {uri for uri, _ in plan.skipped}
    try:
        return tuple(item.uri for item in untaken(job.input, taken) if item.uri not in known)
    except JobError:
        return ()  # the inputs may be gone once the job is done
