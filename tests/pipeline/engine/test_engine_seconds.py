"""The ledger of a running engine: its seconds add up, and it knows which tokens it made itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.engine.answers import Answers
from pipeline.engine.continuous import ContinuousEngine
from pipeline.engine.engine import Core
from pipeline.engine.engine import Request
from pipeline.engine.ordered import OrderedCore
from pipeline.engine.simulated import SimulatedCore
from pipeline.feed import Feed
from schemas.errors import EngineDead
from schemas.errors import EngineEvicted
from schemas.job import SimulatedOptions
from schemas.ledger import Reading
from schemas.sampling import Sampling

PATIENCE_S = 20.0
BATCH_ROWS = 4
TOKENS = 8

Start = Callable[..., ContinuousEngine]


def simulated(**options: float) -> SimulatedCore:
    """Every row gets eight tokens."""
    chosen = SimulatedOptions(max_num_seqs=BATCH_ROWS, lengths="max", **{"decode_tokens_per_s": 20_000.0, **options})
    return SimulatedCore(chosen, vocab_size=320, max_model_len=512)


def asks(count: int) -> list[Request]:
    return [Request(position=position, token_ids=[5, position], sampling=Sampling(max_tokens=TOKENS)) for position in range(count)]


def whole(reading: Reading) -> float:
    waiting_s = reading.starved_s + reading.blocked_s + reading.pending_starved_s + reading.pending_blocked_s
    return reading.start_s + reading.busy_s + waiting_s


@pytest.fixture
def start() -> Iterator[Start]:
    """Start engines; all are closed at the end."""
    engines: list[ContinuousEngine] = []

    def make(core: Callable[[], Core] = simulated, **options: object) -> ContinuousEngine:
        engines.append(ContinuousEngine(core, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_the_seconds_of_an_engine_add_up_to_its_age(start: Start) -> None:
    engine = start()
    for rows in (1, 30, 2):
        list(engine.generate(asks(rows)))
        reading = engine.reading()
        assert whole(reading) == pytest.approx(reading.age_s)
    assert (reading.rows, reading.prompt_tokens, reading.generated_tokens) == (33, 66, 33 * TOKENS)
    assert reading.busy_s > 0
    assert reading.starved_s > 0
    assert reading.pending_starved_s > 0
    assert 0 < reading.busy_tokens < reading.generated_tokens


def test_the_start_counts_from_where_it_is_told(start: Start) -> None:
    assert start(spawned_at=0.0).reading().start_s > start().reading().start_s


def test_a_reading_is_whole_whenever_it_is_taken(start: Start) -> None:
    engine, stop = start(), threading.Event()
    readings: list[Reading] = []

    def read() -> None:
        while not stop.is_set():
            readings.append(engine.reading())

    thread = threading.Thread(target=read)
    thread.start()
    for rows in (1, 9, 3) * 10:
        list(engine.generate(asks(rows)))
    stop.set()
    thread.join(PATIENCE_S)
    assert len(readings) > 30
    assert all(whole(reading) == pytest.approx(reading.age_s) for reading in readings)
    assert [reading.age_s for reading in readings] == sorted(reading.age_s for reading in readings)


def test_tokens_that_an_earlier_engine_made_are_not_counted_again(start: Start) -> None:
    engine = start()
    request = replace(asks(1)[0], begun=(7, 7, 7))
    (generation,) = engine.generate([request])
    assert len(generation.choices[0].token_ids) == TOKENS
    assert engine.reading().generated_tokens == TOKENS - 3


def test_copied_rows_cost_no_tokens(start: Start) -> None:
    engine = start(lambda: OrderedCore(simulated(), Answers(None)))
    same = [replace(request, token_ids=[5, 5], ordered=True) for request in asks(12)]
    generations = list(engine.generate(same))
    assert sum(generation.copied for generation in generations) == 11
    reading = engine.reading()
    assert (reading.rows, reading.generated_tokens) == (12, TOKENS)


def test_rows_that_are_copied_do_not_fill_a_batch(start: Start) -> None:
    engine = start(lambda: OrderedCore(simulated(), Answers(None)))
    list(engine.generate([replace(request, token_ids=[5, 5], ordered=True) for request in asks(12)]))
    assert engine.reading().busy_s == 0


def test_tokens_of_abandoned_rows_were_made(start: Start) -> None:
    """Slow enough that the longest rows are inside when their caller leaves."""
    engine = start(lambda: simulated(decode_tokens_per_s=400.0))
    long = [replace(request, sampling=Sampling(max_tokens=500)) for request in asks(BATCH_ROWS)]
    long[0] = replace(long[0], sampling=Sampling(max_tokens=4))
    caller = engine.generate(long)
    next(caller)  # the short one; the others have as many tokens
    caller.close()
    list(engine.generate(asks(1)))
    reading = engine.reading()
    assert reading.rows == 2
    assert reading.generated_tokens >= BATCH_ROWS * 4 + TOKENS - BATCH_ROWS


def test_an_evicted_engine_made_what_its_rows_had(start: Start) -> None:
    engine = start(lambda: simulated(decode_tokens_per_s=400.0))
    long = [replace(request, sampling=Sampling(max_tokens=500)) for request in asks(BATCH_ROWS)]
    long[0] = replace(long[0], sampling=Sampling(max_tokens=4))
    caller = engine.generate(long)
    next(caller)
    engine.evict()
    with pytest.raises(EngineEvicted) as caught:
        list(caller)
    begun = sum(map(len, caught.value.begun.values()))
    assert begun > 0
    assert abs(engine.reading().generated_tokens - begun - 4) <= BATCH_ROWS  # a token of each may be half made
    assert not engine.reading().full


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engines_ledger_stands_still(start: Start) -> None:
    class Dying(SimulatedCore):
        def step(self) -> list[tuple[int, object]]:  # type: ignore[override]
            raise RuntimeError("CUDA error")

    def core() -> Core:
        return Dying(SimulatedOptions(max_num_seqs=BATCH_ROWS), vocab_size=320, max_model_len=512)

    engine = start(core)
    with pytest.raises(EngineDead):
        list(engine.generate(asks(9)))
    assert engine.reading() == engine.reading()


def test_what_its_units_kept_is_in_the_reading(start: Start) -> None:
    feed = Feed()
    engine = start(feed=feed)
    feed.keep(5)
    assert engine.reading().kept_tokens == 5
