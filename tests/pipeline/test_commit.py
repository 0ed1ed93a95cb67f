"""The part and its commit: created once, or found out whose it is."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import storage
from pipeline.commit import PartWriter
from pipeline.commit import commit
from pipeline.commit import read_report
from schemas.errors import ForeignOutput
from schemas.errors import UnitError
from schemas.manifest import META_PROVENANCE
from schemas.manifest import META_REPORT
from schemas.manifest import UnitReport

SCHEMA = pa.schema([pa.field("x", pa.int64(), nullable=False), ("y", pa.dictionary(pa.int32(), pa.string()))], metadata={b"k": b"v"})


def report(**changes: Any) -> UnitReport:
    values: dict[str, Any] = {
        "unit": 3,
        "fingerprint": "a" * 64,
        "attempt": "try-1",
        "worker": "w",
        "rows": 2,
        "error_rows": 0,
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "started_at": 1.0,
        "finished_at": 2.0,
    }
    return UnitReport(**{**values, **changes})


def batch(start: int, stop: int) -> pa.RecordBatch:
    texts = pa.array([str(value % 3) for value in range(start, stop)], pa.string()).dictionary_encode()
    return pa.RecordBatch.from_arrays([pa.array(range(start, stop), pa.int64()), texts.cast(SCHEMA.field("y").type)], schema=SCHEMA)


def part(made: UnitReport, *batches: pa.RecordBatch) -> bytes:
    writer = PartWriter(SCHEMA, "zstd")
    for item in batches:
        writer.write(item)
    return bytes(writer.finish(made, {"tool": "t"}))


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the part goes."""
    return f"memory://{uuid.uuid4().hex}/part.parquet" if request.param == "memory" else str(tmp_path / "out" / "part.parquet")


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_a_part_holds_rows_schema_report_and_provenance(tmp_path: Path, compression: Any) -> None:
    writer = PartWriter(SCHEMA, compression)
    for start in range(0, 20_000, 500):
        writer.write(batch(start, start + 500))
    (tmp_path / "p.parquet").write_bytes(writer.finish(report(rows=20_000), {"tool": "t"}))
    assert writer.num_rows == 20_000
    with pq.ParquetFile(tmp_path / "p.parquet") as file:
        assert file.metadata.num_rows == 20_000
        assert file.metadata.num_row_groups > 1
        assert UnitReport.from_json(file.metadata.metadata[META_REPORT]) == report(rows=20_000)
        assert json.loads(file.metadata.metadata[META_PROVENANCE]) == {"tool": "t"}
        table = file.read()
    assert table.schema.remove_metadata().equals(SCHEMA.remove_metadata())
    assert table.schema.metadata[b"k"] == b"v"
    assert table.column("x").to_pylist() == list(range(20_000))
    assert table.column("y").to_pylist() == [str(value % 3) for value in range(20_000)]


def test_batches_whose_dictionaries_differ_keep_their_values(tmp_path: Path) -> None:
    schema = pa.schema([("y", pa.dictionary(pa.int32(), pa.string()))])
    writer = PartWriter(schema, "zstd")
    for texts in (["a", "b"], ["b", None], ["c", "a"]):
        column = pa.array(texts, pa.string()).dictionary_encode()
        writer.write(pa.RecordBatch.from_arrays([column], schema=schema))
    (tmp_path / "p.parquet").write_bytes(writer.finish(report(rows=6), {}))
    assert pq.read_table(tmp_path / "p.parquet").column("y").to_pylist() == ["a", "b", "b", None, "c", "a"]


