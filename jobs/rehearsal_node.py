"""The process of one rehearsed node: its replicas and their Dask workers, all in one, and a meter beside them.

On a real node every replica has a process of its own. Seventy-two of those are too many for the machine that rehearses, so here
a node's replicas share one Python: their CPU seconds are the same, and they wait for each other's lock more than real ones would.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.rack import length_of
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.simulated import SimulatedCore
from pipeline.engine.simulated import prompt_hash
from pipeline.feed import Feed
from pipeline.membership import serve
from pipeline.model import Model
from pipeline.replica import Replica
from pipeline.worker import WorkerConfig
from pipeline.worker import end_with_parent
from pipeline.worker import introduction
from schemas.job import SimulatedOptions
from schemas.prompts import RowError

_SAY_S = 0.5
_HTTP_LOGGER = "azure.core.pipeline.policies.http_logging_policy"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig:
    """What the process is told, in a JSON file."""

    workers: list[dict[str, Any]]
    """A WorkerConfig for each replica."""
    length_scale: float
    """See jobs.rack."""
    meter: str
    """The file that it writes."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """CPU seconds of one such process, and its requests to storage."""

    process_s: float = 0.0
    by_kind: dict[str, float]
    """Of the units' threads."""
    owner_s: float = 0.0
    """Of the engines' owner threads, simulation included."""
    simulated_s: float = 0.0
    requests: int = 0
    peak_mb: float = 0.0

    def since(self, before: Reading) -> Reading:
        return Reading(
            process_s=self.process_s - before.process_s,
            by_kind={kind: seconds - before.by_kind.get(kind, 0.0) for kind, seconds in self.by_kind.items()},
            owner_s=self.owner_s - before.owner_s,
            simulated_s=self.simulated_s - before.simulated_s,
            requests=self.requests - before.requests,
            peak_mb=self.peak_mb,
        )


def read_meter(path: Path) -> Reading | None:
    """Since its replicas were up, as of the last half second; None before that."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return Reading(**said["now"]).since(Reading(**said["up"]))


class MeteredFeed(Feed):
    """Also adds up the CPU seconds of the units' threads by kind of work."""

    def __init__(self) -> None:
        super().__init__()
        self._marks = threading.local()
        self._cpu_lock = threading.Lock()
        self._cpu_s: defaultdict[str, float] = defaultdict(float)

    def move(self, before: str | None, after: str | None, now: float) -> None:
        super().move(before, after, now)
        cpu_s = time.thread_time()
        if before is not None:
            with self._cpu_lock:
                self._cpu_s[before] += cpu_s - self._marks.cpu_s
        self._marks.cpu_s = cpu_s

    def cpu_s(self) -> dict[str, float]:
        with self._cpu_lock:
            return dict(self._cpu_s)


class RehearsedCore(SimulatedCore):
    """A simulated core whose rows become as long as the record's, and which knows what it costs itself."""

    def __init__(self, options: SimulatedOptions, *, vocab_size: int, max_model_len: int, scale: float) -> None:
        super().__init__(options, vocab_size=vocab_size, max_model_len=max_model_len)
        self._scale = scale
        self.own_s = 0.0
        """CPU seconds of the simulation."""
        self.owner_s = 0.0
        """CPU seconds of the thread that owns it, as of the last step."""

    def add(self, key: int, request: Request) -> RowError | None:
        began = time.thread_time()
        try:
            return super().add(key, request)
        finally:
            self.own_s += time.thread_time() - began

    def step(self) -> list[tuple[int, Generation]]:
        began = time.thread_time()
        finished = super().step()
        self.owner_s = time.thread_time()
        self.own_s += self.owner_s - began
        return finished

    def tokens_inside(self) -> int:
        began = time.thread_time()
        inside = super().tokens_inside()
        self.own_s += time.thread_time() - began
        return inside

    def _length(self, request: Request) -> int:
        room = min(request.sampling.max_tokens, self._max_model_len - len(request.token_ids))
        return length_of(prompt_hash(request, 0), self._scale, room)


class _Requests(logging.Handler):
    """Counts what Azure's SDK logs of its HTTP requests: one record each, and one of its answer."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith("Request URL")


def count_requests() -> Callable[[], int]:
    """From now on, of this process; returns what says how many."""
    handler, logger = _Requests(), logging.getLogger(_HTTP_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return lambda: handler.count


def main(config_path: str) -> int:
    """Until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    gc.disable()  # as in pipeline.worker
    config = NodeConfig(**json.loads(Path(config_path).read_text()))
    workers = [WorkerConfig(**worker) for worker in config.workers]
    requests = count_requests()
    model = Model(**workers[0].model)
    cores: list[RehearsedCore] = []
    feeds = [MeteredFeed() for _ in workers]
    replicas = [_replica(worker, model, feed, cores, config.length_scale) for worker, feed in zip(workers, feeds, strict=True)]
    gc.freeze()
    gc.enable()

    def reading() -> Reading:
        by_kind: defaultdict[str, float] = defaultdict(float)
        for feed in feeds:
            for kind, seconds in feed.cpu_s().items():
                by_kind[kind] += seconds
        return Reading(
            process_s=time.process_time(),
            by_kind=dict(by_kind),
            owner_s=sum(core.owner_s for core in cores),
            simulated_s=sum(core.own_s for core in cores),
            requests=requests(),
            peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )

    threading.Thread(target=_say, args=(Path(config.meter), reading), name="meter", daemon=True).start()
    asyncio.run(_live(workers, model, replicas))
    return 0


def _replica(worker: WorkerConfig, model: Model, feed: Feed, cores: list[RehearsedCore], scale: float) -> Replica:
    options = SimulatedOptions.model_validate(worker.options)

    def make_core() -> RehearsedCore:
        cores.append(RehearsedCore(options, vocab_size=model.vocab_size, max_model_len=model.max_position_embeddings, scale=scale))
        return cores[-1]

    return Replica(
        name=worker.name,
        model=model,
        kind=worker.kind,
        options=worker.options,
        flight_path=worker.flight_path,
        answers_path=Path(worker.folder, "answers.db"),
        spawned_at=worker.spawned_at,
        make_core=make_core,
        feed=feed,
    )


async def _live(workers: list[WorkerConfig], model: Model, replicas: list[Replica]) -> None:
    said = [introduction(worker, model, replica, start_s=0.0) for worker, replica in zip(workers, replicas, strict=True)]
    pairs = zip(workers, replicas, said, strict=True)
    await asyncio.gather(*(serve(worker, replica, words, lambda text: print(text, flush=True)) for worker, replica, words in pairs))


def _say(path: Path, reading: Callable[[], Reading]) -> None:
    up, temporary = asdict(reading()), path.with_suffix(".tmp")
    while True:
        temporary.write_text(json.dumps({"up": up, "now": asdict(reading())}))
        os.replace(temporary, path)
        time.sleep(_SAY_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
