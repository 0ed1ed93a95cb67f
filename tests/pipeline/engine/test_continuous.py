"""The continuous engine: one batch for all callers, every request answered once, and no caller left waiting for ever."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.answers import Answers
from pipeline.engine.continuous import ContinuousEngine
from pipeline.engine.engine import Core
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.ordered import OrderedCore
from pipeline.engine.simulated import SimulatedCore
from pipeline.flight import Tag
from pipeline.flight import read_flight
from schemas.errors import EngineDead
from schemas.errors import EngineError
from schemas.errors import EngineEvicted
from schemas.errors import EngineStartError
from schemas.job import SimulatedOptions
from schemas.prompts import RowError
from schemas.sampling import Sampling
from tests.commands import wait_until

# The owner thread raises what killed its core, for the log's sake; pytest turns that into a warning.
dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

PATIENCE_S = 20.0
"""Of a test that would otherwise hang; never waited for where things are right."""


class SmallCore:
    """Finishes the oldest request at each step once `ready` is set. Counts what it holds."""

    def __init__(self, max_num_seqs: int = 4, *, ready: bool = True) -> None:
        self.max_num_seqs = max_num_seqs
        self.held: dict[int, Request] = {}
        self.most_held = 0
        self.aborted: list[int] = []
        self.closed = False
        self.ready = threading.Event()
        self.took = threading.Semaphore(0)
        self.gone = threading.Semaphore(0)
        if ready:
            self.ready.set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(kind="small", version="1", dtype="none", max_model_len=100, max_num_seqs=self.max_num_seqs)

    @property
    def busy(self) -> bool:
        return bool(self.held)

    @property
    def num_rows(self) -> int:
        return len(self.held)

    def add(self, key: int, request: Request) -> RowError | None:
        if not request.token_ids:
            return RowError(kind="empty_prompt", message="no tokens")
        self.held[key] = request
        self.most_held = max(self.most_held, len(self.held))
        self.took.release()
        return None

    def abort(self, key: int) -> None:
        self.aborted.append(self.held.pop(key).position)
        self.gone.release()

    def begun(self, key: int) -> list[int]:
        return [9] * (self.held[key].position + 1)

    def tokens_inside(self) -> int:
        return 0

    def step(self) -> list[tuple[int, Generation]]:
        if not self.ready.wait(0.01):
            return []
        key = next(iter(self.held))
        request = self.held.pop(key)
        return [(key, Generation(position=request.position, choices=(GeneratedChoice(token_ids=[1, 2], finish_reason="stop"),)))]

    def close(self) -> None:
        self.closed = True


class DyingCore(SmallCore):
    """Answers `answers` requests, then raises."""

    def __init__(self, answers: int = 0, *, ready: bool = True) -> None:
        super().__init__(ready=ready)
        self.answers = answers

    def step(self) -> list[tuple[int, Generation]]:
        if not self.ready.wait(0.01):
            return []
        if self.answers == 0:
            raise RuntimeError("CUDA error: an illegal memory access")
        self.answers -= 1
        return super().step()


class PickyCore(SmallCore):
    """Answers rows below 100 once `first_may_go`, the others once `all_may_go`."""

    def __init__(self) -> None:
        super().__init__(max_num_seqs=2)
        self.both, self.another = threading.Semaphore(0), threading.Event()
        self.first_may_go, self.all_may_go = threading.Event(), threading.Event()

    def add(self, key: int, request: Request) -> RowError | None:
        error = super().add(key, request)
        if request.position == 100:
            self.both.release()
        if request.position == 101:
            self.another.set()
        return error

    def step(self) -> list[tuple[int, Generation]]:
        for key, request in list(self.held.items()):
            if self.all_may_go.is_set() or (request.position < 100 and self.first_may_go.is_set()):
                del self.held[key]
                return [(key, Generation(position=request.position, choices=(GeneratedChoice(token_ids=[1], finish_reason="stop"),)))]
        self.all_may_go.wait(0.01)
        return []


class HaltingCore(SmallCore):
    """Stays in its step while it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.halted, self.may_go = threading.Event(), threading.Event()
        self.may_go.set()

    def step(self) -> list[tuple[int, Generation]]:
        if self.may_go.is_set():
            return super().step()
        self.halted.set()
        self.may_go.wait(PATIENCE_S)
        return []


