"""Origin: where an output comes from and how to make it again. Evidence in, one section out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from jobs.reporting.document import Section
from jobs.reporting.document import Table
from jobs.reporting.evidence import Evidence
from schemas.ledger import RunAccount
from schemas.record import JobRecord

_MAX_SKIPPED = 20


def provenance(evidence: Evidence) -> Section:
    """What decided the output, what made it, and the command that makes it again."""
    record, runs = evidence.record, evidence.account.runs
    decides = record.decides
    facts = [
        ("job", f"{record.spec.name}, fingerprint {record.fingerprint}"),
        ("begun by", f"Tokenmill {record.tool_version}"),
        ("model", record.spec.model),
        ("weights, sha256", _digest(decides.get("weights"))),
        ("tokenizer, sha256", _digest(decides.get("tokenizer"))),
        ("chat template, sha256", _digest(decides.get("chat_template"))),
        ("plan, sha256", _digest(decides.get("plan"))),
        ("input", f"{evidence.num_objects:,} objects: {', '.join(record.spec.input.uris)}"),
        ("sampling", _plain(decides.get("sampling", {}))),
        ("engine options that decide", _plain(decides.get("engine", {}))),
    ]
    made_by = Table(
        title="What ran",
        columns=("run", "host", "profile", "engine", "dtype", "versions"),
        num_words=6,
        rows=tuple(_ran(run) for run in runs),
    )
    options = sorted({_plain(run.engine.get("options", {})) for run in runs if run.engine})
    facts += [("engine options", text) for text in options]
    skipped = Table(
        title="Input files left out",
        columns=("file", "why"),
        num_words=2,
        rows=evidence.skipped[:_MAX_SKIPPED],
        note="" if len(evidence.skipped) <= _MAX_SKIPPED else f"The first {_MAX_SKIPPED} of {len(evidence.skipped):,}.",
    )
    return Section(
        title="Provenance and how to reproduce",
        facts=tuple(facts),
        tables=(made_by, *([skipped] if evidence.skipped else [])),
        code=(("Commands", commands(record)), ("job.yaml", job_file(record))),
    )


def commands(record: JobRecord) -> str:
    """What a shell is told. The job file names the same output, which the command finds done, or goes on with."""
    verb = "submit" if record.spec.cluster.kind == "azure-batch" else "run"
    out = shlex.quote(record.spec.output.uri)
    lines = [
        f"tokenmill {verb} job.yaml    # goes on with this output; name another under output.uri to make it anew",
        f"tokenmill verify {out}    # proves that every input row is there once",
    ]
    return "\n".join(lines)


def job_file(record: JobRecord) -> str:
    """As it was accepted, with every URI whole."""
    return yaml.safe_dump(record.job, sort_keys=False, allow_unicode=True, width=100)


def _ran(run: RunAccount) -> tuple[str, ...]:
    engine = " ".join(str(run.engine[key]) for key in ("kind", "version") if run.engine.get(key)) or "not known"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return (run.run, run.host, run.profile, engine, str(run.engine.get("dtype", "not known")), versions)


def _digest(value: Any) -> str:
    return str(value) if value else "none"


def _plain(values: Mapping[str, Any]) -> str:
    """One line of `name value` pairs; what is not set is left out."""
    pairs = [(name, value) for name, value in values.items() if value not in (None, {}, [])]
    return (
        ", ".join(f"{name} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}" for name, value in pairs) or "none"
    )
