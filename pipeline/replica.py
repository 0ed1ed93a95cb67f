"""Replica: one engine, one tokenizer, one model, ready for units of any job on that model. Lives in a worker, or inline."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.engine.answers import Answers
from pipeline.engine.continuous import ContinuousEngine
from pipeline.engine.cores import core_maker
from pipeline.engine.engine import Core
from pipeline.engine.ordered import OrderedCore
from pipeline.feed import Feed
from pipeline.model import Model
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from pipeline.tools import Tools
from pipeline.unit import run_unit
from schemas import layout
from schemas.errors import TokenmillError
from schemas.errors import UnitError
from schemas.record import JobRecord
from schemas.unit import WorkUnit


class Replica:
    """Everything heavy that units share. Its methods are safe from several threads."""

    def __init__(
        self,
        *,
        name: str,
        model: Model,
        kind: str,
        options: dict[str, Any],
        flight_path: Path | None = None,
        answers_path: Path | None = None,
        spawned_at: float | None = None,
        make_core: Callable[[], Core] | None = None,
        feed: Feed | None = None,
    ) -> None:
        """Loads tokenizer and engine; its ledger counts from `spawned_at`. Raises JobError or EngineStartError.

        Replicas with the same model and options may have one file of answers. Core and feed of another making are for those who measure.
        """
        spawned_at = time.monotonic() if spawned_at is None else spawned_at
        self.name = name
        self._model, self._kind = model, kind
        self.tokenizer = load_tokenizer(model.path)
        self._feed = feed or Feed()
        make = make_core or core_maker(model, kind, options)
        self.engine = ContinuousEngine(
            lambda: OrderedCore(make(), Answers(answers_path)), flight_path=flight_path, feed=self._feed, spawned_at=spawned_at
        )
        self._tools: dict[str, Tools] = {}
        self._making = threading.Lock()
        self._running: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._active = 0
        self._changed = threading.Condition()

    def run(self, out_uri: str, fingerprint: str, unit: dict[str, Any]) -> dict[str, Any]:
        """Run one unit; its report as plain data, with the commit's outcome and what the ledger says then: about a KiB.

        Asked again for a unit that is still in flight here (a scheduler was lost, the next one sends it anew), it waits for that one.
        """
        wanted = WorkUnit.from_dict(unit)
        tag = unit_tag(out_uri, fingerprint, wanted.index)
        with self._lock:
            running, first = self._running.get(tag), tag not in self._running
            if running is None:
                running = self._running[tag] = Future()
        if not first:
            return running.result()
        try:
            with self._counted():
                report, outcome = run_unit(wanted, out_uri, self._tools_for(out_uri, fingerprint))
            with self._lock:
                self._errors.update(report.errors)
            result = {"report": asdict(report), "outcome": outcome, "said": self._said()}
        except BaseException as error:
            if isinstance(error, TokenmillError):
                error.said = self._said()
            running.set_exception(error)
            raise
        else:
            running.set_result(result)
            return result
        finally:
            with self._lock:
                del self._running[tag]

    def evict(self, timeout_s: float) -> None:
        """Take no further row; units in flight save what is finished. Waits for them."""
        self.engine.evict()
        self.wait_idle(timeout_s)

    def wait_idle(self, timeout_s: float) -> None:
        """Until no unit is in flight, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: not self._active, timeout_s)

    def status(self) -> dict[str, Any]:
        """Counters, ledger, how many rows it may hold, and the units in flight."""
        with self._lock:
            units = list(self._running)
        counters, ledger = asdict(self.engine.counters()), asdict(self.engine.reading())
        return {**counters, "ledger": ledger, "window_rows": self.engine.window_rows, "units": units}

    def errors(self) -> dict[str, int]:
        """Error rows of units that were committed here, by kind."""
        with self._lock:
            return dict(self._errors)

    def _said(self) -> dict[str, Any]:
        return {"name": self.name, "ledger": asdict(self.engine.reading())}

    def close(self) -> None:
        self.engine.close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def _tools_for(self, out_uri: str, fingerprint: str) -> Tools:
        with self._making:
            if fingerprint not in self._tools:
                self._tools = {fingerprint: self._make_tools(out_uri, fingerprint)}  # the newest job only
            return self._tools[fingerprint]

    def _make_tools(self, out_uri: str, fingerprint: str) -> Tools:
        record = JobRecord.from_json(storage.read_bytes(storage.join(out_uri, layout.JOB)))
        if record.fingerprint != fingerprint:
            raise UnitError(
                f"{out_uri} holds job {record.fingerprint[:8]}, but the driver asks for {fingerprint[:8]}; is another job at work there?"
            )
        if wrong := wrong_replica(record.decides, self._model, self._kind, self.engine.info.dtype):
            raise UnitError(f"replica {self.name} is not the one that this job needs: {wrong}; start it with the job's file or model")
        job, info = record.spec, self.engine.info
        storage.commit_as(job.output.commit)
        provenance = {
            "fingerprint": fingerprint,
            "tool_version": record.tool_version,
            **{key: record.decides[key] for key in ("weights", "tokenizer", "chat_template", "sampling", "prompt")},
            "model": job.model,
            "commit": storage.check_can_create(out_uri),
            "engine": asdict(info),
            "worker": self.name,
        }
        renderer = Renderer(self.tokenizer, job, max_model_len=info.max_model_len, seed_base=fingerprint)
        return Tools(
            record=record, job=job, engine=self.engine, feed=self._feed, renderer=renderer, worker=self.name, provenance=provenance
        )


def unit_tag(out_uri: str, fingerprint: str, unit: int) -> str:
    """Names a unit among all that a replica may hold; the same job may write to two places."""
    return f"{hashlib.sha256(f'{out_uri} {fingerprint}'.encode()).hexdigest()[:16]}-{unit}"


def wrong_replica(decides: Mapping[str, Any], model: Model, kind: str, dtype: str) -> str | None:
    """Why rows of a job, of which this decides the output, must not run on a model and an engine; None where they may."""
    for what, digest in model.digests.items():
        if decides[what] != digest:
            return f"it holds {model.path}, whose {what} has digest {digest[:8] or 'none'}, expected {decides[what][:8] or 'none'}"
    if decides["engine"]["kind"] != kind:
        return f"it runs engine {kind}, expected {decides['engine']['kind']}"
    begun_in = decides["engine"].get("found", {}).get("dtype", "auto")
    if begun_in not in ("auto", dtype):
        return f"it computes in {dtype}, and the job was begun in {begun_in} (--set engine.options.dtype={begun_in})"
    return None