class SpinningCore(SmallCore):
    """Makes steps without end, and tokens once it is told to, but never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.tokens = 0
        self.makes_tokens = threading.Event()

    def tokens_inside(self) -> int:
        return self.tokens

    def step(self) -> list[tuple[int, Generation]]:
        self.steps += 1
        self.tokens += self.makes_tokens.is_set()
        return []


class RefusingCore(SmallCore):
    """Raises where it should say why it cannot take a request."""

    def add(self, key: int, request: Request) -> RowError | None:
        raise MemoryError("no room")


def ask(position: int, num_tokens: int = 3) -> Request:
    return Request(position=position, token_ids=[5] * num_tokens, sampling=Sampling(max_tokens=8))


@pytest.fixture
def start() -> Iterator[Callable[[Core], ContinuousEngine]]:
    """Start an engine on a core; closed after the test."""
    engines: list[ContinuousEngine] = []

    def begin(core: Core) -> ContinuousEngine:
        engines.append(ContinuousEngine(lambda: core))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()


Start = Callable[[Core], ContinuousEngine]


def outcome_of(work: Callable[[], Any]) -> Any:
    """What it returns or raises."""
    try:
        return work()
    except Exception as error:
        return error


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each returned or raised. Fails where one does not come back."""
    outcomes: dict[int, Any] = {}

    def run(index: int) -> None:
        outcomes[index] = outcome_of(works[index])

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(outcomes) == list(range(len(works))), "a caller hangs"
    return [outcomes[index] for index in range(len(works))]


def positions(generations: Iterator[Generation] | list[Generation]) -> list[int]:
    return [generation.position for generation in generations]


def simulated(**options: Any) -> SimulatedCore:
    rates = {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "max_num_seqs": 4, **options}
    return SimulatedCore(SimulatedOptions(**rates), vocab_size=300, max_model_len=100)


@pytest.mark.parametrize("make", [SmallCore, simulated], ids=["small", "simulated"])
def test_every_request_is_answered_once(start: Start, make: Callable[[], Core]) -> None:
    engine = start(make())
    assert sorted(positions(engine.generate(ask(position) for position in range(200)))) == list(range(200))
    assert engine.counters().rows == 200
    assert engine.counters().in_flight == 0


def test_no_requests_are_no_answers(start: Start) -> None:
    assert list(start(SmallCore()).generate([])) == []


@pytest.mark.parametrize("make", [SmallCore, simulated], ids=["small", "simulated"])
def test_callers_in_several_threads_get_their_own_answers(start: Start, make: Callable[[], Core]) -> None:
    engine = start(make())

    def caller(number: int) -> Callable[[], list[int]]:
        rows = range(number * 1000, number * 1000 + 100)
        return lambda: sorted(positions(engine.generate(ask(row) for row in rows)))

    answers = in_threads(*[caller(number) for number in range(6)])
    assert answers == [list(range(number * 1000, number * 1000 + 100)) for number in range(6)]
    assert engine.counters().rows == 600


def test_two_callers_share_one_batch(start: Start) -> None:
    core = SmallCore(max_num_seqs=4, ready=False)
    engine = start(core)

    def release() -> None:
        for _ in range(6):
            assert core.took.acquire(timeout=PATIENCE_S)
        core.ready.set()

    in_threads(lambda: list(engine.generate([ask(1), ask(2), ask(3)])), lambda: list(engine.generate([ask(4), ask(5), ask(6)])), release)
    assert core.most_held == 6


def test_a_request_that_the_core_refuses_is_answered_with_its_error(start: Start) -> None:
    answers = {made.position: made for made in start(SmallCore()).generate([ask(1), ask(2, num_tokens=0), ask(3)])}
    assert sorted(answers) == [1, 2, 3]
    assert answers[2] == Generation(position=2, error=RowError(kind="empty_prompt", message="no tokens"))
    assert answers[1].error is None


@pytest.mark.parametrize("callers", [1, 3])
def test_the_window_is_never_exceeded(start: Start, callers: int) -> None:
    core = SmallCore(max_num_seqs=4)
    engine = start(core)
    in_threads(*[lambda: list(engine.generate(ask(row) for row in range(100)))] * callers)
    assert engine.window_rows == 8
    assert 0 < core.most_held <= 8


