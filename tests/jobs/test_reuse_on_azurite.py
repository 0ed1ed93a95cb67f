"""Reuse where input, earlier output and output are on a real blob service: the same rows, and the index created once."""

from __future__ import annotations

import io
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.api import run
from jobs.outputs import committed
from jobs.verify import verify
from pipeline import storage
from schemas import layout
from schemas.job import JobSpec
from tests.azurite import Azurite

pytestmark = pytest.mark.azurite

_ROWS = 200
_EDITED = range(0, _ROWS, 20)


def put(uri: str, edited: range | tuple[int, ...] = ()) -> None:
    sink = io.BytesIO()
    asked = [f"question {row}" + (", please" if row in edited else "") for row in range(_ROWS)]
    pq.write_table(pa.table({"id": range(_ROWS), "prompt": asked}), sink)
    storage.create_once(uri, sink.getvalue())


def test_only_what_changed_is_generated_on_blob_storage(azurite: Azurite, container: str, make_job: Callable[..., JobSpec]) -> None:
    place = f"az://{container}"
    put(f"{place}/in/old.parquet")
    put(f"{place}/in/new.parquet", _EDITED)
    old = make_job(input={"uri": f"{place}/in/old.parquet"}, output={"uri": f"{place}/old"})
    assert run(old, stream=io.StringIO()).exit_code == 0
    new = make_job(input={"uri": f"{place}/in/new.parquet"}, output={"uri": f"{place}/new"}, reuse=[f"{place}/old"])
    result = run(new, stream=io.StringIO())
    assert (result.exit_code, result.this_run.reused_rows) == (0, _ROWS - len(_EDITED))
    assert verify(f"{place}/new").complete
    before, after = (committed(f"{place}/{name}").read(["completion"]).column(0).to_pylist() for name in ("old", "new"))
    assert {row for row in range(_ROWS) if before[row] != after[row]} <= set(_EDITED)
    assert sum(f"/{layout.REUSE}/" in f"/{name}" for name in azurite.names(container)) == 1
    # Somebody takes a part of it away: the same command makes that part again, of the same index.
    part = min(name for name in storage.list_names(f"{place}/new") if name.startswith("part-"))
    storage.remove(f"{place}/new/{part}")
    said = io.StringIO()
    again = run(new, stream=said)
    assert (again.exit_code, again.this_run.rows > again.this_run.reused_rows > 0) == (0, True)
    assert "indexed by an earlier run" in said.getvalue()
