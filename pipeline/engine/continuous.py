"""An Engine out of a Core: one owner thread, one continuous batch for all callers, admission bounded by rows."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.engine.engine import Core
from pipeline.engine.engine import EngineCounters
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.engine import as_generation
from pipeline.engine.engine import generated_tokens
from pipeline.engine.ledger import Ledger
from pipeline.feed import Feed
from pipeline.flight import NOBODY
from pipeline.flight import FlightRecorder
from pipeline.flight import Mark
from pipeline.flight import Tag
from schemas.errors import EngineDead
from schemas.errors import EngineEvicted
from schemas.errors import EngineStartError
from schemas.ledger import Reading

_WINDOW_BATCHES = 2
"""Rows admitted per row of the engine's batch: enough waiting to refill every freed slot at once, and no more."""
_WIDE_BATCHES = 8
"""Likewise where rows differ in what they may become: the longest of so many begin early enough to end with the others. In the
Azure conversation trace the longest completions are five times the mean."""
WIDER = _WIDE_BATCHES // _WINDOW_BATCHES
_IDLE_POLL_S = 0.5
_ROOM_POLL_S = 1.0
_CLOSE_TIMEOUT_S = 30


class _Gate:
    """Counts rows in the engine against a limit; opens for good when the engine is dead, so that nobody waits for ever."""

    def __init__(self, limit: int) -> None:
        self._free = self._limit = limit
        self._changed = threading.Condition()
        self._open = False
        self._alone: object | None = None  # whose rows alone may enter

    def enter(self, who: object, limit: int, wait: bool) -> bool:
        """One more row, where fewer than `limit` are inside."""
        with self._changed:
            while not self._open and (self._limit - self._free >= limit or self._alone not in (None, who)):
                if not wait:
                    return False
                self._changed.wait()
            self._free -= 0 if self._open else 1
            return True

    def leave(self, num_rows: int = 1) -> None:
        with self._changed:
            self._free += num_rows
            self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, who: object) -> Iterator[None]:
        """Inside, nobody else's row is in the engine; entered once those that are there have left."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._alone is None)
            self._alone = who
            self._changed.wait_for(lambda: self._open or self._free == self._limit)
        try:
            yield
        finally:
            with self._changed:
                self._alone = None
                self._changed.notify_all()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


Answer = TypeVar("Answer")
Outbox = queue.SimpleQueue[Generation | EngineDead]


@dataclass(frozen=True, slots=True)
class _Admitted:
    key: int
    request: Request
    outbox: Outbox
    mark: Mark


@dataclass(frozen=True, slots=True)
class _Abandon:
    outbox: Outbox


@dataclass(frozen=True, slots=True)
class _Borrow:
    work: Callable[[Core], None]
    refuse: Callable[[EngineDead], None]


@dataclass(frozen=True, slots=True)
class _Evict:
    """Give every row back as far as it is."""


_Message = _Admitted | _Abandon | _Borrow | _Evict


def window_rows(max_num_seqs: int, *, wide: bool = False) -> int:
    """Rows that an engine with such a batch takes in at once."""
    return (_WIDE_BATCHES if wide else _WINDOW_BATCHES) * max_num_seqs


class ContinuousEngine:
    """Runs a Core in its own thread, which is the only one that ever touches it."""

    def __init__(
        self, make_core: Callable[[], Core], *, flight_path: Path | None = None, feed: Feed | None = None, spawned_at: float | None = None
    ) -> None:
        """Starts the core in the owner thread; raises what it raises. What is inside is recorded at `flight_path`.

        The ledger counts from `spawned_at` (monotonic seconds; by default now), and hears from the feed what its callers do.
        """
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._keys = itertools.count()
        self._waiting: dict[int, _Admitted] = {}
        self._ready: list[tuple[int, Generation]] = []
        """Answers that were known, or refused, on arrival."""
        self._dead: EngineDead | None = None
        self._door = threading.Lock()  # between the last message that is taken in and the engine's end
        self._rows = self._prompt_tokens = self._completion_tokens = 0
        self._made = (0, 0)
        """Rows and tokens when the flight record last moved."""
        self._feed = feed or Feed()
        self._spawned_at = time.monotonic() if spawned_at is None else spawned_at
        self._ledger: Ledger
        self._flight_path = flight_path
        self._recorder: FlightRecorder | None = None
        self._slots: dict[int, int | None] = {}
        started: queue.SimpleQueue[Core | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._own, args=(make_core, started), name="engine", daemon=True)
        self._thread.start()
        outcome = started.get()
        if isinstance(outcome, BaseException):
            raise outcome
        self._info = outcome.info
        self._gate = _Gate(window_rows(outcome.info.max_num_seqs, wide=True))

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def window_rows(self) -> int:
        """Rows that may be in the engine at once."""
        return window_rows(self._info.max_num_seqs)

    @property
    def dead(self) -> EngineDead | None:
        return self._dead

    def counters(self) -> EngineCounters:
        return EngineCounters(
            rows=self._rows,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            in_flight=len(self._waiting),
        )

    def reading(self) -> Reading:
        """Where this engine's seconds went until now."""
        return self._ledger.read(time.monotonic(), kept_tokens=self._feed.kept_tokens)

    def generate(
        self, requests: Iterable[Request], *, tag: Tag | None = None, alone: bool = False, wide: bool = False
    ) -> Iterator[Generation]:
        """See Engine.generate."""
        outbox: Outbox = queue.SimpleQueue()
        mark = self._recorder.mark(tag) if self._recorder is not None and tag is not None else NOBODY
        with self._gate.alone(outbox) if alone else contextlib.nullcontext():
            yield from self._generate(iter(requests), outbox, mark, window_rows(self._info.max_num_seqs, wide=wide))

    def _generate(self, source: Iterator[Request], outbox: Outbox, mark: Mark, window_rows: int) -> Iterator[Generation]:
        exhausted, pending = False, 0
        try:
            while pending or not exhausted:
                # Finished rows are handed on before new ones are pulled, or a quick engine would pile them up here;
                # and room is waited for only with nothing of our own to wait for.
                while not exhausted and outbox.empty() and self._gate.enter(outbox, window_rows, wait=pending == 0):
                    request = None
                    try:
                        request = next(source, None)
                    finally:
                        if request is None:
                            self._gate.leave()
                    if request is None:
                        exhausted = True
                        break
                    self._send(_Admitted(next(self._keys), request, outbox, mark))
                    pending += 1
                if not pending:
                    continue
                try:  # others may make room while our own rows are still inside
                    answer = outbox.get(timeout=None if exhausted else _ROOM_POLL_S)
                except queue.Empty:
                    continue
                if isinstance(answer, EngineDead):
                    raise answer
                pending -= 1
                yield answer
        finally:
            if pending:
                with contextlib.suppress(EngineDead):
                    self._send(_Abandon(outbox))

    def borrow(self, work: Callable[[Core], Answer]) -> Answer:
        """Run `work` on the bare core in the owner thread; for benchmarks of the engine alone. Only while no row is in it."""
        outcome: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()

        def guarded(core: Core) -> None:
            try:
                outcome.put(work(core))
            except BaseException as error:  # raised in the caller below
                outcome.put(error)

        self._send(_Borrow(guarded, outcome.put))
        answer = outcome.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def evict(self) -> None:
        """Stop between two steps: callers get finished rows, then EngineEvicted with how far the others are. Returns at once."""
        with contextlib.suppress(EngineDead):
            self._send(_Evict())

    def close(self) -> None:
        """Rows still inside are lost; their callers get EngineDead."""
        self._inbox.put(None)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)

    def _send(self, message: _Message) -> None:
        """Raises EngineDead where nobody would take the message in any more."""
        with self._door:
            if self._dead is not None:
                raise self._dead
            self._inbox.put(message)

    def _own(self, make_core: Callable[[], Core], started: queue.SimpleQueue[Core | BaseException]) -> None:
        try:
            core = make_core()
        except BaseException as error:  # handed to the constructor's caller, which raises it
            started.put(error)
            return
        if self._flight_path is not None:
            try:
                self._recorder = FlightRecorder(self._flight_path, window_rows(core.info.max_num_seqs, wide=True))
            except OSError as error:
                core.close()
                started.put(EngineStartError(f"cannot write {self._flight_path}: {error}"))
                return
        self._ledger = Ledger(
            engine=uuid.uuid4().hex[:16],
            batch_rows=core.info.max_num_seqs,
            spawned_at=self._spawned_at,
            now=time.monotonic(),
            blocked_s=self._feed.blocked_s,
        )
        started.put(core)
        try:
            while self._turn(core):
                pass
            if self._dead is None:
                self._die(EngineDead(f"the engine was closed with {len(self._waiting)} rows in it"))
            core.close()
        except BaseException as error:
            self._ledger.stop(time.monotonic())
            self._die(EngineDead(f"the engine died with {len(self._waiting)} rows in it: {type(error).__name__}: {error}"))
            raise

    def _turn(self, core: Core) -> bool:
        """Take in what waits, work for one step. False when closed."""
        idle, admitting = not core.busy, False
        while True:
            try:
                message = self._inbox.get(timeout=_IDLE_POLL_S) if idle and not (core.busy or self._ready) else self._inbox.get_nowait()
            except queue.Empty:
                break
            if not isinstance(message, _Admitted):
                self._hand_on()
            if message is None:
                return False
            if isinstance(message, _Evict):
                self._leave(core)
                return False
            if isinstance(message, _Borrow):
                message.work(getattr(core, "bare", core))
            elif isinstance(message, _Abandon):
                self._abandon(core, message.outbox)
            else:
                if not admitting:
                    admitting = True
                    self._ledger.admit(time.monotonic())
                self._waiting[message.key] = message
                if self._recorder is not None:
                    if idle:
                        self._recorder.moved()
                    self._slots[message.key] = self._recorder.enter(message.mark, message.request.position)
                outcome = core.add(message.key, message.request)
                if outcome is not None:
                    self._ready.append((message.key, as_generation(message.request, outcome)))
        self._hand_on()
        if admitting:
            self._ledger.advance(time.monotonic(), core.num_rows, core.tokens_inside)
        if core.busy:
            for key, generation in core.step():
                self._finish(key, generation)
        self._ledger.advance(time.monotonic(), core.num_rows, core.tokens_inside)
        self._note_progress(admitting)
        return True

    def _hand_on(self) -> None:
        """What needs no step. Not as it comes: room that is free at once could fill as fast, and the core would never make its step."""
        for key, generation in self._ready:
            self._finish(key, generation)
        self._ready.clear()

    def _note_progress(self, admitted: bool) -> None:
        """The record moves with rows and tokens, not with steps, of which an engine that spins makes many.

        The ledger counts tokens every second or so. While nothing but a long prompt is prefilled, none is made: that may take as long
        as a silence.
        """
        made = self._rows, self._ledger.generated_tokens
        if self._recorder is not None and (admitted or made != self._made):
            self._recorder.moved()
        self._made = made

    def _finish(self, key: int, generation: Generation) -> None:
        admitted = self._waiting.pop(key, None)
        if admitted is None:
            return
        self._rows += 1
        self._prompt_tokens += len(admitted.request.token_ids)
        self._completion_tokens += generation.num_tokens
        self._ledger.finish(len(admitted.request.token_ids), generated_tokens(admitted.request, generation))
        if self._recorder is not None:
            self._recorder.leave(self._slots.pop(key))
        self._gate.leave()
        admitted.outbox.put(generation)

    def _abandon(self, core: Core, outbox: Outbox) -> None:
        gone = [key for key, admitted in self._waiting.items() if admitted.outbox is outbox]
        before = core.tokens_inside() if gone else 0
        for key in gone:
            core.abort(key)
            del self._waiting[key]
            if self._recorder is not None:
                self._recorder.leave(self._slots.pop(key), finished=False)
        if gone:
            self._ledger.throw_away(before - core.tokens_inside())
        self._gate.leave(len(gone))

    def _leave(self, core: Core) -> None:
        """Every caller gets its own unfinished rows' tokens."""
        begun: dict[int, tuple[Outbox, dict[int, list[int]]]] = {}
        for key, admitted in self._waiting.items():
            _, tokens = begun.setdefault(id(admitted.outbox), (admitted.outbox, {}))
            tokens[admitted.request.position] = core.begun(key)
        self._ledger.throw_away(core.tokens_inside())  # callers say which of them they keep
        self._ledger.advance(time.monotonic(), 0, lambda: 0)
        message = f"the engine was asked to leave with {len(self._waiting)} rows in it"
        self._waiting.clear()  # what is said below is all that their callers hear
        with self._door:
            self._dead = EngineEvicted(message)
        for outbox, tokens in begun.values():
            outbox.put(EngineEvicted(message, tokens))
        self._die(self._dead)

    def _die(self, error: EngineDead) -> None:
        with self._door:
            self._dead = error
        self._gate.open()
        for outbox in {id(admitted.outbox): admitted.outbox for admitted in self._waiting.values()}.values():
            outbox.put(error)
        while True:
            try:
                late = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(late, _Admitted):
                late.outbox.put(error)
            elif isinstance(late, _Borrow):
                late.refuse(error)
