"""`tokenmill bench` as a user runs it: real processes, the simulated engine, and each mode once on the real vLLM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from click.testing import Result

from jobs.cli import main

_SIMULATED = ["--engine", "simulated", "--set", "engine.options.decode_tokens_per_s=500"]
_REAL = ["--set", "engine.options.max_num_seqs=8", "--set", "engine.options.kv_cache_memory_bytes=33554432"]


@pytest.fixture
def arguments(tiny_model: Path, write_table: Callable[..., Path]) -> list[str]:
    """A job over 40 rows, one of which cannot be asked."""
    rows: list[dict[str, Any]] = [{"prompt": f"question {row}" * (1 + row % 3), "answer": f"answer {row}"} for row in range(40)]
    rows[5]["prompt"] = None
    path = write_table(rows)
    return ["--model", str(tiny_model), "--input", str(path), "--prompt", "prompt", "--max-tokens", "12", "--replicas", "2"]


def tokenmill(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def bench(mode: str, *arguments: str) -> dict[str, Any]:
    done = tokenmill("bench", mode, *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    assert data["mode"] == mode
    assert data["output_tokens_per_s"] == pytest.approx(data["total_output_tokens"] / data["elapsed_s"], rel=0.05)
    assert data["total_tokens_per_s"] > data["output_tokens_per_s"] > 0
    return data


def refused(*arguments: str) -> str:
    done = tokenmill("bench", *arguments)
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.slow
def test_engines_alone_are_fed_the_rows_of_the_table(arguments: list[str]) -> None:
    data = bench("engine", *arguments, *_SIMULATED, "--rounds", "2")
    assert (data["num_requests"], data["error_rows"], len(data["rounds"])) == (39, 1, 2)
    assert data["share_of_raw_engine"] is None
    assert [replica["num_requests"] for replica in data["per_replica"]["replicas"]] == [20, 19]
    assert data["rounds"][0]["total_output_tokens"] == data["rounds"][1]["total_output_tokens"]
    assert data["settings"]["replicas"] == 2
    assert len(data["model"]["weights_sha256"]) == 64


@pytest.mark.slow
def test_pipeline_and_raw_engine_generate_the_same_tokens(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = bench("pipeline", *arguments, *_SIMULATED, "--rounds", "2", "--output", str(output))
    assert (data["num_requests"], data["error_rows"]) == (40, 1)
    assert [each["total_output_tokens"] for each in data["rounds"]] == [each["total_output_tokens"] for each in data["raw_rounds"]]
    assert [each["num_requests"] for each in data["raw_rounds"]] == [39, 39]
    assert 0 < data["share_of_raw_engine"] < 2
    assert data["settings"]["ordering"] == "off"
    assert sum(replica["output_tokens"] for replica in data["per_replica"]["replicas"]) == data["total_output_tokens"]
    assert not output.exists()


@pytest.mark.slow
def test_the_pipeline_alone_keeps_the_jobs_ordering(arguments: list[str]) -> None:
    data = bench("pipeline", *arguments, *_SIMULATED, "--rounds", "1", "--no-raw", "--rows", "20")
    assert (data["num_requests"], data["share_of_raw_engine"], data["raw_rounds"]) == (20, None, [])
    assert data["settings"]["ordering"] == "auto"


@pytest.mark.slow
def test_rounds_that_may_copy_rows_start_with_fresh_replicas(arguments: list[str]) -> None:
    """The second round would be answered from the first one's completions."""
    data = bench("pipeline", *arguments, *_SIMULATED, "--rounds", "2", "--no-raw")
    assert data["rounds"][0]["total_output_tokens"] == data["rounds"][1]["total_output_tokens"]
    assert sum(replica["num_requests"] for replica in data["per_replica"]["replicas"]) == 39


