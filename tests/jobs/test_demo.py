"""The demo: a typed table with a few bad rows, and a job file that runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.api import load_job_data
from jobs.api import run
from jobs.demo import DEMO_SCHEMA
from jobs.demo import demo_table
from jobs.demo import write_demo
from jobs.verify import verify
from schemas.job import parse_job
from tests.conftest import build_tiny_model
from tests.conftest import read_output

_LEN = 8192  # the demo model's


@pytest.fixture
def roomy_model(tmp_path: Path) -> Path:
    """The tiny model with the demo model's length."""
    model = build_tiny_model(tmp_path / "roomy")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": _LEN}))
    return model


def test_the_demo_table_has_240_typed_rows() -> None:
    table = demo_table()
    assert (table.num_rows, table.schema.equals(DEMO_SCHEMA)) == (240, True)
    assert len(set(table["id"].to_pylist())) == 240
    assert len(set(table["task"].to_pylist())) >= 4
    kinds = [pa.types.is_dictionary, pa.types.is_timestamp, pa.types.is_decimal, pa.types.is_list, pa.types.is_struct]
    assert [any(is_kind(field.type) for field in table.schema) for is_kind in kinds] == [True] * len(kinds)


def test_the_demo_job_reports_its_8_bad_rows(tmp_path: Path, roomy_model: Path) -> None:
    data = load_job_data(write_demo(str(tmp_path / "demo"), max_tokens=8))
    engine = {"kind": "simulated", "options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7}}
    result = run(parse_job({**data, "model": str(roomy_model), "engine": engine, "cluster": {"kind": "inline"}}), stream=io.StringIO())
    assert (result.state, result.exit_code, result.rows) == ("complete", 0, 240)
    assert result.totals.errors == {"empty_prompt": 4, "bad_sampling": 3, "prompt_too_long": 1}
    assert {example["kind"] for example in result.totals.examples} == {"empty_prompt", "bad_sampling", "prompt_too_long"}
    made = read_output(tmp_path / "demo" / "completions")
    assert made.select(DEMO_SCHEMA.names).cast(DEMO_SCHEMA).to_pylist() == demo_table().to_pylist()
    assert verify(str(tmp_path / "demo" / "completions")).complete


def test_the_demo_is_written_once_and_can_be_resumed(tmp_path: Path) -> None:
    write_demo(str(tmp_path), max_tokens=8)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prompts").iterdir()}
    assert len(before) == 3
    write_demo(str(tmp_path), max_tokens=8)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prompts").iterdir()} == before


@pytest.mark.parametrize("name", ["demo", "with space", "colon: and # hash", "braces {x}", "quote's"])
def test_the_demos_job_file_is_read_back_wherever_it_lies(tmp_path: Path, name: str) -> None:
    job = parse_job(load_job_data(write_demo(str(tmp_path / name), max_tokens=8)))
    assert (job.input.uris, job.output.uri) == (
        [str(tmp_path / name / "prompts" / "*.parquet")],
        str(tmp_path / name / "completions"),
    )
    assert (job.model, job.sampling.max_tokens) == ("demo", 8)


def test_the_demos_job_file_has_a_schema_for_editors_beside_it(tmp_path: Path) -> None:
    job_file = Path(write_demo(str(tmp_path), max_tokens=8))
    (comment,) = [line for line in job_file.read_text().splitlines() if "$schema=" in line]
    schema = json.loads((tmp_path / comment.split("$schema=")[1]).read_text())
    assert {"model", "input", "output"} <= set(schema["properties"])
