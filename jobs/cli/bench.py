"""The commands `bench engine`, `bench pipeline` and `bench offline`: how fast this machine is on a job's own rows."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import click

from jobs.cli.group import build_job
from jobs.cli.group import job_options
from jobs.cli.group import main

if TYPE_CHECKING:
    from jobs.bench.result import BenchResult
    from schemas.job import JobSpec


@main.group()
def bench() -> None:
    """Measure engines, the whole pipeline, or LoadGen's Offline scenario on a job's rows. Writes nothing to the job's output.

    Output tokens/s count generated tokens only, total tokens/s prompt and generated tokens.

    \b
    Example:
      tokenmill bench engine job.yaml
    """


def _bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A job as in `run`, how many of its rows, and how to print."""

    @functools.wraps(command)
    def with_options(job_file: str | None, as_json: bool, num_rows: int | None, **given: Any) -> None:
        own = {name: given.pop(name) for name in list(given) if name in _OWN}
        given["output_uri"] = given["output_uri"] or "nowhere"  # a benchmark's completions go into a folder that it throws away
        _print(command(build_job(job_file, given), num_rows=num_rows, **own), as_json)

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
        click.option("--rows", "num_rows", type=click.IntRange(min=1), help="Only the first rows."),
    ):
        with_options = option(with_options)
    return job_options(with_options)


_OWN = ("rounds", "no_raw", "min_duration", "target_qps", "reference", "baseline_model", "logs")
_rounds = click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="How often; the median counts.")


@bench.command()
@_bench_options
@_rounds
def engine(job: JobSpec, num_rows: int | None, rounds: int) -> BenchResult:
    """Replicas alone, fed directly with the table's rows.

    \b
    Examples:
      tokenmill bench engine job.yaml
      tokenmill bench engine --model demo --input 'in/*.parquet' --prompt question --rows 256 --set engine.options.max_num_seqs=256
    """
    from jobs.bench.engine import bench_engine

    return bench_engine(job, num_rows=num_rows, rounds=rounds, say=_say)


@bench.command()
@_bench_options
@_rounds
@click.option("--no-raw", is_flag=True, help="The pipeline alone, ordering as in the job; fresh replicas each round.")
def pipeline(job: JobSpec, num_rows: int | None, rounds: int, no_raw: bool) -> BenchResult:
    """Parquet to Parquet, and the share of the raw engine that it reaches, in turn on the same warm replicas.

    Both sides generate the same tokens: nothing is copied or reordered (engine.ordering is off), and the raw engine makes each row
    exactly as long as the pipeline did.

    \b
    Example:
      tokenmill bench pipeline job.yaml --rounds 3 --json
    """
    from jobs.bench.pipeline import bench_pipeline

    return bench_pipeline(job, num_rows=num_rows, rounds=rounds, with_raw=not no_raw, say=_say)


@bench.command()
@_bench_options
@click.option("--min-duration", type=click.FloatRange(min=0), default=600, show_default=True, help="Seconds; the rules ask for 600.")
@click.option("--target-qps", type=click.FloatRange(min=0, min_open=True), help="Samples/s to size the query for; by default measured.")
@click.option("--reference", metavar="COLUMN", help="Score completions against this column by ROUGE.")
@click.option("--baseline-model", help="Score this unquantised model beside it.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="An empty folder in which LoadGen's logs stay.")
def offline(
    job: JobSpec,
    num_rows: int | None,
    min_duration: float,
    target_qps: float | None,
    reference: str | None,
    baseline_model: str | None,
    logs: Path | None,
) -> BenchResult:
    """LoadGen's Offline scenario over the table's rows: accuracy, then performance. Not an MLPerf result: other model, other data.

    \b
    Example:
      tokenmill bench offline job.yaml --reference answer --baseline-model demo --logs loadgen/
    """
    from jobs.bench.offline import OfflineOptions
    from jobs.bench.offline import bench_offline

    options = OfflineOptions(
        min_duration_s=min_duration, target_qps=target_qps, reference=reference, baseline_model=baseline_model, logs=logs
    )
    return bench_offline(job, options, num_rows=num_rows, say=_say)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _print(result: BenchResult, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
        return
    from rich.console import Console

    from jobs.bench.result import print_result

    print_result(result, Console())
