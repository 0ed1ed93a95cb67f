"""The ordered core: a batch that is fed as it empties, longest rows first, identical greedy rows generated once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.answers import Answers
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.ordered import OrderedCore
from schemas.prompts import RowError
from schemas.sampling import Sampling


class Bench:
    """A core that a test steps by hand: the rows it was given finish in the order it got them, each with its prompt reversed."""

    def __init__(self, max_num_seqs: int = 4) -> None:
        self.max_num_seqs = max_num_seqs
        self.held: dict[int, Request] = {}
        self.got: list[int] = []
        self.aborted: list[int] = []
        self.fails: set[int] = set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(kind="bench", version="1", dtype="none", max_model_len=100, max_num_seqs=self.max_num_seqs)

    @property
    def busy(self) -> bool:
        return bool(self.held)

    def add(self, key: int, request: Request) -> RowError | None:
        if request.token_ids[0] == 13:
            return RowError(kind="rejected", message="unlucky")
        self.held[key] = request
        self.got.append(key)
        return None

    def abort(self, key: int) -> None:
        self.aborted.append(key)
        del self.held[key]

    def begun(self, key: int) -> list[int]:
        return [self.held[key].token_ids[-1]]

    def tokens_inside(self) -> int:
        return len(self.held)

    def step(self) -> list[tuple[int, Generation]]:
        key = next(iter(self.held))
        request = self.held.pop(key)
        if request.token_ids[0] in self.fails:
            return [(key, Generation(position=request.position, error=RowError(kind="engine", message="broke")))]
        choice = GeneratedChoice(token_ids=request.token_ids[::-1], finish_reason="stop")
        return [(key, Generation(position=request.position, choices=(choice,)))]

    def close(self) -> None:
        self.held.clear()


def request(position: int, *token_ids: int, max_tokens: int = 8, ordered: bool = True, temperature: float = 0.0) -> Request:
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    return Request(position=position, token_ids=list(token_ids), sampling=sampling, ordered=ordered)


def made(core: OrderedCore, *requests: Request) -> dict[int, Generation]:
    """Add all under their positions and run to the end."""
    known = {one.position: generation for one in requests if (generation := core.add(one.position, one)) is not None}
    return {**known, **finish(core)}


def finish(core: OrderedCore) -> dict[int, Generation]:
    out: dict[int, Generation] = {}
    while core.busy:
        for key, generation in core.step():
            assert key not in out
            assert generation.position == key
            out[key] = generation
    return out


def ids(generation: Generation) -> list[int]:
    return generation.choices[0].token_ids


def test_identical_greedy_rows_are_generated_once_and_copied() -> None:
    bench = Bench()
    out = made(OrderedCore(bench, Answers()), request(0, 1, 2), request(1, 3), request(2, 1, 2), request(3, 1, 2))
    assert bench.got == [0, 1]
    assert {key: (ids(one), one.copied) for key, one in out.items()} == {
        0: ([2, 1], False), 1: ([3], False), 2: ([2, 1], True), 3: ([2, 1], True),
    }  # fmt: skip


def test_an_answer_is_remembered_after_its_row_is_gone() -> None:
    bench = Bench()
    core = OrderedCore(bench, Answers())
    made(core, request(0, 1, 2))
    assert made(core, request(1, 1, 2))[1].copied
    assert bench.got == [0]


def test_rows_that_are_drawn_or_ask_for_their_own_turn_are_generated_each() -> None:
    bench = Bench()
    drawn = [request(0, 1, temperature=0.5), request(1, 1, temperature=0.5)]
    plain = [request(2, 2, ordered=False), request(3, 2, ordered=False)]
    out = made(OrderedCore(bench, Answers()), *drawn, *plain)
    assert sorted(bench.got) == [0, 1, 2, 3]
    assert not any(one.copied for one in out.values())


def test_the_longest_of_those_that_wait_goes_next() -> None:
    bench = Bench(max_num_seqs=1)  # and one in reserve
    made(OrderedCore(bench, Answers()), *(request(key, key, max_tokens=tokens) for key, tokens in enumerate([1, 5, 9, 3])))
    assert bench.got == [2, 1, 3, 0]


def test_without_ordering_rows_keep_their_turn() -> None:
    bench = Bench(max_num_seqs=1)
    rows = [request(key, key, max_tokens=tokens, ordered=False) for key, tokens in enumerate([1, 5, 9, 3])]
    made(OrderedCore(bench, Answers()), *rows)
    assert bench.got == [0, 1, 2, 3]


def test_the_core_gets_no_more_than_its_batch_and_a_reserve() -> None:
    bench = Bench(max_num_seqs=8)
    core = OrderedCore(bench, Answers())
    for key in range(40):
        core.add(key, request(key, key))
    core.step()
    assert len(bench.got) == 9
    assert sorted(finish(core)) == list(range(1, 40))


def test_a_row_that_the_core_refuses_is_refused_to_all_that_are_like_it() -> None:
    out = made(OrderedCore(Bench(), Answers()), request(0, 13), request(1, 13), request(2, 5))
    assert {key: one.error and one.error.kind for key, one in out.items()} == {0: "rejected", 1: "rejected", 2: None}


def test_an_error_is_no_answer_to_remember() -> None:
    bench = Bench()
    core = OrderedCore(bench, Answers())
    bench.fails = {7}
    assert made(core, request(0, 7))[0].error is not None
    bench.fails = set()
    assert ids(made(core, request(1, 7))[1]) == [7]


def test_who_leaves_takes_nobody_elses_answer_along() -> None:
    bench = Bench()
    core = OrderedCore(bench, Answers())
    for key in range(3):
        core.add(key, request(key, 1, 2))
    core.add(9, request(9, 4))
    core.step()  # all are inside, and the first step answers the first row and those like it
    core.add(10, request(10, 5))
    core.add(11, request(11, 5))
    core.abort(10)
    assert sorted(finish(core)) == [9, 11]
    assert bench.aborted == []
    core.add(12, request(12, 6))
    core.add(13, request(13, 6))
    core.abort(12)
    core.abort(13)
    assert not core.busy
    assert finish(core) == {}


def test_a_row_inside_is_taken_out_when_nobody_waits_for_it() -> None:
    bench = Bench()
    core = OrderedCore(bench, Answers())
    for key in range(3):
        core.add(key, request(key, key + 1))
    core.step()
    core.abort(2)
    assert bench.aborted == [2]
    assert sorted(finish(core)) == [1]


def test_tokens_so_far_are_known_of_every_row() -> None:
    bench = Bench(max_num_seqs=1)
    core = OrderedCore(bench, Answers())
    made(core, request(0, 1, 2))
    for one in (request(1, 3, 4), request(2, 5, 6), request(3, 5, 6), request(4, 7), request(5, 8), request(6, 9)):
        core.add(one.position, one)
    core.step()  # 1 is answered, 2 (and with it 3) and 4 are inside
    assert [core.begun(key) for key in (2, 3, 5, 6)] == [[6], [6], [], []]


def test_a_row_whose_answer_is_known_is_finished_and_never_begun() -> None:
    """Going on from a whole answer, an engine would refuse it, or go past its end."""
    core = OrderedCore(Bench(), Answers())
    made(core, request(0, 1, 2))
    choice = GeneratedChoice(token_ids=[2, 1], finish_reason="stop")
    assert core.add(1, request(1, 1, 2)) == Generation(position=1, choices=(choice,), copied=True)
    assert not core.busy


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans()), max_size=60),
    st.integers(1, 5),
    st.sets(st.integers(0, 59)),
)
def test_every_row_is_answered_once_with_its_own_answer(
    rows: list[tuple[int, int, bool, bool]], max_num_seqs: int, leave: set[int]
) -> None:
    core = OrderedCore(Bench(max_num_seqs), Answers())
    counts: Counter[int] = Counter()
    gone: set[int] = set()
    for key, (token, max_tokens, ordered, step) in enumerate(rows):
        known = core.add(key, request(key, token, 50, max_tokens=max_tokens, ordered=ordered))
        if known is not None:
            assert ids(known) == [50, token]
            counts[key] += 1
        if step:
            for answered, generation in core.step():
                assert ids(generation) == [50, rows[answered][0]]
                counts[answered] += 1
        if key in leave and key not in counts:
            core.abort(key)
            gone.add(key)
    for answered, generation in finish(core).items():
        assert ids(generation) == [50, rows[answered][0]]
        counts[answered] += 1
    assert counts == Counter(set(range(len(rows))) - gone)
