"""How a job stands, from storage alone: parts by listing, the rest as the driver last said."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from jobs.accept import committed_units
from jobs.accept import load_job_of
from jobs.drain import ask_to_drain
from jobs.driver import Progress
from jobs.plan import Plan
from jobs.progress import Speed
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.ledger import RunAccount

STALE_AFTER_S = 60.0
"""A driver that runs says so every few seconds."""


_SAID: dict[str, tuple[type, ...]] = {
    "state": (str,), "updated_at": (int, float), "host": (str,), "error_rows": (int,), "output_tokens_per_s": (int, float),
    "eta_s": (int, float, type(None)), "failed_units": (dict,), "replicas": (list,),
}  # fmt: skip
"""What is read of status.json, which anybody may have written."""
GOES_ON = ("starting", "running", "draining")
"""States in which a driver is at work."""
_MAY_RUN = (*GOES_ON, "new", "interrupted")
LATEST = f"{layout.BATCH}/latest.json"
"""See jobs.batch_run.Latest."""
_MAX_EXAMPLES = 3
_HICCUP_S = 60.0
"""Stores that throttle, or move a partition, answer again within seconds."""
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


def write_status(out_uri: str, progress: Progress, speed: Speed, account: RunAccount | None = None, *, metrics: Sequence[str] = ()) -> None:
    """What `tokenmill status` shows from elsewhere, with addresses of metrics, and the run's account in case it cannot store it."""
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
        "metrics": list(metrics),
        "canary": progress.canary,
    }
    if account is not None:
        said["account"] = account.model_dump(mode="json")
    storage.replace(storage.join(out_uri, layout.STATUS), json.dumps(said).encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """What stays the same of a job that was begun."""

    name: str
    fingerprint: str
    plan: Plan
    num_rows: int


def read_status(out_uri: str, *, now: float | None = None) -> Status:
    """What is committed is listed. Raises JobError where there is no job, or it cannot be read."""
    out_uri = storage.absolute(out_uri)
    return _status(out_uri, _begun(out_uri), now=now or time.time(), by_listing=True)


class StatusReader:
    """Reads the status of one output again and again, for little, however many its units are.

    Job and plan are parsed anew only where their objects are others, and while a driver speaks its own word for what is committed is
    taken, which is seconds old.
    """

    def __init__(self, out_uri: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out_uri, self._clock = storage.absolute(out_uri), clock
        self._parsed: tuple[tuple[str, ...], _Begun] | None = None
        self._failing_since: float | None = None

    def read(self, *, now: float | None = None) -> Status:
        """Raises JobError as read_status, and OSError where the store does not answer."""
        try:
            versions = tuple(_version(storage.join(self._out_uri, name)) for name in (layout.JOB, layout.PLAN))
            if self._parsed is None or self._parsed[0] != versions:
                self._parsed = versions, _begun(self._out_uri)
            found = _status(self._out_uri, self._parsed[1], now=now or time.time(), by_listing=False)
        except (JobError, OSError):
            self._failing_since = self._clock() if self._failing_since is None else self._failing_since
            raise
        self._failing_since = None
        return found

    @property
    def hopeless(self) -> bool:
        """Whether reading has failed for so long that it is no hiccup of the store."""
        return self._failing_since is not None and self._clock() - self._failing_since >= _HICCUP_S


def _begun(out_uri: str) -> _Begun:
    record, plan = load_job_of(out_uri)
    return _Begun(name=record.spec.name, fingerprint=record.fingerprint, plan=plan, num_rows=plan.num_rows)


def _version(uri: str) -> str:
    """Empty where the object is not there, or its store does not answer: whoever reads it then says why."""
    try:
        return storage.info(uri).version
    except OSError:
        return ""


def _status(out_uri: str, begun: _Begun, *, now: float, by_listing: bool) -> Status:
    said = _said(out_uri)
    age_s = now - said["updated_at"] if said else None
    state = said.get("state", "new")
    speaks = state in GOES_ON and age_s is not None and age_s <= STALE_AFTER_S
    if state in GOES_ON and not speaks:
        state = "interrupted"
    closed = storage.exists(storage.join(out_uri, layout.SUCCESS))
    done = _counted(said, begun) if speaks and not closed and not by_listing else None
    units_done, rows_done = done or _listed(out_uri, begun)
    if closed:
        state = "complete" if units_done == len(begun.plan.units) else "interrupted"  # or parts were lost since
    return Status(
        name=begun.name,
        fingerprint=begun.fingerprint,
        out_uri=out_uri,
        state=state,
        units_done=units_done,
        units=len(begun.plan.units),
        rows_done=rows_done,
        rows=begun.num_rows,
        said=said,
        age_s=age_s,
    )


def _counted(said: dict[str, Any], begun: _Begun) -> tuple[int, int] | None:
    """Units and rows that are committed, as the driver has it; None where it does not say so, or says what cannot be."""
    units, rows = said.get("units_done"), said.get("rows_done")
    if isinstance(units, int) and isinstance(rows, int) and 0 <= units <= len(begun.plan.units) and 0 <= rows <= begun.num_rows:
        return units, rows
    return None


def _listed(out_uri: str, begun: _Begun) -> tuple[int, int]:
    """The same by the parts that are there."""
    done = committed_units(out_uri, begun.fingerprint)
    return len(done), sum(unit.num_rows for unit in begun.plan.units if unit.index in done)


def _said(out_uri: str) -> dict[str, Any]:
    """The driver's last word; empty where there is none, or none that can be understood."""
    try:
        said = json.loads(storage.read_bytes(storage.join(out_uri, layout.STATUS)))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    whole = isinstance(said, dict) and all(key in said and isinstance(said[key], kinds) for key, kinds in _SAID.items())
    return said if whole and abs(said["updated_at"]) < _FAR_S and abs(said["eta_s"] or 0) < _FAR_S else {}


def cancel(out_uri: str) -> str:
    """Ask the job's driver to drain; it looks every few seconds. Returns the job's state. Raises JobError where there is no job.

    Asks also where none seems to be at work: it may not have spoken yet, or this machine's clock may be off. No later run heeds it.
    """
    status = read_status(out_uri)
    if status.state in _MAY_RUN:
        ask_to_drain(status.out_uri)
    return status.state


def cancel_words(state: str) -> str:
    """For people: what came of `cancel`, given the state that it returned."""
    if state in GOES_ON:
        return "asked to drain; `tokenmill status` shows when it has"
    if state in _MAY_RUN:
        return f"the job is {state}: no driver has spoken of late, by this machine's clock. Asked to drain, in case one is at work"
    return f"nothing to cancel: the job is {state}"


def on_batch(out_uri: str) -> bool:
    """Whether a run on Azure Batch was submitted that writes there; jobs.batch_standing knows how it stands."""
    try:
        return storage.exists(storage.join(storage.absolute(out_uri), LATEST))
    except OSError:
        return False  # whoever reads the status then says why
