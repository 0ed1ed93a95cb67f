"""What the gate compares with: an engine for the unquantised model, or what another node wrote down of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.gate import plan_source
from jobs.gate import read_baseline
from jobs.gate import store_baseline
from jobs.references import Row
from pipeline.measure import Measured
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.profile import Machine
from pipeline.profile import load_profile
from schemas.errors import JobError

ROWS = [Row(prompt_ids=[1, 2, row], reference_ids=[3, row], reference=f"answer {row}") for row in range(4)]
SAID = Measured(logprobs=[-1.0, -2.5, -3.0, -4.0], completions=[[5], [6, 7], [], [8]], dtype="bfloat16", engine="vllm 1")


@pytest.fixture
def source(tiny_model: Path) -> Model:
    return resolve_model(str(tiny_model))


@pytest.mark.parametrize(
    "machine",
    [
        Machine(cores=96, memory_bytes=1900 << 30, num_gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_bytes=80 << 30),
        Machine(cores=8, memory_bytes=64 << 30),
    ],
    ids=["GPUs", "CPU"],
)
def test_where_the_unquantised_model_fits_no_engine_the_ways_on_are_named(source: Model, machine: Machine) -> None:
    with pytest.raises(JobError) as refused:
        plan_source(replace(source, weights_bytes=810 << 30), ROWS, max_tokens=8, machine=machine)
    said = str(refused.value)
    assert all(words in said for words in ("fit", "on a node that holds it", "`tokenmill model baseline", "--baseline FILE", "--no-gate"))
    assert "model prepare" not in said  # which was just asked for


def test_the_unquantised_models_cache_loses_nothing_that_would_then_not_be_judged(source: Model) -> None:
    machine = Machine(cores=96, memory_bytes=1900 << 30, num_gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_bytes=80 << 30)
    profile = load_profile("auto", machine)
    assert profile.options["kv_cache_dtype"] == "fp8"
    assert plan_source(source, ROWS, max_tokens=8, machine=machine).options["kv_cache_dtype"] == "auto"


def test_what_a_larger_node_wrote_down_is_read_as_it_was_said(source: Model, tmp_path: Path) -> None:
    uri = str(tmp_path / "baseline.json")
    store_baseline(uri, source, ROWS, SAID, max_tokens=8)
    store_baseline(uri, source, ROWS, SAID, max_tokens=8)  # the same again is no other
    assert read_baseline(uri, source, ROWS, max_tokens=8) == SAID
    with pytest.raises(JobError, match=r"--to: .* is there already"):
        store_baseline(uri, source, ROWS, replace(SAID, dtype="float32"), max_tokens=8)


def test_what_an_earlier_version_wrote_down_with_a_cache_of_fp8_is_refused(source: Model, tmp_path: Path) -> None:
    uri = tmp_path / "baseline.json"
    store_baseline(str(uri), source, ROWS, SAID, max_tokens=8)
    uri.write_text(uri.read_text().replace('"kv_cache_dtype":"auto",', ""))
    with pytest.raises(JobError, match=r"of an engine whose KV cache may have lost precision; give"):
        read_baseline(str(uri), source, ROWS, max_tokens=8)


@pytest.mark.parametrize(
    ("rows", "max_tokens", "change", "words"),
    [
        (ROWS[:3], 8, lambda model: model, "of other rows; give"),
        (ROWS, 9, lambda model: model, "of other --max-tokens; give"),
        (ROWS, 8, lambda model: replace(model, weights_digest="other"), "of another model; give"),
    ],
)
def test_a_baseline_of_something_else_is_refused(
    source: Model, tmp_path: Path, rows: list[Row], max_tokens: int, change: Callable[[Model], Model], words: str
) -> None:
    uri = str(tmp_path / "baseline.json")
    store_baseline(uri, source, ROWS, SAID, max_tokens=8)
    with pytest.raises(JobError, match=words):
        read_baseline(uri, change(source), rows, max_tokens=max_tokens)


def test_a_file_that_is_no_baseline_is_refused(source: Model, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    with pytest.raises(JobError, match="there is nothing at"):
        read_baseline(str(file), source, ROWS, max_tokens=8)
    file.write_text("{}")
    with pytest.raises(JobError, match="is none that `tokenmill model baseline` made"):
        read_baseline(str(file), source, ROWS, max_tokens=8)
