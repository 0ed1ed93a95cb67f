"""What a benchmark says of what it measured: medians, shares, statistics, words."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from jobs.bench.result import BenchResult
from jobs.bench.result import Measured
from jobs.bench.result import ReplicaMeasured
from jobs.bench.result import Setting
from jobs.bench.result import median_round
from jobs.bench.result import print_result

SETTING = Setting(
    model={"name": "m", "weights_sha256": "abc", "quantisation": "none"},
    machine={"cores": 2, "cpu": "a CPU", "memory_bytes": 1},
    settings={"dtype": "float32", "ignore_eos": False, "prefix_caching": False, "environment": {"MALLOC_TRIM_THRESHOLD_": "9"}},
    versions={"engine": "vllm 1"},
    start_s={"a": 1.5},
    cores=2,
)


def measured(output_tokens: int, elapsed_s: float = 10.0) -> Measured:
    replicas = (
        ReplicaMeasured(name="a", rows=3, prompt_tokens=30, output_tokens=output_tokens - 40, seconds=8.0),
        ReplicaMeasured(name="b", rows=1, prompt_tokens=10, output_tokens=40, seconds=10.0),
    )
    return Measured(rows=4, prompt_tokens=40, output_tokens=output_tokens, elapsed_s=elapsed_s, replicas=replicas)


def result(**changes: Any) -> BenchResult:
    rounds = (measured(100), measured(300), measured(200))
    values: dict[str, Any] = {"mode": "pipeline", "rounds": rounds, "setting": SETTING, "window": "all of it", **changes}
    return BenchResult(**values)


def test_the_round_in_the_middle_counts_and_of_two_the_slower() -> None:
    assert median_round([measured(100), measured(300), measured(200)]) == measured(200)
    assert median_round([measured(300), measured(100)]) == measured(100)


def test_the_share_is_the_median_of_the_rounds_own_shares() -> None:
    raw = (measured(100, 5.0), measured(300, 12.0), measured(200, 9.0))
    assert result(raw=raw).share_of_raw_engine == 0.9
    assert result().share_of_raw_engine is None


def test_json_names_output_and_total_tokens_at_the_top_and_has_null_where_a_mode_has_none() -> None:
    data = result().to_dict()
    assert {
        key: data[key] for key in ("share_of_raw_engine", "output_tokens_per_s", "total_tokens_per_s", "elapsed_s", "num_requests")
    } == {
        "share_of_raw_engine": None,
        "output_tokens_per_s": 20.0,
        "total_tokens_per_s": 24.0,
        "elapsed_s": 10.0,
        "num_requests": 4,
    }
    assert (data["total_prompt_tokens"], data["total_output_tokens"]) == (40, 200)
    assert data["per_core"] == {"cores": 2, "output_tokens_per_s": 10.0, "total_tokens_per_s": 12.0}
    assert [item["output_tokens_per_s"] for item in data["per_replica"]["replicas"]] == [20.0, 4.0]
    assert data["per_replica"]["statistics"]["output_tokens_per_s"] == {"min": 4.0, "max": 20.0, "mean": 12.0, "median": 12.0, "sum": 24.0}
    assert [item["output_tokens_per_s"] for item in data["rounds"]] == [10.0, 30.0, 20.0]
    assert (data["model"]["weights_sha256"], data["machine"]["cpu"], data["versions"]["engine"]) == ("abc", "a CPU", "vllm 1")
    assert data["settings"]["environment"] == {"MALLOC_TRIM_THRESHOLD_": "9"}


def test_the_table_has_the_same_figures() -> None:
    said = io.StringIO()
    print_result(result(raw=(measured(100, 5.0),) * 3, error_rows=7), Console(file=said))
    lines = {line[:20].strip(): " ".join(line[20:].split()) for line in said.getvalue().splitlines()}
    assert lines["output tokens/s"] == "20.0"
    assert lines["total tokens/s"] == "24.0 (prompt and output)"
    assert lines["requests"] == "4; 7 rows of the table never reach an engine"
    assert lines["share of raw engine"] == "1.000, median of 3"
    assert "MALLOC_TRIM_THRESHOLD_ 9" in said.getvalue()
