"""Order: which waiting row an engine takes next. Requests in, one at a time out; knows no engine and no unit.

Rows that may become longest go first, so that no long row is left running alone at the end; among rows of one length, those that
begin alike stay together, for a prefix cache; else it is the order of arrival. No row is overtaken for ever.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque

from pipeline.engine.engine import Request

_DEPTHS = (128, 512, 2048)
"""Rows whose first so many tokens are the same share work in a prefix cache: all have a system prompt, some of them a document too."""


class Shelf:
    """Waiting rows by key; one is overtaken by so many others at most."""

    def __init__(self, *, patience_rows: int) -> None:
        self._patience_rows = patience_rows
        self._requests: dict[int, tuple[int, Request, list[tuple[int, int]]]] = {}  # arrival, row, its prefixes
        self._arrivals: deque[tuple[int, int]] = deque()
        self._sorted: list[tuple[int, ...]] = []  # (-length, first arrival of the prefix at each depth, arrival, key): a heap
        self._prefixes: dict[tuple[int, int], tuple[int, int]] = {}  # depth and hash of a prefix: its first arrival, rows that wait
        self._next = itertools.count()
        self._taken = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: int) -> bool:
        return key in self._requests

    def put(self, key: int, request: Request) -> None:
        arrival = next(self._next)
        firsts, prefixes = [], _prefixes(request)
        for prefix in prefixes:
            first, rows = self._prefixes.get(prefix, (arrival, 0))
            self._prefixes[prefix] = (first, rows + 1)
            firsts.append(first)
        self._requests[key] = (arrival, request, prefixes)
        self._arrivals.append((arrival, key))
        heapq.heappush(self._sorted, (-_may_become(request), *firsts, arrival, key))

    def take(self) -> tuple[int, Request]:
        """The next row. Raises IndexError where none waits."""
        while self._arrivals and not self._waits(*self._arrivals[0]):
            self._arrivals.popleft()
        if self._arrivals and self._taken - self._arrivals[0][0] >= self._patience_rows:
            _, key = self._arrivals.popleft()
        else:
            while True:
                *_, arrival, key = heapq.heappop(self._sorted)
                if self._waits(arrival, key):
                    break
        self._taken += 1
        return key, self.remove(key)

    def remove(self, key: int) -> Request:
        """Take a certain row away."""
        _, request, prefixes = self._requests.pop(key)
        for prefix in prefixes:
            first, rows = self._prefixes.pop(prefix)
            if rows > 1:
                self._prefixes[prefix] = (first, rows - 1)
        return request

    def _waits(self, arrival: int, key: int) -> bool:
        return key in self._requests and self._requests[key][0] == arrival


def _may_become(request: Request) -> int:
    """Tokens that a row may still generate."""
    return request.sampling.max_tokens - len(request.begun)


def _prefixes(request: Request) -> list[tuple[int, int]]:
    return [(depth, hash(tuple(request.token_ids[:depth]))) for depth in _DEPTHS]
