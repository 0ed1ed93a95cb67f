"""OrderedCore: a Core before another one, which gets no more rows than its batch takes, in a better order, and no row twice.

Requests go in and their generations come out as with any Core. Rows of jobs that want it (Request.ordered) wait on a shelf
(order.py), and those whose answer is known, or is being generated at this moment, are answered with a copy (answers.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from pipeline.engine.answers import Answers
from pipeline.engine.answers import answer_key
from pipeline.engine.engine import Core
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.engine import as_generation
from pipeline.engine.engine import may_go_on
from pipeline.engine.order import Shelf

_RESERVE_SHARE = 8
"""The core holds an eighth of its batch more than fits, so that freed places are taken within its step."""

_PATIENCE_BATCHES = 16
"""Rows that may overtake one, in batches."""


class OrderedCore:
    """Owned by one thread, like the core that it has."""

    def __init__(self, core: Core, answers: Answers) -> None:
        self.bare = core
        self._answers = answers
        self._room = core.info.max_num_seqs + max(1, core.info.max_num_seqs // _RESERVE_SHARE)
        self._shelf = Shelf(patience_rows=_PATIENCE_BATCHES * core.info.max_num_seqs)
        self._plain: deque[int] = deque()
        self._owners: dict[int, list[tuple[int, Request]]] = {}
        """Who waits for what is generated under a key, the first of them not necessarily under its own."""
        self._leader: dict[int, int] = {}
        """The key under which a row's answer is generated."""
        self._answer_keys: dict[int, bytes] = {}
        self._leaders: dict[bytes, int] = {}
        self._inside: set[int] = set()

    @property
    def info(self) -> EngineInfo:
        return self.bare.info

    @property
    def busy(self) -> bool:
        return bool(self._owners)

    @property
    def num_rows(self) -> int:
        return len(self._owners)

    def add(self, key: int, request: Request) -> Generation | None:
        answer_to = answer_key(request) if request.ordered else None
        if answer_to is not None:
            choices = self._answers.get(answer_to)
            if choices is not None:
                return Generation(position=request.position, choices=choices, copied=True)
            leader = self._leaders.get(answer_to)
            if leader is not None:
                self._owners[leader].append((key, request))
                self._leader[key] = leader
                return None
            self._leaders[answer_to], self._answer_keys[key] = key, answer_to
        self._owners[key], self._leader[key] = [(key, request)], key
        if request.ordered:
            self._shelf.put(key, request)
        else:
            self._plain.append(key)
        return None

    def abort(self, key: int) -> None:
        leader = self._leader.pop(key, None)
        if leader is None:
            return
        self._owners[leader] = [owner for owner in self._owners[leader] if owner[0] != key]
        if not self._owners[leader]:
            if leader in self._inside:
                self.bare.abort(leader)
            self._forget(leader)

    def begun(self, key: int) -> list[int]:
        leader = self._leader[key]
        if leader in self._inside:
            return self.bare.begun(leader)
        request = self._owners[leader][0][1]
        return list(request.begun) if may_go_on(request.sampling) else []

    def tokens_inside(self) -> int:
        return self.bare.tokens_inside()

    def step(self) -> list[tuple[int, Generation]]:
        finished = self._feed()
        if self.bare.busy:
            for leader, generation in self.bare.step():
                finished += self._answered(leader, generation)
        return finished

    def close(self) -> None:
        self._answers.close()
        self.bare.close()

    def _feed(self) -> list[tuple[int, Generation]]:
        """Give the core what it has room for; rows that it does not take in are done."""
        answered = []
        while len(self._inside) < self._room and (self._plain or self._shelf):
            if self._plain:
                key = self._plain.popleft()
                if key not in self._owners:
                    continue
                request = self._owners[key][0][1]
            else:
                key, request = self._shelf.take()
            self._inside.add(key)
            outcome = self.bare.add(key, request)
            if outcome is not None:
                answered += self._answered(key, as_generation(request, outcome))
        return answered

    def _answered(self, leader: int, generation: Generation) -> list[tuple[int, Generation]]:
        if leader not in self._owners:
            return []
        if generation.error is None and (answer_to := self._answer_keys.get(leader)) is not None:
            self._answers.put(answer_to, generation.choices)
        owners = self._owners[leader]
        copied = replace(generation, copied=generation.error is None, cached_prompt_tokens=0)
        out = [(key, replace(copied if number else generation, position=request.position)) for number, (key, request) in enumerate(owners)]
        for key, _ in owners:
            self._leader.pop(key, None)
        self._forget(leader)
        return out

    def _forget(self, leader: int) -> None:
        """Nothing is generated under this key any more."""
        del self._owners[leader]
        self._inside.discard(leader)
        if leader in self._shelf:
            self._shelf.remove(leader)
        answer_to = self._answer_keys.pop(leader, None)
        if answer_to is not None and self._leaders.get(answer_to) == leader:
            del self._leaders[answer_to]