@pytest.mark.slow
def test_loadgen_issues_every_sample_in_whole_passes_and_its_verdict_is_handed_on(arguments: list[str], tmp_path: Path) -> None:
    logs, longer = tmp_path / "logs", ["--set", "sampling.min_tokens=2"]  # LoadGen counts nothing of a sample with one token
    data = bench("offline", *arguments, *_SIMULATED, "--min-duration", "1", "--reference", "answer", "--logs", str(logs), *longer)
    said = data["offline"]
    assert said["label"] == "LoadGen Offline rules; not an MLPerf result: other model, other data"
    assert (said["scenario"], said["min_queries_met"], said["performance_sample_count"]) == ("Offline", True, 39)
    assert said["passes"] == int(said["passes"])
    assert data["num_requests"] == said["generated_samples_per_query"] == 39 * said["passes"]
    assert said["result_validity"] == "INVALID"
    assert said["invalid_reasons"][-1] == "the rules ask for 600 s at least, this run was asked for 1 s"
    assert said["test06"] == {"eos_only_at_the_end": True, "token_counts_match": True, "samples": 39}
    assert said["accuracy"]["gen_num"] == 39
    assert said["accuracy"]["gen_tok_len"] * said["passes"] == data["total_output_tokens"]
    assert {"rouge1", "rouge2", "rougeL", "tokens_per_sample"} <= set(said["accuracy"])
    whole = said["end_to_end"]
    assert whole["engine_s"] == said["accuracy_elapsed_s"]
    assert 0 < whole["tokens_per_second"] < said["accuracy"]["gen_tok_len"] / whole["engine_s"]  # reading and writing take their time, too
    assert len(said["set"]["sha256"]) == 64
    assert min(said["seeds"].values()) > 0
    assert data["output_tokens_per_s"] == pytest.approx(said["tokens_per_second"], rel=0.001)
    assert "MLPerf Results Summary" in (logs / "performance" / "mlperf_log_summary.txt").read_text()
    assert json.loads((logs / "accuracy" / "mlperf_log_accuracy.json").read_text())


@pytest.mark.slow
def test_a_run_that_is_too_short_is_invalid_for_loadgens_own_reason(arguments: list[str]) -> None:
    said = bench("offline", *arguments, *_SIMULATED, "--min-duration", "30", "--target-qps", "0.1")["offline"]
    assert (said["loadgen_validity"], said["min_duration_met"]) == ("INVALID", False)
    assert "Increase expected QPS" in said["invalid_reasons"][0]


@pytest.mark.slow
def test_a_baseline_is_scored_beside(arguments: list[str], tiny_model: Path) -> None:
    options = ["--min-duration", "0", "--reference", "answer", "--baseline-model", str(tiny_model), "--target-qps", "1"]
    accuracy = bench("offline", *arguments, *_SIMULATED, *options)["offline"]["accuracy"]
    assert accuracy["baseline"]["gen_tok_len"] == accuracy["gen_tok_len"]
    assert accuracy["share_of_baseline"] == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "tokens_per_sample": 1.0}
    assert accuracy["passes"] is True


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("engine", ["--set", "engine.options.decode_tokens_per_second=1"], "decode_tokens_per_second"),
        ("engine", ["--replicas", "1", "--cluster", "inline"], "cluster.kind: found inline"),
        ("pipeline", ["--prompt", "nothing"], "nothing"),
        ("pipeline", ["--set", "sampling.n=2", "--temperature", "1"], "sampling.n: found 2"),
        ("offline", ["--temperature", "0.7"], "temperature 0.7"),
        ("offline", ["--reference", "solution"], "--reference: found 'solution'"),
        ("offline", ["--baseline-model", "demo"], "--baseline-model needs --reference"),
        ("engine", ["--engine", "vllm", "--set", "engine.options.enable_prefix_caching=true"], "several rounds generate the same rows"),
        ("pipeline", ["--engine", "vllm", "--set", "engine.options.enable_prefix_caching=true"], "pipeline and raw engine generate"),
        ("offline", ["--engine", "vllm", "--set", "engine.options.enable_prefix_caching=true"], "rules forbid"),
        ("engine", ["--rows", "0"], "0 is not in the range"),
        ("engine", ["--min-duration", "5"], "No such option"),
    ],
)
def test_a_wrong_benchmark_is_refused_before_anything_starts(arguments: list[str], mode: str, options: list[str], message: str) -> None:
    assert message in refused(mode, *arguments, "--engine", "simulated", *options)


