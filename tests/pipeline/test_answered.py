"""The index of answered requests: found again after storing, first places first, and nothing where it is no index."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.answered import Answered
from pipeline.answered import Indexes
from pipeline.answered import Place
from pipeline.answered import Source
from pipeline.answered import merge
from pipeline.answered import read_index

SOURCES = (Source(uri="/a", fingerprint="f", prefix=""), Source(uri="/b", fingerprint="g", prefix="tm_"))


def stored(index: Answered) -> Answered:
    return Answered.from_parquet(index.to_parquet())


def test_every_key_is_found_at_its_place_and_no_other_is_found() -> None:
    keys = [os.urandom(16) for _ in range(999)]
    # Zeros, which numpy takes for the end of a text.
    keys += [b"\0" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15, b"\0\1" + b"\0" * 14]
    index = stored(merge(SOURCES, [(0, 5, b"".join(keys[:500]), range(500)), (1, 7, b"".join(keys[500:]), range(0, 2 * 503, 2))]))
    assert len(index) == len(keys)
    assert index.sources == SOURCES
    assert index.find(keys) == [Place(0, 5, row) for row in range(500)] + [Place(1, 7, 2 * row) for row in range(503)]
    assert index.find([os.urandom(16) for _ in range(50)]) == [None] * 50


def test_of_equal_keys_the_first_place_counts() -> None:
    key = b"k" * 16
    index = merge(SOURCES, [(0, 3, key, [9]), (0, 4, key * 2, [1, 2]), (1, 0, key, [0])])
    assert (len(index), index.find([key])) == (1, [Place(0, 3, 9)])


def test_an_index_of_nothing_finds_nothing() -> None:
    assert stored(merge(SOURCES, [])).find([b"k" * 16]) == [None]
    assert merge(SOURCES, [(0, 0, b"k" * 16, [0])]).find([]) == []


def test_what_is_no_index_counts_as_not_there(tmp_path: Path) -> None:
    path = tmp_path / "index.parquet"
    assert read_index(str(path)) is None
    good = merge(SOURCES, [(0, 0, b"k" * 16, [0])]).to_parquet()
    wrong = merge(SOURCES[:1], [(1, 0, b"k" * 16, [0])]).to_parquet()  # a source that there is not
    for data in (b"", good[:-20], b"PAR1" + bytes(50) + b"PAR1", wrong):
        path.write_bytes(data)
        assert read_index(str(path)) is None
    pq.write_table(pa.table({"key": ["text"]}), path)
    assert read_index(str(path)) is None
    path.write_bytes(good)
    assert read_index(str(path)) is not None
    assert len(Indexes().get(str(tmp_path / "none"))) == 0


def test_an_index_is_loaded_once_for_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, indexes = tmp_path / "index.parquet", Indexes()
    path.write_bytes(merge(SOURCES, [(0, 0, b"k" * 16, [0])]).to_parquet())
    first = indexes.get(str(path))
    path.unlink()
    assert indexes.get(str(path)) is first
