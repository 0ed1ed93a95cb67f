"""A Core that takes the time a real engine would and makes up the tokens. For rehearsals and fault tests; no model, no torch.

Prefill and decode each run at a stated rate; decoding is shared by all rows in the batch, so that rows leave and join
as in continuous batching. Tokens and lengths are a fixed function of the prompt.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.engine import may_go_on
from schemas.job import SimulatedOptions
from schemas.prompts import RowError

_MIN_SLEEP_S = 0.002
"""Shorter waits are saved up: the system's timer is no finer."""
_MAX_SLEEP_S = 0.25
"""A step is no longer than this, as a real one is not, so that the engine can be asked to leave."""
_FIRST_TEXT_TOKEN = 256
"""Made-up ids start here, above the special and byte tokens that Llama tokenizers put first."""


class SimulatedCore:
    """Rates in, made-up tokens out. Owned by one thread."""

    def __init__(self, options: SimulatedOptions, *, vocab_size: int, max_model_len: int) -> None:
        self._options = options
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[tuple[float, int]] = []  # (tokens per row at which it finishes, key): a heap
        self._requests: dict[int, Request] = {}
        self._lengths: dict[int, int] = {}  # of their answers; a look at the whole prompt each, which a thousand rows cannot afford often
        self._tokens_per_row = 0.0  # decoded by every running row since the start: the batch's common clock
        self._now = time.monotonic()  # how far simulated work has come; never ahead of real time by more than a sleep
        time.sleep(options.start_s)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            kind="simulated",
            version="1",
            dtype="none",
            max_model_len=self._max_model_len,
            max_num_seqs=self._options.max_num_seqs,
            options=self._options.model_dump(),
        )

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_rows(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, key: int, request: Request) -> RowError | None:
        if not self.busy:
            self._now = time.monotonic()
        if len(request.token_ids) >= self._max_model_len:
            return RowError(kind="prompt_too_long", message=f"{len(request.token_ids)} tokens, limit {self._max_model_len - 1}")
        self._waiting.append((key, request))
        return None

    def abort(self, key: int) -> None:
        self._waiting = deque(item for item in self._waiting if item[0] != key)
        self._running = [item for item in self._running if item[1] != key]
        heapq.heapify(self._running)
        self._requests.pop(key, None)
        self._lengths.pop(key, None)

    def begun(self, key: int) -> list[int]:
        request = self._requests.get(key)
        if request is None or not may_go_on(request.sampling):
            return []
        (finish_at,) = [at for at, running in self._running if running == key]
        (choice,) = self._generation(request, self._lengths[key]).choices
        return choice.token_ids[: max(0, len(choice.token_ids) - math.ceil(finish_at - self._tokens_per_row))]

    def tokens_inside(self) -> int:
        left = sum(finish_at - self._tokens_per_row for finish_at, _ in self._running)
        whole = sum((self._lengths[key] - len(request.begun)) * request.sampling.n for key, request in self._requests.items())
        return max(0, math.floor(whole - left))

    def step(self) -> list[tuple[int, Generation]]:
        """Admit what fits, then decode until the next rows finish, or for a moment."""
        while self._waiting and len(self._running) < self._options.max_num_seqs:
            key, request = self._waiting.popleft()
            if self._options.dies_on_token in request.token_ids:
                os.abort()
            while self._options.hangs_on_token in request.token_ids:
                time.sleep(60)
            self._now += (len(request.token_ids) + len(request.begun)) / self._options.prefill_tokens_per_s
            self._requests[key], self._lengths[key] = request, self._length(request)
            left = (self._lengths[key] - len(request.begun)) * request.sampling.n
            heapq.heappush(self._running, (self._tokens_per_row + left, key))
        per_row_s = len(self._running) / self._options.decode_tokens_per_s
        most = max(0.0, time.monotonic() + _MAX_SLEEP_S - self._now) / per_row_s
        reached = min(self._running[0][0], self._tokens_per_row + most)
        self._now += (reached - self._tokens_per_row) * per_row_s
        self._tokens_per_row = reached
        ahead = self._now - time.monotonic()
        if ahead > _MIN_SLEEP_S:
            time.sleep(min(ahead, _MAX_SLEEP_S))
        finished = []
        while self._running and self._running[0][0] <= reached:
            _, key = heapq.heappop(self._running)
            finished.append((key, self._generation(self._requests.pop(key), self._lengths.pop(key))))
        return finished

    def close(self) -> None:
        self._waiting.clear()

    def _length(self, request: Request) -> int:
        room = min(request.sampling.max_tokens, self._max_model_len - len(request.token_ids))
        if self._options.lengths == "max" or request.sampling.ignore_eos:
            return room
        least = min(max(1, request.sampling.min_tokens), room)
        return least + prompt_hash(request, 0) % (room - least + 1)

    def _generation(self, request: Request, length: int) -> Generation:
        limit = min(request.sampling.max_tokens, self._max_model_len - len(request.token_ids))
        first = min(_FIRST_TEXT_TOKEN, self._vocab_size - 1)
        span = self._vocab_size - first
        choices = []
        for index in range(request.sampling.n):
            start = prompt_hash(request, index + 1)
            ids = [first + (start + step * 7919) % span for step in range(length)]
            logprobs = None
            if request.sampling.logprobs is not None:
                logprobs = [{"token_id": token, "logprob": 0.0, "top": []} for token in ids]
            reason = "length" if length == limit else "stop"
            choices.append(GeneratedChoice(token_ids=ids, finish_reason=reason, logprobs=logprobs))
        return Generation(position=request.position, choices=tuple(choices))


def prompt_hash(request: Request, salt: int) -> int:
    """32 bits, evenly spread, that depend on prompt and seed alone."""
    return zlib.crc32(repr((request.token_ids, request.seed, salt)).encode())


def follow(ready: Callable[[dict[str, Any]], None]) -> None:
    """Another node of the engine: it makes nothing up, and stays."""
    ready({"kind": "simulated", "dtype": "none"})
    threading.Event().wait()
