"""How a job stands, from storage alone: parts by listing, the rest as the driver last said."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from jobs.accept import committed_units
from jobs.accept import load_job_of
from jobs.driver import Progress
from jobs.progress import Speed
from pipeline import storage
from schemas import layout
from schemas.ledger import RunAccount

STALE_AFTER_S = 60.0
"""A driver that runs says so every few seconds."""


_SAID: dict[str, tuple[type, ...]] = {
    "state": (str,), "updated_at": (int, float), "host": (str,), "error_rows": (int,), "output_tokens_per_s": (int, float),
    "eta_s": (int, float, type(None)), "failed_units": (dict,), "replicas": (list,),
}  # fmt: skip
"""What is read of status.json, which anybody may have written."""
_MAX_EXAMPLES = 3
_FAR_S = 1e12
"""Seconds beyond any clock, and not NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What storage knows of a job."""

    name: str
    fingerprint: str
    out_uri: str
    state: str
    """The driver's last word; `interrupted` where it stopped speaking, `new` where none ever ran."""
    units_done: int
    units: int
    rows_done: int
    rows: int
    said: dict[str, Any]
    """The driver's last status.json; empty where there is none."""
    age_s: float | None
    """How old that is."""


def write_status(out_uri: str, progress: Progress, speed: Speed, account: RunAccount | None = None) -> None:
    """What `tokenmill status` shows from elsewhere, and the run's account in case it does not live to store it."""
    totals = progress.totals
    said = {
        "state": progress.state,
        "updated_at": time.time(),
        "began_at": progress.began_at,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "units_done": progress.done_before + totals.units,
        "rows_done": progress.rows_before + totals.rows,
        "error_rows": totals.error_rows,
        "errors": totals.errors,
        "examples": totals.examples[:_MAX_EXAMPLES],
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "reused_tokens": totals.reused_tokens,
        "output_tokens_per_s": round(speed.tokens_per_s, 1),
        "eta_s": None if speed.eta_s is None else round(speed.eta_s),
        "failed_units": {str(unit): reason for unit, reason in list(progress.failed.items())[:10]},
        "replicas": [asdict(replace(replica, ledger=None, engine={})) for replica in progress.replicas],
        "usd": None if progress.usd is None else round(progress.usd, 4),
        "dashboard": progress.dashboard,
        "canary": progress.canary,
    }
    if account is not None:
        said["account"] = account.model_dump(mode="json")
    storage.replace(storage.join(out_uri, layout.STATUS), json.dumps(said).encode())


def read_status(out_uri: str, *, now: float | None = None) -> Status:
    """Raises JobError where there is no job."""
    out_uri = storage.absolute(out_uri)
    record, plan = load_job_of(out_uri)
    done = committed_units(out_uri, record.fingerprint)
    said = _said(out_uri)
    age_s = (now or time.time()) - said["updated_at"] if said else None
    state = said.get("state", "new")
    if state in ("starting", "running", "draining") and age_s is not None and age_s > STALE_AFTER_S:
        state = "interrupted"
    if storage.exists(storage.join(out_uri, layout.SUCCESS)):
        state = "complete" if len(done) == len(plan.units) else "interrupted"  # or parts were lost since
    return Status(
        name=record.spec.name,
        fingerprint=record.fingerprint,
        out_uri=out_uri,
        state=state,
        units_done=len(done),
        units=len(plan.units),
        rows_done=sum(unit.num_rows for unit in plan.units if unit.index in done),
        rows=plan.num_rows,
        said=said,
        age_s=age_s,
    )


def _said(out_uri: str) -> dict[str, Any]:
    """The driver's last word; empty where there is none, or none that can be understood."""
    try:
        said = json.loads(storage.read_bytes(storage.join(out_uri, layout.STATUS)))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    whole = isinstance(said, dict) and all(key in said and isinstance(said[key], kinds) for key, kinds in _SAID.items())
    return said if whole and abs(said["updated_at"]) < _FAR_S and abs(said["eta_s"] or 0) < _FAR_S else {}


def cancel(out_uri: str) -> str:
    """Ask the job's driver to drain; it looks every few seconds. Returns the job's state. Raises JobError where there is no job."""
    status = read_status(out_uri)
    if status.state in ("starting", "running", "draining"):
        storage.replace(storage.join(status.out_uri, layout.DRAIN), str(time.time()).encode())
    return status.state