def test_requests_are_pulled_only_as_there_is_room(start: Start) -> None:
    core = SmallCore(max_num_seqs=2, ready=False)
    engine, pulled = start(core), list[int]()

    def source() -> Iterator[Request]:
        for row in range(50):
            pulled.append(row)
            yield ask(row)

    answers = engine.generate(source())

    def release() -> int:
        for _ in range(4):
            assert core.took.acquire(timeout=PATIENCE_S)
        seen = len(pulled)
        core.ready.set()
        return seen

    assert in_threads(lambda: len(list(answers)), release) == [50, 4]


def test_rows_pulled_ahead_of_their_answers_never_exceed_the_window(start: Start) -> None:
    pulled, answered, most = 0, 0, 0

    def source() -> Iterator[Request]:
        nonlocal pulled, most
        for row in range(100):
            pulled += 1
            most = max(most, pulled - answered)
            yield ask(row)

    engine = start(SmallCore(max_num_seqs=4))
    for _ in engine.generate(source()):
        answered += 1
    assert (pulled, answered) == (100, 100)
    assert most <= engine.window_rows + 1  # the one in hand


@pytest.mark.slow
def test_room_that_others_free_is_taken_while_a_callers_own_rows_are_still_inside(start: Start) -> None:
    """Otherwise one long row of one unit leaves the engine all but idle after the other units are done."""
    core = PickyCore()
    engine = start(core)

    def others() -> list[int]:
        return positions(engine.generate([ask(1), ask(2), ask(3)]))

    def caller() -> list[int]:
        for _ in range(3):
            assert core.took.acquire(timeout=PATIENCE_S)  # the others' three are inside: one place is left
        return positions(engine.generate([ask(100), ask(101), ask(102)]))

    def release() -> bool:
        assert core.both.acquire(timeout=PATIENCE_S)
        core.first_may_go.set()
        came_in = core.another.wait(PATIENCE_S)
        core.all_may_go.set()
        return came_in

    answers, own, came_in = in_threads(others, caller, release)
    assert (sorted(answers), sorted(own)) == ([1, 2, 3], [100, 101, 102])
    assert came_in


def test_an_abandoned_caller_frees_its_room_and_its_rows(start: Start) -> None:
    core = SmallCore(max_num_seqs=2)
    engine = start(core)
    abandoned = engine.generate(ask(row) for row in range(1000, 1100))
    next(abandoned)
    abandoned.close()
    (answers,) = in_threads(lambda: positions(engine.generate(ask(row) for row in range(20))))
    assert sorted(answers) == list(range(20))
    assert engine.counters().in_flight == 0
    assert core.held == {}


def test_abandoning_over_and_over_leaks_no_room(start: Start) -> None:
    core = SmallCore(max_num_seqs=2, ready=False)
    engine = start(core)

    def failing_source() -> Iterator[Request]:
        yield from (ask(1), ask(2), ask(3))
        raise ValueError("the input cannot be read")

    for _ in range(5):  # three of four places each time, and none of the rows is ever answered
        core.ready.clear()
        (failed,) = in_threads(lambda: list(engine.generate(failing_source())))
        assert isinstance(failed, ValueError)
        core.ready.set()
        in_threads(lambda: list(engine.generate([ask(9)])))  # once it is answered, the owner has heard of the abandoned
    (answers,) = in_threads(lambda: positions(engine.generate(ask(row) for row in range(20))))
    assert sorted(answers) == list(range(20))
    assert core.most_held <= engine.window_rows


def test_an_abandoned_callers_rows_are_aborted_and_the_others_stay(start: Start) -> None:
    core = SmallCore(max_num_seqs=4, ready=False)
    engine = start(core)
    started = threading.Event()

    def failing_source() -> Iterator[Request]:
        yield ask(1)
        yield ask(2)
        started.wait(PATIENCE_S)
        raise ValueError("the input cannot be read")

    def other() -> list[int]:
        return positions(engine.generate([ask(7), ask(8)]))

    def release() -> None:
        for _ in range(4):
            assert core.took.acquire(timeout=PATIENCE_S)
        started.set()
        assert core.gone.acquire(timeout=PATIENCE_S)
        assert core.gone.acquire(timeout=PATIENCE_S)
        core.ready.set()

    failed, answers, _ = in_threads(lambda: list(engine.generate(failing_source())), other, release)
    assert isinstance(failed, ValueError)
    assert sorted(answers) == [7, 8]
    assert sorted(core.aborted) == [1, 2]


