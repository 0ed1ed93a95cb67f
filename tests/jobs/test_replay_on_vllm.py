"""Replay and reuse with the real vLLM on a tiny Llama: rows come out the same alone, by engines that are started as the parts say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.api import plan
from jobs.api import run
from jobs.forecast import forecast
from jobs.replay import replay
from jobs.verify import verify
from schemas.job import JobSpec
from tests.conftest import read_output

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

_ENGINE: dict[str, Any] = {"kind": "vllm", "options": {"max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20}}


def test_rows_of_every_kind_replay_the_same_and_an_edited_job_pays_for_its_edits(
    make_job: Callable[..., JobSpec], write_table: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"id": row, "prompt": f"question {row}", "params": None} for row in range(40)]
    rows[3]["prompt"] = None
    rows[5]["params"] = json.dumps({"temperature": 0.8, "ignore_eos": True})
    rows[7]["params"] = json.dumps({"structured_outputs": {"choice": ["yes", "no"]}})
    rows[9]["params"] = json.dumps({"structured_outputs": {"regex": "["}})
    rows[11]["params"] = json.dumps({"stop": ["e"], "ignore_eos": True})
    table = write_table(rows, "in-old/rows.parquet")
    cluster = {"kind": "local", "replicas": 1}
    inputs = {"uri": str(table), "sampling": "params"}
    old = make_job(engine=_ENGINE, cluster=cluster, input=inputs, output={"uri": str(tmp_path / "old"), "token_ids": True})
    assert run(old, stream=io.StringIO()).exit_code == 0
    found = {one.row.position: one for one in replay(str(tmp_path / "old"), [2, 3, 5, 7, 11, 9])}
    assert {position: one.difference for position, one in found.items() if not one.same} == {}
    assert found[7].now.choices[0].text in ("yes", "no")
    assert (found[3].now.error and found[3].now.error.kind) == "empty_prompt"
    assert found[9].row.answer.error is not None
    assert found[9].row.answer.error.kind == "rejected"
    assert found[9].now.error is not None
    assert found[2].remarks == ()
    # The same table with two rows edited: the others are taken over, but for those in error, and the drawn one, whose seed is its job's.
    for row in (20, 30):
        rows[row]["prompt"] = f"another question {row}"
    new_inputs = {**inputs, "uri": str(write_table(rows, "in-new/rows.parquet"))}
    output = {"uri": str(tmp_path / "new"), "token_ids": True}
    new = make_job(engine=_ENGINE, cluster=cluster, input=new_inputs, output=output, reuse=[str(tmp_path / "old")])
    lengths = forecast(plan(new), nodes=(1,)).lengths  # by the engine's record alone
    result = run(new, stream=io.StringIO())
    assert (result.exit_code, result.this_run.reused_rows) == (0, 40 - 2 - 2 - 1)
    assert round(lengths.reused.value) == result.this_run.reused_rows
    assert verify(str(tmp_path / "new")).complete
    before, after = (read_output(tmp_path / name).to_pylist() for name in ("old", "new"))
    assert [row for row in range(40) if before[row] != after[row] and row not in (5, 20, 30)] == []
