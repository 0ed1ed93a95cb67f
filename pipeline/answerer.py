"""Answerer: a model in an engine's precision, and the key under which it answers a request. Pure; knows no job, no row and no batch.

Two requests with one key have one answer, whichever job, output, row or replica they belong to: as far as rows have answers of
their own at all, for other batches add floating point numbers in another order.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from typing import Any

from pipeline.engine.engine import Request
from schemas.sampling import Sampling

KEY_BYTES = 16
_DIGESTS = ("weights", "tokenizer", "chat_template")
_ELSEWHERE = {"max_tokens", "seed"}
"""Of the sampling: what counts is how many tokens there is room for, and the row's own seed."""


class Answerer:
    """Makes keys. Safe from several threads."""

    def __init__(self, decides: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
        """Of a job, what its record says decides the output; of an engine, its EngineInfo as plain data."""
        self._max_model_len = int(engine["max_model_len"])
        own = {name: decides[name] for name in _DIGESTS}
        own |= {"kind": engine["kind"], "dtype": engine["dtype"], "kv": str(engine["options"].get("kv_cache_dtype", "auto"))}
        self._begin = hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=KEY_BYTES)
        self._last: tuple[Sampling | None, bytes] = (None, b"")

    def key(self, request: Request) -> bytes:
        """Of all that decides the answer: model, precision, token ids, sampling, seed, and how long the answer may become."""
        digest = self._begin.copy()
        # Where the context ends before max_tokens does, it is the context's end that cuts the answer.
        room = min(request.sampling.max_tokens, self._max_model_len - len(request.token_ids))
        digest.update(f"{len(request.token_ids)}:{room}:{request.seed}:".encode())
        digest.update(array("q", request.token_ids).tobytes())
        digest.update(self._sampling(request.sampling))
        return digest.digest()

    def _sampling(self, sampling: Sampling) -> bytes:
        """Most rows have their job's."""
        last, text = self._last
        if last is not sampling:
            text = sampling.model_dump_json(by_alias=True, exclude=_ELSEWHERE).encode()
            self._last = (sampling, text)
        return text