def test_what_the_source_raises_reaches_its_caller_and_frees_its_room(start: Start) -> None:
    engine = start(SmallCore(max_num_seqs=1))

    def source() -> Iterator[Request]:
        yield ask(0)
        raise ValueError("the input cannot be read")

    for _ in range(5):
        with pytest.raises(ValueError, match="the input cannot be read"):
            list(engine.generate(source()))
    (answers,) = in_threads(lambda: positions(engine.generate([ask(1), ask(2), ask(3)])))
    assert sorted(answers) == [1, 2, 3]


@dies
@pytest.mark.parametrize("core", [DyingCore(), DyingCore(answers=5), RefusingCore()], ids=["at once", "after five", "on arrival"])
def test_a_dying_core_raises_in_its_caller_and_in_every_later_one(start: Start, core: Core) -> None:
    engine = start(core)

    def caller() -> list[Generation]:
        return list(engine.generate(ask(row) for row in range(100)))

    for _ in range(3):
        (outcome,) = in_threads(caller)
        assert isinstance(outcome, EngineDead)
    assert isinstance(engine.dead, EngineDead)


@dies
def test_a_dying_core_raises_in_every_caller_and_says_why(start: Start) -> None:
    core = DyingCore(ready=False)
    engine = start(core)

    def kill() -> None:
        for _ in range(6):
            assert core.took.acquire(timeout=PATIENCE_S)
        core.ready.set()

    def caller() -> list[Generation]:
        return list(engine.generate([ask(1), ask(2)]))

    *outcomes, _ = in_threads(caller, caller, caller, kill)
    assert [type(outcome) for outcome in outcomes] == [EngineDead] * 3
    expected = "the engine died with 6 rows in it: RuntimeError: CUDA error: an illegal memory access"
    assert {str(outcome) for outcome in outcomes} == {expected}


@dies
def test_a_dying_core_wakes_callers_that_wait_for_room(start: Start) -> None:
    core = DyingCore(ready=False)
    engine = start(core)

    def kill() -> None:
        for _ in range(engine.window_rows):
            assert core.took.acquire(timeout=PATIENCE_S)
        core.ready.set()

    def caller() -> list[Generation]:
        return list(engine.generate(ask(row) for row in range(100)))

    *outcomes, _ = in_threads(*[caller] * 5, kill)
    assert [type(outcome) for outcome in outcomes] == [EngineDead] * 5


@dies
def test_no_caller_hangs_whenever_the_core_dies() -> None:
    """Death against arrival, many times, with threads switched as often as they can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for answers in range(60):
            engine = ContinuousEngine(lambda answers=answers: DyingCore(answers=answers % 7))

            def caller(engine: ContinuousEngine = engine) -> list[Generation]:
                return list(engine.generate(ask(row) for row in range(50)))

            assert [type(outcome) for outcome in in_threads(caller, caller, caller)] == [EngineDead] * 3
            engine.close()
    finally:
        sys.setswitchinterval(interval)


@dies
def test_a_request_that_arrives_as_the_core_dies_is_not_waited_for(start: Start) -> None:
    """The moment between a caller's look at the engine's health and its message, held open while the core dies."""
    engine = start(DyingCore())
    keys = engine._keys

    def late_caller() -> list[Generation]:
        return list(engine.generate([ask(2)]))

    class Keys:
        """Numbers requests; the late caller's only when the owner thread is gone, or waits for that caller itself."""

        def __next__(self) -> int:
            if threading.current_thread() is late:
                looked.set()
                engine._thread.join(0.5)
            return next(keys)

    looked, outcomes = threading.Event(), list[Any]()
    engine._keys = Keys()  # type: ignore[assignment]
    late = threading.Thread(target=lambda: outcomes.append(outcome_of(late_caller)), daemon=True)
    late.start()
    assert looked.wait(PATIENCE_S)
    assert isinstance(outcome_of(lambda: list(engine.generate([ask(1)]))), EngineDead)
    late.join(PATIENCE_S)
    assert [type(outcome) for outcome in outcomes] == [EngineDead]


@pytest.mark.parametrize(
    "error", [EngineStartError("no GPU"), ValueError("bad option"), SystemExit(3)], ids=lambda error: type(error).__name__
)
def test_what_the_cores_constructor_raises_is_raised(error: BaseException) -> None:
    def fail() -> Core:
        raise error

    with pytest.raises(type(error)) as caught:
        ContinuousEngine(fail)
    assert caught.value is error