def test_a_part_without_rows_carries_schema_and_report(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(part(report(rows=0)))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.num_rows == 0
    assert table.schema.remove_metadata().equals(SCHEMA.remove_metadata())
    assert read_report(str(tmp_path / "p.parquet")) == report(rows=0)


def test_a_part_whose_input_was_a_part_carries_its_own_report(tmp_path: Path) -> None:
    """One job's output is the next one's input, footer metadata and all."""
    (tmp_path / "first.parquet").write_bytes(part(report(), batch(0, 2)))
    with pq.ParquetFile(tmp_path / "first.parquet") as file:
        inherited = file.schema_arrow
    second = report(unit=9, fingerprint="b" * 64, attempt="second", rows=4)
    writer = PartWriter(inherited, "zstd")
    writer.write(pa.RecordBatch.from_arrays(batch(0, 4).columns, schema=inherited))
    (tmp_path / "second.parquet").write_bytes(writer.finish(second, {"tool": "second"}))
    assert read_report(str(tmp_path / "second.parquet")) == second
    assert json.loads(pq.read_metadata(tmp_path / "second.parquet").metadata[META_PROVENANCE]) == {"tool": "second"}


def test_a_first_commit_creates(uri: str) -> None:
    data = part(report(), batch(0, 2))
    assert commit(uri, memoryview(data), report()) == "created"
    assert storage.read_bytes(uri) == data
    assert read_report(uri) == report()


def test_a_part_of_the_same_attempt_means_that_an_acknowledgement_was_lost(uri: str) -> None:
    data = part(report(), batch(0, 2))
    storage.create_once(uri, data)
    assert commit(uri, data, report()) == "acknowledgement_lost"
    assert storage.read_bytes(uri) == data


def test_a_part_of_another_attempt_means_that_the_race_was_lost(uri: str) -> None:
    first = part(report(attempt="try-0"), batch(0, 2))
    storage.create_once(uri, first)
    assert commit(uri, part(report(), batch(0, 2)), report()) == "race_lost"
    assert storage.read_bytes(uri) == first


Pipe = Callable[..., None]


def test_a_create_that_is_done_and_reported_as_failed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    done: Pipe = MemoryFileSystem.pipe_file

    def done_but_unheard(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        done(self, path, value, **options)
        raise ConnectionResetError("the answer never came")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", done_but_unheard)
    uri, data = f"memory://{uuid.uuid4().hex}/part.parquet", part(report(), batch(0, 2))
    assert commit(uri, data, report()) == "acknowledgement_lost"
    assert storage.read_bytes(uri) == data


def test_a_create_that_failed_is_an_error_of_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        raise PermissionError("read-only key")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refused)
    uri = f"memory://{uuid.uuid4().hex}/part.parquet"
    with pytest.raises(UnitError, match=f"unit 3: cannot create {uri}: read-only key"):
        commit(uri, part(report(), batch(0, 2)), report())
    assert not storage.exists(uri)


@pytest.mark.parametrize("changes", [{"fingerprint": "b" * 64}, {"unit": 4}], ids=["other job", "other unit"])
def test_a_part_of_another_job_or_unit_stops_everything(uri: str, changes: dict[str, Any]) -> None:
    theirs = part(report(**changes), batch(0, 2))
    storage.create_once(uri, theirs)
    with pytest.raises(ForeignOutput, match=f"{uri} belongs to unit . of job ........, expected unit 3 of aaaaaaaa; choose another output"):
        commit(uri, part(report(), batch(0, 2)), report())
    assert storage.read_bytes(uri) == theirs


@pytest.mark.parametrize("there", [b"", b"hello", b"PAR1 and then it was cut short"])
def test_what_is_no_parquet_at_the_parts_name_stops_everything(uri: str, there: bytes) -> None:
    storage.create_once(uri, there)
    with pytest.raises(ForeignOutput, match=f"{uri} is not one of Tokenmill's parts"):
        commit(uri, part(report(), batch(0, 2)), report())
    assert storage.read_bytes(uri) == there


def test_a_truncated_part_stops_everything(uri: str) -> None:
    data = part(report(), batch(0, 2))
    storage.create_once(uri, data[:-20])
    with pytest.raises(ForeignOutput, match=f"{uri} is not one of Tokenmill's parts"):
        commit(uri, data, report())


def test_parquet_without_a_report_stops_everything(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "p.parquet")
    with pytest.raises(ForeignOutput, match="carries no unit report, so Tokenmill did not write it"):
        commit(str(tmp_path / "p.parquet"), part(report(), batch(0, 2)), report())


def test_a_report_that_counts_other_rows_than_the_file_has_stops_everything(uri: str) -> None:
    storage.create_once(uri, part(report(rows=7), batch(0, 2)))
    with pytest.raises(ForeignOutput, match=f"{uri} has 2 rows, but its report says 7"):
        read_report(uri)


@pytest.mark.parametrize("garbage", [b"no json", b"[]", b"{}", b'{"unit": 3, "colour": "red"}'])
def test_a_report_that_cannot_be_understood_stops_everything(tmp_path: Path, garbage: bytes) -> None:
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({META_REPORT: garbage}), tmp_path / "p.parquet")
    with pytest.raises(ForeignOutput, match=r"p.parquet"):
        read_report(str(tmp_path / "p.parquet"))


def test_a_missing_part_has_no_report(uri: str) -> None:
    with pytest.raises(FileNotFoundError):
        read_report(uri)
