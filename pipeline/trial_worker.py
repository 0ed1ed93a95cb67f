"""The process of one replica in a trial: an engine's Core and the bare loop around it; see pipeline.trial, which starts it.

Talks in JSON over a connection that it inherits; ends when whoever holds its standard input does.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from pipeline.engine.cores import core_maker
from pipeline.engine.engine import Core
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.worker import EXIT_ENGINE_DEAD
from pipeline.worker import EXIT_START_FAILED
from pipeline.worker import end_with_parent
from pipeline.worker import start_reaper
from schemas.errors import EngineError
from schemas.errors import TokenmillError
from schemas.prompts import RowError
from schemas.sampling import Sampling


def main(descriptor: str) -> int:
    """Start an engine, say so, then run rounds until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    line = Connection(int(descriptor))
    code = EXIT_START_FAILED
    try:
        order = _hear(line)
        if order["kind"] == "vllm":
            start_reaper()
        core = core_maker(Model(**order["model"]), order["kind"], order["options"])()
        _tell(line, ready=asdict(core.info))
        code, keys = EXIT_ENGINE_DEAD, itertools.count()
        while True:
            _round(line, core, keys)
    except EOFError:
        return 0
    except Exception as error:  # the process's outermost: whatever it was, its parent must hear of it
        traceback.print_exc()
        _tell(line, failed=str(error) if isinstance(error, TokenmillError) else f"{type(error).__name__}: {error}")
        return code


def _round(line: Connection, core: Core, keys: Iterator[int]) -> None:
    while "requests" not in (order := _hear(line)):
        pass  # a stop that came after the end of the last round
    requests = [_unpacked(item) for item in order["requests"]]
    kept: list[Generation] = []

    def take(finished: list[Generation]) -> None:
        if order["keep"]:
            kept.extend(finished)
        if order["stream"]:
            _tell(line, finished=[_packed(generation) for generation in finished])

    _tell(line, loaded=len(requests))
    _hear(line)  # the barrier
    done = drive(
        core,
        requests,
        keys,
        stop_after_s=order["stop_after_s"],
        tick_s=order["tick_s"],
        on_finished=take,
        on_tick=lambda tick: _tell(line, tick=tick),
        asked_to_stop=line.poll,
    )
    _tell(line, done={**done, "kept": [_packed(generation) for generation in kept]})


def drive(
    core: Core,
    requests: Sequence[Request],
    keys: Iterator[int],
    *,
    stop_after_s: float | None,
    tick_s: float | None,
    on_finished: Callable[[list[Generation]], None],
    on_tick: Callable[[dict[str, Any]], None],
    asked_to_stop: Callable[[], bool],
) -> dict[str, Any]:
    """The bare loop: all requests in at once, then steps until none is left, the time is over, or it is asked to stop.

    Returns counts and the monotonic times of begin and end; `on_tick` hears the counts every `tick_s`. Keys are never used twice.
    Raises EngineError where a row cannot be done.
    """
    waiting: dict[int, Request] = {}
    rows = prompt_tokens = output_tokens = 0

    def counts() -> dict[str, Any]:
        begun = {key: len(core.begun(key)) for key in waiting}
        return {
            "rows": rows,
            "prompt_tokens": prompt_tokens + sum(len(waiting[key].token_ids) for key, tokens in begun.items() if tokens),
            "output_tokens": output_tokens + sum(begun.values()),
        }

    began = ended = time.monotonic()
    next_tick = began + (tick_s or 0.0)
    for key, request in zip(keys, requests, strict=False):
        if isinstance(error := core.add(key, request), RowError):
            raise EngineError(f"row {request.position}: {error.message}")
        waiting[key] = request
    while core.busy and not asked_to_stop() and (stop_after_s is None or ended < began + stop_after_s):
        finished = core.step()
        ended = time.monotonic()
        for key, generation in finished:
            if generation.error is not None:
                raise EngineError(f"row {generation.position}: {generation.error.message}")
            rows += 1
            prompt_tokens += len(waiting.pop(key).token_ids)
            output_tokens += generation.num_tokens
        if finished:
            on_finished([generation for _, generation in finished])
        if tick_s is not None and ended >= next_tick:
            next_tick = ended + tick_s
            on_tick(counts())
    result = {**counts(), "began": began, "ended": ended, "stopped": bool(waiting)}
    for key in waiting:
        core.abort(key)
    return result


def _hear(line: Connection) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(line.recv_bytes())
    return said


def _tell(line: Connection, **said: Any) -> None:
    line.send_bytes(json.dumps(said).encode())


def _packed(generation: Generation) -> list[Any]:
    return [generation.position, [[choice.token_ids, choice.finish_reason, choice.text] for choice in generation.choices]]


def _unpacked(item: list[Any]) -> Request:
    position, token_ids, sampling, seed = item
    return Request(position=position, token_ids=token_ids, sampling=Sampling.model_validate(sampling), seed=seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
