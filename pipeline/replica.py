"""Replica: one engine, one tokenizer, one model, ready for units of any job on that model. Lives in a worker, or inline."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.engine.continuous import ContinuousEngine
from pipeline.engine.engine import Core
from pipeline.model import Model
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from pipeline.tools import Tools
from pipeline.unit import run_unit
from schemas import layout
from schemas.errors import UnitError
from schemas.job import SimulatedOptions
from schemas.record import JobRecord
from schemas.unit import WorkUnit


class Replica:
    """Everything heavy that units share. Its methods are safe from several threads."""

    def __init__(self, *, name: str, model: Model, kind: str, options: dict[str, Any], flight_path: Path | None = None) -> None:
        """Loads tokenizer and engine. Raises JobError or EngineStartError."""
        self.name = name
        self._model, self._kind = model, kind
        self.tokenizer = load_tokenizer(model.path)
        self.engine = ContinuousEngine(_core_maker(model, kind, options), flight_path=flight_path)
        self._tools: dict[str, Tools] = {}
        self._making = threading.Lock()
        self._running: dict[str, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._active = 0
        self._changed = threading.Condition()

    def run(self, out_uri: str, fingerprint: str, unit: dict[str, Any]) -> dict[str, Any]:
        """Run one unit; its report as plain data, under a KiB, with the commit's outcome.

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
            result = {"report": asdict(report), "outcome": outcome}
        except BaseException as error:
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
        """Counters, how many rows it may hold, and the units in flight."""
        with self._lock:
            units = list(self._running)
        return {**asdict(self.engine.counters()), "window_rows": self.engine.window_rows, "units": units}

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
        if wrong := wrong_replica(record.decides, self._model, self._kind):
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
        return Tools(record=record, job=job, engine=self.engine, renderer=renderer, worker=self.name, provenance=provenance)


def unit_tag(out_uri: str, fingerprint: str, unit: int) -> str:
    """Names a unit among all that a replica may hold; the same job may write to two places."""
    return f"{hashlib.sha256(f'{out_uri} {fingerprint}'.encode()).hexdigest()[:16]}-{unit}"


def wrong_replica(decides: Mapping[str, Any], model: Model, kind: str) -> str | None:
    """Why rows of a job, of which this decides the output, must not run on a model and an engine; None where they may."""
    for what, digest in model.digests.items():
        if decides[what] != digest:
            return f"it holds {model.path}, whose {what} has digest {digest[:8] or 'none'}, expected {decides[what][:8] or 'none'}"
    if decides["engine"]["kind"] != kind:
        return f"it runs engine {kind}, expected {decides['engine']['kind']}"
    return None


def _core_maker(model: Model, kind: str, options: dict[str, Any]) -> Callable[[], Core]:
    if kind == "simulated":
        from pipeline.engine.simulated import SimulatedCore

        chosen = SimulatedOptions.model_validate(options)
        return lambda: SimulatedCore(chosen, vocab_size=model.vocab_size, max_model_len=model.max_position_embeddings)

    def make() -> Core:
        from pipeline.engine.vllm import VllmCore  # imports vllm: 10 to 20 s

        return VllmCore(model_path=model.path, options=options)

    return make