def test_a_table_of_which_no_row_can_be_asked_is_refused(tiny_model: Path, write_table: Callable[..., Path]) -> None:
    path = write_table([{"prompt": ""}, {"prompt": "x" * 900}])
    message = refused("engine", "--model", str(tiny_model), "--input", str(path), "--prompt", "prompt", "--engine", "simulated")
    assert "none of its 2 rows can be asked" in message


def test_logs_are_not_mixed_with_what_is_there(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine").write_text("")
    assert "not an empty folder" in refused("offline", *arguments, "--engine", "simulated", "--logs", str(tmp_path / "logs"))


@pytest.mark.chaos
@pytest.mark.parametrize("mode", ["engine", "pipeline", "offline"])
def test_a_replica_that_dies_is_an_error_with_its_cause(arguments: list[str], mode: str) -> None:
    deadly = ["--engine", "simulated", "--set", f"engine.options.dies_on_token={_token_of('q')}"]
    done = tokenmill("bench", mode, *arguments, *deadly)
    assert done.exit_code == 1
    assert "SIGABRT" in done.stderr
    assert isinstance(done.exception, SystemExit)


@pytest.mark.chaos
@pytest.mark.parametrize("mode", ["engine", "pipeline", "offline"])
def test_ctrl_c_leaves_no_process(arguments: list[str], mode: str) -> None:
    slow = ["--engine", "simulated", "--set", "engine.options.decode_tokens_per_s=4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "bench", mode, *arguments, *slow],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored where a shell started pytest in the background
    )
    try:
        assert process.stderr is not None
        process.stderr.readline()  # the first line comes when replicas are asked for, or up
        replicas = _wait_for_replicas(process.pid)
        os.kill(process.pid, signal.SIGINT)
        process.wait(60)
        assert process.returncode == 130
        _, alive = psutil.wait_procs(replicas, timeout=20)
        assert alive == []
    finally:
        process.kill()
        process.communicate()


@pytest.mark.engine
@pytest.mark.parametrize("mode", ["engine", "pipeline", "offline"])
def test_the_real_engine_is_measured(arguments: list[str], mode: str, tmp_path: Path) -> None:
    options = {
        "engine": ["--rounds", "1"],
        "pipeline": ["--rounds", "2"],
        "offline": ["--min-duration", "1", "--reference", "answer", "--set", "sampling.ignore_eos=true"],
    }[mode]
    data = bench(mode, *arguments, *_REAL, "--rows", "16", "--replicas", "1", *options)
    assert data["settings"]["engine"] == "vllm"
    assert data["settings"]["prefix_caching"] is False
    assert data["settings"]["dtype"] in ("float32", "float16", "bfloat16")
    assert data["settings"]["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert data["versions"]["engine"].startswith("vllm ")
    if mode == "pipeline":
        assert [each["total_output_tokens"] for each in data["rounds"]] == [each["total_output_tokens"] for each in data["raw_rounds"]]
    if mode == "offline":
        assert data["offline"]["accuracy"]["gen_tok_len"] == 15 * 12
        assert data["offline"]["test06"]["token_counts_match"] is True


def _token_of(character: str) -> int:
    """In the tiny model's byte-level vocabulary: five specials, then the sorted alphabet."""
    from tokenizers import pre_tokenizers

    return 5 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


def _wait_for_replicas(pid: int) -> list[psutil.Process]:
    names = ("pipeline.trial_worker", "pipeline.worker")
    for _ in range(300):
        found = [child for child in psutil.Process(pid).children(recursive=True) if any(name in child.cmdline() for name in names)]
        if len(found) == 2:
            return found
        time.sleep(0.1)
    raise AssertionError("no replica was started")
