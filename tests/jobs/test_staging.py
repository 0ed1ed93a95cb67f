"""Tables in memory to Parquet: one partition at a time, of one type, under names made of what is in them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs
from jobs.notebook import make_job
from jobs.staging import stage
from jobs.staging import unified
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from tests.azurite import Azurite


def schema(**types: pa.DataType) -> pa.Schema:
    return pa.schema(list(types.items()))


def parts_of(folder: str) -> list[pa.Table]:
    return [pq.read_table(file) for file in sorted(Path(folder).glob("*.parquet"))]


def test_partitions_of_one_type_keep_it() -> None:
    one = schema(id=pa.int64(), q=pa.string())
    assert unified(one, one, 1) == one


def test_nulls_fit_into_any_type_and_whole_numbers_into_fractions() -> None:
    found = unified(schema(id=pa.int64(), q=pa.null()), schema(id=pa.float64(), q=pa.string()), 1)
    assert found == schema(id=pa.float64(), q=pa.string())


def test_partitions_without_a_type_in_common_are_named() -> None:
    with pytest.raises(JobError, match=r"input: column 'q' is int64 in partition 2 and string in others; give it one type"):
        unified(schema(id=pa.int64(), q=pa.string()), schema(id=pa.int64(), q=pa.int64()), 2)


def test_partitions_with_other_columns_are_named() -> None:
    with pytest.raises(JobError, match="input: partition 1 has the columns a, c; those before it have a, b"):
        unified(schema(a=pa.int64(), b=pa.int64()), schema(a=pa.int64(), c=pa.int64()), 1)


@pytest.fixture
def as_python_made_them() -> Iterator[None]:
    """Without Dask's own cast of text to one type."""
    with pytest.importorskip("dask").config.set({"dataframe.convert-string": False}):
        yield


def frame_of(partitions: list[dict[str, list[Any]]], made: list[weakref.ref[Any]]) -> Any:
    """A dask dataframe that notes each partition as it is made."""
    pandas = pytest.importorskip("pandas")
    dataframe = pytest.importorskip("dask.dataframe")
    delayed = pytest.importorskip("dask").delayed

    def make(index: int) -> Any:
        frame = pandas.DataFrame(partitions[index], dtype=object)
        made.append(weakref.ref(frame))
        return frame

    meta = pandas.DataFrame({name: [] for name in partitions[0]}, dtype=object)
    return dataframe.from_delayed([delayed(make, pure=False)(index) for index in range(len(partitions))], meta=meta)


@pytest.mark.slow
def test_each_partition_is_made_once_and_gone_before_the_next(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Counted(list):  # type: ignore[type-arg]
        def append(self, ref: Any) -> None:
            alive.append(sum(each() is not None for each in made))
            made.append(ref)

    folder = stage(frame_of([{"q": [f"row {number}"] * 100} for number in range(6)], Counted()), str(tmp_path / "out"))
    assert (len(made), max(alive) <= 1) == (6, True)
    assert [table.column("q")[0].as_py() for table in parts_of(folder)] == [f"row {number}" for number in range(6)]


@pytest.mark.slow
@pytest.mark.usefixtures("as_python_made_them")
def test_a_partition_of_nulls_takes_the_others_type(tmp_path: Path) -> None:
    folder = stage(frame_of([{"q": ["a"]}, {"q": [None]}, {"q": ["b"]}], []), str(tmp_path / "out"))
    assert {table.schema.field("q").type for table in parts_of(folder)} == {pa.string()}
    assert [table.column("q").to_pylist() for table in parts_of(folder)] == [["a"], [None], ["b"]]


@pytest.mark.slow
@pytest.mark.usefixtures("as_python_made_them")
def test_partitions_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"column 'q' is int64 in partition 1 and string in others"):
        stage(frame_of([{"q": ["a"]}, {"q": [1]}], []), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_pandas_column_of_no_one_type_is_named(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(JobError, match=r"input: .*column q"):
        stage(pandas.DataFrame({"q": pandas.Series(["a", 1], dtype=object)}), str(tmp_path / "out"))


# Where it goes is reached as the job says.


def fields(output: str, tiny_model: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(tiny_model), "prompt": "q", "output": output, **more}


@pytest.mark.azurite
def test_a_table_is_staged_as_the_jobs_own_recipe_says(azurite: Azurite, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else in the environment says how this account is reached."""
    bucket = azurite.new_container()
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("OUT_SAS", azurite.sas(bucket))
    recipe = {"account_name": azurite.account, "endpoint": azurite.endpoint, "credential": {"kind": "sas", "env": "OUT_SAS"}}
    spec = make_job(pa.table({"q": ["one", "two"]}), fields(f"az://{bucket}/out", tiny_model, storage=recipe))
    (uri,) = spec.input.uris
    assert uri.startswith(f"az://{bucket}/out/{layout.STAGED}/")
    (name,) = azurite.names(bucket)
    assert f"az://{bucket}/{name}".startswith(uri)
    with storage.open_read(f"az://{bucket}/{name}") as file:
        assert pq.read_table(file).column("q").to_pylist() == ["one", "two"]
    storage.use(None)  # as in another kernel
    with pytest.raises(JobError, match="holds no job"):
        jobs.attach(f"az://{bucket}/out", storage=recipe)


def test_nothing_is_staged_for_a_job_that_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"sampling\.tempature: unknown key"):
        make_job(pa.table({"q": ["one"]}), fields(str(tmp_path / "out"), tiny_model, sampling={"tempature": 1}))
    assert not (tmp_path / "out").exists()