def test_the_core_is_touched_by_one_thread_only() -> None:
    threads: set[str] = set()

    class Watched(SmallCore):
        def add(self, key: int, request: Request) -> RowError | None:
            threads.add(threading.current_thread().name)
            return super().add(key, request)

        def step(self) -> list[tuple[int, Generation]]:
            threads.add(threading.current_thread().name)
            return super().step()

        def close(self) -> None:
            threads.add(threading.current_thread().name)
            super().close()

    def make() -> Core:
        threads.add(threading.current_thread().name)
        return Watched()

    engine = ContinuousEngine(make)
    in_threads(*[lambda: list(engine.generate(ask(row) for row in range(20)))] * 3)
    engine.close()
    assert threads == {"engine"}


def test_closing_closes_the_core() -> None:
    core = SmallCore()
    engine = ContinuousEngine(lambda: core)
    list(engine.generate([ask(1)]))
    engine.close()
    engine.close()
    assert core.closed


def test_a_closed_engine_refuses_callers_rather_than_letting_them_wait() -> None:
    engine = ContinuousEngine(SmallCore)
    engine.close()
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome_of(lambda: list(engine.generate([ask(1)])))), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert outcomes, "the caller hangs"
    assert isinstance(outcomes[0], EngineError)


def test_closing_wakes_callers_whose_rows_are_inside() -> None:
    core = SmallCore(ready=False)
    engine = ContinuousEngine(lambda: core)
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome_of(lambda: list(engine.generate([ask(1)])))), daemon=True)
    thread.start()
    assert core.took.acquire(timeout=PATIENCE_S)
    engine.close()
    thread.join(PATIENCE_S)
    assert outcomes, "the caller hangs"
    assert isinstance(outcomes[0], EngineError)


def test_counters_add_up_over_callers(start: Start) -> None:
    engine = start(SmallCore())
    in_threads(*[lambda: list(engine.generate([ask(1, num_tokens=3), ask(2, num_tokens=0)]))] * 2)
    counters = engine.counters()
    assert (counters.rows, counters.prompt_tokens, counters.completion_tokens, counters.in_flight) == (4, 6, 4, 0)


def test_the_engine_shows_its_cores_info(start: Start) -> None:
    assert start(SmallCore(max_num_seqs=3)).info == SmallCore(max_num_seqs=3).info


TAG = Tag(out_uri="/out", fingerprint="f" * 64, unit=1)


def test_an_evicted_engine_hands_over_what_is_finished_then_how_far_the_others_are(start: Start) -> None:
    core = PickyCore()
    engine = start(core)
    answers = engine.generate([ask(1), ask(100), ask(101)])
    core.first_may_go.set()
    assert next(answers).position == 1
    assert core.another.wait(PATIENCE_S)
    engine.evict()
    with pytest.raises(EngineEvicted) as found:
        next(answers)
    assert found.value.begun == {100: [9] * 101, 101: [9] * 102}
    assert isinstance(engine.dead, EngineEvicted)
    assert outcome_of(lambda: list(engine.generate([ask(2)]))).begun == {}
    engine.close()
    assert core.closed


def test_each_caller_of_an_evicted_engine_hears_of_its_own_rows_and_none_hangs(start: Start) -> None:
    core = SmallCore(max_num_seqs=4, ready=False)
    engine = start(core)

    def evict() -> None:
        for _ in range(8):  # the window is full, one caller has rows waiting outside
            assert core.took.acquire(timeout=PATIENCE_S)
        engine.evict()

    first, second, _ = in_threads(
        lambda: list(engine.generate(map(ask, range(6)))), lambda: list(engine.generate(map(ask, range(10, 16)))), evict
    )
    assert isinstance(first, EngineEvicted)
    assert isinstance(second, EngineEvicted)
    assert set(first.begun) <= set(range(6))
    assert set(second.begun) <= set(range(10, 16))
    assert len(first.begun) + len(second.begun) == 8


