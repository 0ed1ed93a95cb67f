"""The shelf: longest rows first, equal beginnings together, and nobody overtaken for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.engine import Request
from pipeline.engine.order import Shelf
from schemas.sampling import Sampling


def request(max_tokens: int = 8, token_ids: list[int] | None = None, begun: tuple[int, ...] = ()) -> Request:
    return Request(position=0, token_ids=token_ids or [1, 2, 3], sampling=Sampling(max_tokens=max_tokens), begun=begun)


def taken(shelf: Shelf) -> list[int]:
    return [shelf.take()[0] for _ in range(len(shelf))]


def shelf_of(*requests: Request, patience_rows: int = 1000) -> Shelf:
    shelf = Shelf(patience_rows=patience_rows)
    for key, one in enumerate(requests):
        shelf.put(key, one)
    return shelf


def test_rows_that_may_become_longest_go_first() -> None:
    assert taken(shelf_of(request(5), request(50), request(20))) == [1, 2, 0]


def test_what_a_row_has_got_already_does_not_count() -> None:
    assert taken(shelf_of(request(50, begun=(7,) * 45), request(20))) == [1, 0]


def test_rows_of_one_length_keep_their_order() -> None:
    assert taken(shelf_of(*(request(8, [key]) for key in range(20)))) == list(range(20))


def test_rows_that_begin_alike_stay_together() -> None:
    first, second = list(range(200)), list(range(200, 400))
    shelf = shelf_of(*(request(8, (second if key % 2 else first) + [key]) for key in range(8)))
    assert taken(shelf) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_among_rows_with_one_system_prompt_those_about_one_document_stay_together() -> None:
    system, documents = list(range(200)), [[document] * 400 for document in (7, 8)]
    shelf = shelf_of(*(request(8, system + documents[key % 2] + [key]) for key in range(8)), request(8, [5] * 200))
    assert taken(shelf) == [0, 2, 4, 6, 1, 3, 5, 7, 8]


def test_a_row_that_is_overtaken_again_and_again_has_its_turn() -> None:
    shelf = shelf_of(request(1), patience_rows=10)
    turns = []
    for key in range(1, 40):
        shelf.put(key, request(100))
        turns.append(shelf.take()[0])
    assert turns.index(0) == 10


def test_a_row_that_was_removed_is_not_taken() -> None:
    shelf = shelf_of(request(1), request(2), request(3))
    assert shelf.remove(2).sampling.max_tokens == 3
    assert 2 not in shelf
    assert taken(shelf) == [1, 0]
    with pytest.raises(IndexError):
        shelf.take()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 20))
def test_every_row_is_taken_once(rows: list[tuple[int, int, bool]], patience_rows: int) -> None:
    shelf, out, kept = Shelf(patience_rows=patience_rows), [], []
    for key, (max_tokens, prefix, take_now) in enumerate(rows):
        shelf.put(key, request(max_tokens, [prefix] * 130))
        kept.append(key)
        if take_now:
            out.append(shelf.take()[0])
    assert sorted(out + taken(shelf)) == kept
