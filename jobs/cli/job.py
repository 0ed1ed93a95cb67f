"""Commands on jobs: run, verify, status, cancel, schema, demo."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

import click
from rich.console import Console

from jobs.cli.group import FLAGS
from jobs.cli.group import build_job
from jobs.cli.group import job_options
from jobs.cli.group import main
from jobs.cli.group import reuse_option
from jobs.cli.group import storage_option
from schemas.errors import EXIT_DRAINED
from schemas.errors import EXIT_UNITS_FAILED


@main.command()
@job_options
@click.option("--deadline", help="Drain in time to be done by then: 8h from now on, or 2026-11-27T06:00:00Z.")
@click.option("--max-cost", type=float, metavar="USD", help="Drain before the nodes cost more.")
@click.option("--preflight", is_flag=True, help="With --cluster address: measure the nodes first, and leave slow ones out.")
@click.option("--canary", type=click.IntRange(min=1), metavar="ROWS", help="Run so many rows from all over first, and show some.")
@reuse_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def run(
    job_file: str | None,
    as_json: bool,
    preflight: bool,
    deadline: str | None,
    max_cost: float | None,
    canary: int | None,
    reuse: tuple[str, ...],
    **flags: Any,
) -> None:
    """Run a job; run it again to go on after a stop.

    Ctrl-C drains: units in flight are finished and committed. A second Ctrl-C stops at once.

    \b
    Examples:
      tokenmill run job.yaml
      tokenmill run --model demo --input 'data/*.parquet' --prompt question --output out/
    """
    from jobs.api import StoppedAtOnce
    from jobs.api import run as run_job
    from jobs.summary import print_summary

    resume = shlex.join(["tokenmill", *sys.argv[1:]])
    limits = {"limits.deadline": deadline, "limits.max_cost_usd": max_cost, "canary": canary, "reuse": list(reuse) or None}
    job = build_job(job_file, flags, more={field: value for field, value in limits.items() if value is not None})
    if preflight:
        from jobs.preflight import without_slow_nodes

        job = without_slow_nodes(job, lambda text: click.echo(text, err=True))
    try:
        result = run_job(job)
    except StoppedAtOnce:
        click.echo(f"\nstopped at once; committed units stay. To go on: {resume}", err=True)
        # Threads of units in flight may still wait for an engine that is gone; nothing of theirs was committed.
        sys.stderr.flush()
        os._exit(EXIT_DRAINED)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    else:
        print_summary(result, Console(soft_wrap=not sys.stdout.isatty()), resume)
    raise click.exceptions.Exit(result.exit_code)


@main.command()
@click.argument("output")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify(output: str, as_json: bool) -> None:
    """Prove that OUTPUT has every input row once, in order, with its columns; exit code 0 only then.

    \b
    Example:
      tokenmill verify out/
    """
    from jobs.verify import verify as verify_output

    verdict = verify_output(output)
    if as_json:
        values = {
            "complete": verdict.complete,
            "rows_expected": verdict.rows_expected,
            "rows_proven": verdict.rows_proven,
            "error_rows": verdict.error_rows,
            "problems": verdict.problems,
        }
        click.echo(json.dumps(values, indent=1))
    else:
        for problem in verdict.problems[:50]:
            click.echo(problem)
        if len(verdict.problems) > 50:
            click.echo(f"... and {len(verdict.problems) - 50} more")
        word = "complete" if verdict.complete else "NOT complete"
        click.echo(
            f"{word}: {verdict.rows_proven:,} of {verdict.rows_expected:,} rows proven by content in {verdict.units} units, "
            f"{verdict.error_rows:,} of them error rows"
        )
    raise click.exceptions.Exit(0 if verdict.complete else EXIT_UNITS_FAILED)


@main.command()
@click.argument("output")
@storage_option
@click.option("--watch", is_flag=True, help="Go on showing it, live, until it ends.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(output: str, watch: bool, as_json: bool) -> None:
    """Say how the job that writes to OUTPUT stands, from storage alone; of one on Azure Batch also what Batch says.

    \b
    Examples:
      tokenmill status out/
      tokenmill status out/ --watch
    """
    from dataclasses import asdict

    from jobs.status import on_batch

    if watch:
        from jobs.handle import attach

        if on_batch(output):
            from jobs.batch_standing import wait_for_driver

            wait_for_driver(output, click.echo)
        job = attach(output).wait()
        raise click.exceptions.Exit(0 if job.status().state == "complete" else EXIT_UNITS_FAILED)

    from jobs.progress import seconds_words
    from jobs.status import read_status

    standing = None
    if on_batch(output):
        from jobs.batch_standing import status_of  # loads Azure's SDK

        found, standing = status_of(output)
    else:
        found = read_status(output)
    if as_json:
        more = {} if standing is None else {"batch": asdict(standing)}
        click.echo(json.dumps({**asdict(found), **more}, indent=1))
        return
    if not found.fingerprint:
        click.echo(f"{found.name}: {found.state}\nno plan is stored in {found.out_uri} yet")
    else:
        click.echo(f"{found.name} ({found.fingerprint[:8]}): {found.state}")
        done = f"{found.rows_done:,} of {found.rows:,} rows and {found.units_done} of {found.units} units"
        click.echo(f"{done} are committed in {found.out_uri}")
    said = found.said
    if said and found.age_s is not None:
        eta = "" if said["eta_s"] is None else f", ETA {seconds_words(said['eta_s'])}"
        click.echo(
            f"{seconds_words(found.age_s)} ago on {said['host']}: {said['output_tokens_per_s']} output tok/s, "
            f"{said['error_rows']} error rows, {len(said['replicas'])} replicas{eta}"
        )
        for unit, reason in said["failed_units"].items():
            click.echo(f"unit {unit} failed: {reason}")
    if standing is not None:
        click.echo(standing.words)


@main.command()
@click.argument("output")
@storage_option
def cancel(output: str) -> None:
    """Ask the job that writes to OUTPUT to drain: units in flight are finished and committed. On Azure Batch from its submit on.

    \b
    Example:
      tokenmill cancel out/
    """
    from jobs.status import cancel as cancel_job
    from jobs.status import cancel_words
    from jobs.status import on_batch

    if not on_batch(output):
        click.echo(cancel_words(cancel_job(output)))
        return
    from jobs.batch_standing import cancel as cancel_on_batch  # loads Azure's SDK

    for line in cancel_on_batch(output):
        click.echo(line)


@main.command()
def schema() -> None:
    """Print the job file's JSON Schema, for editors.

    \b
    Example:
      tokenmill schema > job.schema.json
    """
    from schemas.job import json_schema

    click.echo(json_schema(), nl=False)


@main.command()
@click.option("--output", "folder", default="demo", show_default=True, help="Where prompts and completions go.")
@click.option("--max-tokens", type=int, default=64, show_default=True, help="Completion tokens per row at most.")
@click.pass_context
def demo(ctx: click.Context, folder: str, max_tokens: int) -> None:
    """Run the demo job: 240 prompts of the kind data teams have, through a real small Llama model.

    \b
    Example:
      tokenmill demo --output /tmp/demo
    """
    from jobs.demo import write_demo

    job_file = write_demo(folder, max_tokens=max_tokens)
    click.echo(f"$ tokenmill run {job_file}")
    ctx.invoke(
        run,
        job_file=job_file,
        as_json=False,
        deadline=None,
        max_cost=None,
        canary=None,
        reuse=(),
        **dict.fromkeys(FLAGS),
        input_uri=(),
        messages=None,
        settings=(),
    )