def test_a_copy_that_comes_in_with_the_order_to_leave_is_finished_not_begun(start: Start) -> None:
    core = HaltingCore()
    engine = start(OrderedCore(core, Answers()))

    def greedy(position: int, token: int) -> Request:
        return Request(position=position, token_ids=[token], sampling=Sampling(max_tokens=2, temperature=0), ordered=True)

    assert positions(engine.generate([greedy(1, 5)])) == [1]
    core.may_go.clear()

    def copy() -> list[Generation]:
        assert core.halted.wait(PATIENCE_S)
        return list(engine.generate([greedy(3, 5)]))

    def evict() -> None:
        assert core.halted.wait(PATIENCE_S)
        wait_until(lambda: engine._inbox.qsize(), "the copy to be sent")
        engine.evict()
        core.may_go.set()

    begun, copied, _ = in_threads(lambda: list(engine.generate([greedy(2, 6)])), copy, evict)
    assert isinstance(begun, EngineEvicted)
    assert begun.begun == {2: [9, 9, 9]}
    choice = GeneratedChoice(token_ids=[1, 2], finish_reason="stop")
    assert copied == [Generation(position=3, choices=(choice,), copied=True)]


def test_rows_that_are_to_be_alone_wait_for_the_others_and_the_others_for_them(start: Start) -> None:
    core = SmallCore(max_num_seqs=4, ready=False)
    engine = start(core)
    mixed: list[set[bool]] = []
    step = core.step

    def watched() -> list[tuple[int, Generation]]:
        mixed.append({request.position >= 100 for request in core.held.values()})
        return step()

    core.step = watched  # type: ignore[method-assign]

    def together(first: int) -> list[int]:
        return [made.position for made in engine.generate(map(ask, range(first, first + 30)))]

    def alone() -> list[int]:
        assert core.took.acquire(timeout=PATIENCE_S)  # the others are inside
        core.ready.set()
        return [made.position for made in engine.generate(map(ask, range(100, 110)), alone=True)]

    first, second, third = in_threads(lambda: together(0), lambda: together(40), alone)
    assert (sorted(first), sorted(second), sorted(third)) == (list(range(30)), list(range(40, 70)), list(range(100, 110)))
    assert {True, False} not in mixed
    assert {True} in mixed


def test_what_is_inside_is_recorded_while_it_is_inside(start: Start, tmp_path: Path) -> None:
    core = PickyCore()
    engine = ContinuousEngine(lambda: core, flight_path=tmp_path / "flight")
    answers = engine.generate([ask(1), ask(100), ask(101)], tag=TAG)
    core.first_may_go.set()
    assert next(answers).position == 1
    assert core.another.wait(PATIENCE_S)
    found = read_flight(tmp_path / "flight")
    assert found is not None
    assert found.rows == {TAG: frozenset({100, 101})}
    core.all_may_go.set()
    assert sorted(made.position for made in answers) == [100, 101]
    engine.close()
    found = read_flight(tmp_path / "flight")
    assert found is not None
    assert (found.rows, found.rows_finished) == ({}, 3)
    assert found.steps > 0


def test_an_engine_that_makes_steps_but_no_tokens_does_not_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.ledger._LOOK_EVERY_S", 0.0)
    core, path = SpinningCore(), tmp_path / "flight"
    engine = ContinuousEngine(lambda: core, flight_path=path)
    caller = threading.Thread(target=lambda: outcome_of(lambda: list(engine.generate([ask(1)], tag=TAG))), daemon=True)
    caller.start()
    wait_until(lambda: core.steps > 1, "the row to be in")
    before, steps = read_flight(path), core.steps
    assert before is not None
    assert before.num_rows == 1
    wait_until(lambda: core.steps > steps + 100, "more steps")
    assert read_flight(path) == before
    core.makes_tokens.set()

    def moved() -> bool:
        now = read_flight(path)
        return now is not None and now.moved_at > before.moved_at and now.steps > before.steps

    wait_until(moved, "a token to be recorded")
    engine.close()
    caller.join(PATIENCE_S)


@dies
def test_the_record_of_an_engine_that_died_shows_what_was_inside(tmp_path: Path) -> None:
    engine = ContinuousEngine(lambda: DyingCore(answers=1), flight_path=tmp_path / "flight")
    with pytest.raises(EngineDead):
        list(engine.generate([ask(1), ask(2), ask(3)], tag=TAG))
    found = read_flight(tmp_path / "flight")
    assert found is not None
    assert found.rows == {TAG: frozenset({2, 3})}
    engine.close()  # its thread raises what killed it: in this test, not in the next
