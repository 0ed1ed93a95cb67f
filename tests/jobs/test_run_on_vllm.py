"""The main job as a user runs it: worker processes, the real vLLM, a tiny Llama. Each test starts one replica."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import api
from schemas.errors import EngineStartError
from schemas.job import JobSpec
from schemas.manifest import META_PROVENANCE
from schemas.manifest import META_REPORT
from tests.conftest import read_output

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

_BLOCK = 32
ENGINE: dict[str, Any] = {"kind": "vllm", "options": {"max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20, "block_size": _BLOCK}}


def test_a_table_comes_out_whole_through_the_real_engine(
    make_job: Callable[..., JobSpec], write_table: Callable[..., Path], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"id": row, "prompt": f"question {row}", "params": None} for row in range(60)]
    for row in rows[40:]:
        row["prompt"] = f"{'as all of these begin ' * 3}{row['id']}"
    rows[3]["prompt"] = None
    rows[7]["prompt"] = "x" * 600
    rows[11]["params"] = json.dumps({"structured_outputs": {"choice": ["yes", "no"]}})
    rows[13]["params"] = json.dumps({"structured_outputs": {"regex": "["}})
    rows[17]["params"] = json.dumps({"max_tokens": 3, "ignore_eos": True})
    rows[19]["params"] = json.dumps({"temperature": 0.8, "ignore_eos": True})
    rows[23]["params"] = json.dumps({"temperature": -1})
    whole = pa.Table.from_pylist(rows)
    write_table(whole.slice(0, 25), "in/a.parquet")
    write_table(whole.slice(25), "in/b.parquet")
    job = make_job(engine=ENGINE, cluster={"kind": "local", "replicas": 1}, input={"sampling": "params"}, output={"token_ids": True})
    said = io.StringIO()
    result = api.run(job, stream=said)
    assert (result.state, result.exit_code) == ("complete", 0), said.getvalue()
    assert result.totals.errors == {"empty_prompt": 1, "prompt_too_long": 1, "rejected": 1, "bad_sampling": 1}
    table = read_output(tmp_path / "out")
    assert table.select(["id", "prompt", "params"]).to_pylist() == rows
    out = table.to_pylist()
    assert [row["id"] for row in out if row["error"] is not None] == [3, 7, 13, 23]
    assert out[11]["completion"] in ("yes", "no")
    assert (out[17]["completion_tokens"], out[19]["completion_tokens"]) == (3, 8)
    assert all(len(row["token_ids"]) == row["completion_tokens"] for row in out if row["error"] is None)
    assert api.verify(str(tmp_path / "out")).complete
    part = next((tmp_path / "out").glob("part-*.parquet"))
    metadata = pq.read_metadata(part).metadata
    provenance = json.loads(metadata[META_PROVENANCE])
    assert provenance["engine"]["kind"] == "vllm"
    assert provenance["engine"]["version"].startswith("vllm")
    assert provenance["engine"]["dtype"] in ("float32", "float16", "bfloat16")
    assert provenance["engine"]["options"]["max_num_seqs"] == 16
    assert len(provenance["weights"]) == len(provenance["tokenizer"]) == len(provenance["chat_template"]) == 64
    assert json.loads(metadata[META_REPORT])["worker"] == "local-0"
    assert table.schema.field("error").type == pa.struct([("kind", pa.string()), ("message", pa.string())])
    # Every second of the replica is of one kind, and every token was generated once and kept.
    assert result.account is not None
    (replica,) = result.account.replicas
    assert replica.lifetime_s <= result.account.elapsed_s
    assert replica.seconds["start"] > 0
    assert replica.seconds["busy"] > 0
    assert replica.seconds["lost"] == 0
    assert replica.generated_tokens == replica.output_tokens == result.totals.completion_tokens - result.totals.copied_tokens
    assert 0 < replica.busy_tokens <= replica.generated_tokens
    # Of rows that begin alike, those that came after the first lot were found in the prefix cache, by whole blocks.
    assert result.this_run.cached_prompt_tokens >= _BLOCK
    assert result.this_run.cached_prompt_tokens % _BLOCK == 0
    assert result.account.cached_prompt_tokens == result.this_run.cached_prompt_tokens
    assert result.account.engine["version"].startswith("vllm")
    # The same command again starts no engine and changes nothing.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    again = api.run(job, stream=io.StringIO())
    assert (again.state, again.this_run.rows, again.start_s) == ("complete", 0, {})
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")} == before


def test_an_engine_that_cannot_start_is_reported_with_its_own_cause(
    make_job: Callable[..., JobSpec], write_table: Callable[..., Path]
) -> None:
    write_table([{"prompt": "a question"}])
    job = make_job(engine={"kind": "vllm", "options": {"max_num_seq": 16}}, cluster={"kind": "local", "replicas": 1})
    with pytest.raises(EngineStartError, match=r"engine\.options\.max_num_seq: .*near it: max_num_seqs") as caught:
        api.run(job, stream=io.StringIO())
    assert caught.value.exit_code == 2
