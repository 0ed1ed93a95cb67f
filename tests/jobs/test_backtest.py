"""The throughput model against what others published."""

from __future__ import annotations

import json
import statistics

from click.testing import CliRunner

from jobs.backtest import backtest
from jobs.backtest import fit
from jobs.cli import main
from pipeline.roofline import CONSTANTS

_GRID = {
    "gemm_share": (0.85, 0.9, 0.95, 1.0),
    "vllm_share": (0.55, 0.6, 0.65, 0.7, 0.75),
    "bandwidth_share": (0.7, 0.8, 0.9),
    "activation_passes": (10.0, 15.0, 20.0, 25.0),
    "host_s_per_row": (1e-5, 1.5e-5, 2e-5, 2.5e-5),
}


def test_the_constants_are_what_the_fitted_rows_give() -> None:
    assert fit(_GRID) == CONSTANTS


def test_errors_are_as_small_as_promised_and_few_rows_were_fitted() -> None:
    found = backtest()
    closed = found.errors()
    assert len(closed) == 19
    assert len(found.errors(fitted=True)) * 3 <= len(closed)
    assert statistics.median(closed) <= 0.15
    assert max(closed) <= 0.35
    assert statistics.median(found.errors(fitted=False)) <= 0.15
    assert max(found.errors(division="open")) <= 0.35


def test_the_interval_holds_four_of_five_rows_that_were_not_fitted() -> None:
    found = backtest()
    low, high = found.ratio_interval(0.8)
    blind = [1 / row.ratio for row in found.rows if not row.published.fitted]
    assert low < 1 < high
    assert sum(low <= ratio <= high for ratio in blind) >= 0.75 * len(blind)


def test_the_command_prints_every_row_and_its_constants() -> None:
    result = CliRunner().invoke(main, ["plan", "--backtest", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert len(said["results"]) == 22
    assert said["constants"]["vllm_share"] == CONSTANTS.vllm_share
    assert CliRunner().invoke(main, ["plan", "--backtest"]).output.count("fitted") >= 7
