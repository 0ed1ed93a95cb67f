"""Damaged job.json, plan.parquet, manifest.parquet, status.json, control/drain and _SUCCESS: told in the project's words, never a crash.

Whatever lies there, nothing that was committed changes, and `verify` calls complete only what is.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jobs.api import cancel
from jobs.api import plan
from jobs.api import run
from jobs.api import status
from jobs.cli import main
from jobs.verify import verify
from schemas import layout
from schemas.errors import TokenmillError
from tests.chaos.checker import check
from tests.fuzz.conftest import KINDS
from tests.fuzz.conftest import SEEDS
from tests.fuzz.conftest import Finished
from tests.fuzz.conftest import damage
from tests.fuzz.conftest import examples

_FILES = (layout.JOB, layout.PLAN, layout.MANIFEST, layout.STATUS, layout.SUCCESS)
_JSON = (layout.JOB, layout.STATUS, layout.SUCCESS)
_SETTINGS = settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def use(finished: Finished) -> None:
    """Everything that reads an output; each may refuse."""
    parts = {name: finished.fs.cat_file(f"{finished.root}/{name}") for name in finished.part_names}
    calls: list[Callable[[], Any]] = [
        lambda: status(finished.out_uri),
        lambda: cancel(finished.out_uri),
        lambda: plan(finished.job()),
        lambda: run(finished.job(), stream=io.StringIO()),
    ]
    for call in calls:
        with contextlib.suppress(TokenmillError):
            call()
    with contextlib.suppress(TokenmillError):
        if verify(finished.out_uri).complete:
            assert check(finished.input_uri, finished.out_uri).fine
    for words in (["status"], ["status", "--json"], ["verify"], ["cancel"]):
        ended = CliRunner().invoke(main, [*words, finished.out_uri])
        assert ended.exception is None or isinstance(ended.exception, SystemExit), f"{words}: {ended.exception!r}"
    assert {name: finished.fs.cat_file(f"{finished.root}/{name}") for name in finished.part_names} == parts


@_SETTINGS
@given(name=st.sampled_from(_FILES), seed=SEEDS, kind=KINDS)
def test_a_damaged_file_is_told_and_costs_nothing(finished: Finished, name: str, seed: int, kind: str) -> None:
    finished.write(f"out/{name}", damage(finished.read(f"out/{name}"), seed, kind))
    try:
        use(finished)
    finally:
        finished.restore()


@_SETTINGS
@given(name=st.sampled_from(_JSON), data=VALUES)
def test_json_of_another_shape_is_told_and_costs_nothing(finished: Finished, name: str, data: Any) -> None:
    finished.write(f"out/{name}", json.dumps(data).encode())
    try:
        use(finished)
    finally:
        finished.restore()


@st.composite
def changed_json(draw: st.DrawFn, data: Any) -> Any:
    """The same JSON with one value replaced, or taken away."""
    place, path = data, []
    while isinstance(place, dict | list) and place and (not path or draw(st.booleans())):
        path.append(draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        place = place[path[-1]]
    changed = json.loads(json.dumps(data))
    holder = changed
    for step in path[:-1]:
        holder = holder[step]
    if draw(st.booleans()):
        del holder[path[-1]]
    else:
        holder[path[-1]] = draw(VALUES)
    return changed


@_SETTINGS
@given(data=st.data(), name=st.sampled_from(_JSON))
def test_json_with_a_value_changed_is_told_and_costs_nothing(finished: Finished, data: st.DataObject, name: str) -> None:
    changed = data.draw(changed_json(json.loads(finished.read(f"out/{name}"))))
    finished.write(f"out/{name}", json.dumps(changed).encode())
    try:
        use(finished)
    finally:
        finished.restore()


_INT64 = st.integers(-(2**63), 2**63 - 1)


@_SETTINGS
@given(row=st.integers(0, 2), column=st.sampled_from(["unit", "row_start", "row_stop", "position"]), value=_INT64)
def test_a_plan_with_a_number_changed_is_told_and_costs_nothing(finished: Finished, row: int, column: str, value: int) -> None:
    rewrite(finished, layout.PLAN, row, column, value)
    try:
        use(finished)
    finally:
        finished.restore()


@_SETTINGS
@given(name=st.sampled_from([layout.PLAN, layout.MANIFEST]), data=st.data())
def test_a_table_with_a_cell_changed_or_a_column_dropped_is_told_and_costs_nothing(
    finished: Finished, name: str, data: st.DataObject
) -> None:
    table = pq.read_table(io.BytesIO(finished.read(f"out/{name}")))
    column = data.draw(st.sampled_from(table.column_names))
    if data.draw(st.booleans()):
        write_table(finished, name, table.drop_columns(column))
    else:
        texts = pa.types.is_string(table.schema.field(column).type)
        value = data.draw(st.one_of(st.none(), st.text(max_size=10) if texts else st.integers(-5, 5)))
        rewrite(finished, name, data.draw(st.integers(0, table.num_rows - 1)), column, value)
    try:
        use(finished)
    finally:
        finished.restore()


@pytest.mark.parametrize("asked", [b"", b"nan", b"inf", b"-1", b"\xff", b"1e999", b"soon", b"9" * 5000])
def test_a_drain_request_of_any_content_is_a_request_or_none(finished: Finished, asked: bytes) -> None:
    finished.fs.rm_file(f"{finished.root}/{finished.part_names[0]}")
    finished.write(f"out/{layout.DRAIN}", asked)
    try:
        assert run(finished.job(), stream=io.StringIO()).state in ("complete", "drained")
    finally:
        finished.restore()


def rewrite(finished: Finished, name: str, row: int, column: str, value: Any) -> None:
    table = pq.read_table(io.BytesIO(finished.read(f"out/{name}")))
    values = table[column].to_pylist()
    values[row] = value
    index = table.schema.get_field_index(column)
    kind = table.schema.field(index).type
    if pa.types.is_floating(kind) and isinstance(value, int):
        values[row] = float(value)
    write_table(finished, name, table.set_column(index, table.schema.field(index), pa.array(values, kind)))


def write_table(finished: Finished, name: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    finished.write(f"out/{name}", buffer.getvalue())
