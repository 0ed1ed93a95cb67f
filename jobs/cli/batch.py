"""Commands on Azure Batch: submit, logs, driver, schedule."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from jobs.cli.group import FLAGS
from jobs.cli.group import build_job
from jobs.cli.group import job_options
from jobs.cli.group import main
from jobs.cli.group import reuse_option
from jobs.cli.group import storage_option
from schemas.job import JobSpec

SETTINGS = click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Another field, as in cluster.nodes=8; repeatable.")


def read_job(job_file: str, settings: tuple[str, ...]) -> JobSpec:
    """The file's fields with the settings over them. Raises JobError."""
    return build_job(job_file, {**dict.fromkeys(FLAGS), "input_uri": (), "messages": None, "settings": settings})


@main.command()
@job_options
@click.option("--wait", is_flag=True, help="Follow the job to its end; exit with its code.")
@click.option("--dry-run", is_flag=True, help="Print what would be stored and sent, as JSON; send nothing.")
@reuse_option
def submit(job_file: str | None, wait: bool, dry_run: bool, reuse: tuple[str, ...], **flags: Any) -> None:
    """Put a job with cluster.kind azure-batch onto Azure Batch, and return. Submit it again to go on after a stop.

    \b
    Examples:
      tokenmill submit job.yaml
      tokenmill submit job.yaml --wait
      tokenmill submit job.yaml --dry-run --set cluster.nodes=8
    """
    from jobs.cluster.batch_account import BatchAccount
    from jobs.submission import check_kind
    from jobs.submission import follow
    from jobs.submission import requests_of
    from jobs.submission import submit as submit_job

    job = build_job(job_file, flags, more={"reuse": list(reuse)} if reuse else None)
    check_kind(job)
    if dry_run:
        click.echo(json.dumps(requests_of(job, time.time()), indent=1))
        return
    account = BatchAccount(str(job.cluster.endpoint))
    submitted = submit_job(job, account)
    for note in submitted.notes:
        click.echo(note)
    click.echo(f"job {submitted.job_id} is submitted; it writes to {submitted.out_uri}")
    click.echo(f"tokenmill status {submitted.out_uri}    # how it stands; also: logs, cancel, report, verify")
    if wait:
        raise click.exceptions.Exit(follow(submitted, account, click.echo))


@main.command()
@click.argument("output")
@storage_option
@click.option("--task", default="driver", show_default=True, help="driver, or a node's as in node-0003.")
@click.option("--job", "job_id", help="The Batch job; by default the latest one that wrote to OUTPUT.")
def logs(output: str, task: str, job_id: str | None) -> None:
    """Print what a task of the job that writes to OUTPUT said: from its node while it runs, from storage afterwards.

    \b
    Examples:
      tokenmill logs az://results/night
      tokenmill logs az://results/night --task node-0003
    """
    from jobs.submission import logs as read_logs

    for stream, text in read_logs(output, task, job_id):
        click.echo(f"== {stream} of {task}")
        click.echo(text)


@main.command()
@click.argument("job_file", type=click.Path(dir_okay=False))
@SETTINGS
@click.option("--schedule", "name", help="The schedule of which this is a run: its own folder, and only what is new.")
@click.option("--listen", default="tls://0.0.0.0:0", show_default=True, help="Where the scheduler inside listens; port 0 is any free one.")
def driver(job_file: str, settings: tuple[str, ...], name: str | None, listen: str) -> None:
    """Run a job with the scheduler in this process, for nodes elsewhere: what Azure Batch runs after `tokenmill submit`.

    With cluster.kind azure-batch it asks Batch for the nodes, and ends them with the job; it works on any machine that they
    reach. With kind address and a rendezvous, nodes are started by hand: `tokenmill worker`.

    \b
    Example:
      tokenmill driver job.yaml
    """
    import os

    from jobs.driver_node import DriverSpec
    from jobs.driver_node import batch_task
    from jobs.driver_node import serve

    spec = DriverSpec(job=read_job(job_file, settings), task=batch_task(os.environ), listen=listen, schedule=name)
    raise click.exceptions.Exit(serve(spec, click.echo))


@main.group()
def schedule() -> None:
    """Run a job at a fixed interval on Azure Batch, each time with what is new since.

    Batch's own limits: an interval of at least a minute, in UTC, no calendar (no weekdays, no summer time); one run at a time:
    where one takes longer than the interval the next waits for schedule.window, or is left out.

    \b
    Example:
      tokenmill schedule create nightly.yaml
    """


@schedule.command("create")
@click.argument("job_file", type=click.Path(dir_okay=False))
@SETTINGS
@click.option("--dry-run", is_flag=True, help="Print what would be stored and sent, as JSON; send nothing.")
def create(job_file: str, settings: tuple[str, ...], dry_run: bool) -> None:
    """Create the schedule that the job file's `schedule` section asks for, named as the job.

    \b
    Example:
      tokenmill schedule create job.yaml --set schedule.every=1d
    """
    from jobs.schedule import create as create_schedule
    from jobs.schedule import requests_of

    job = read_job(job_file, settings)
    if dry_run:
        click.echo(json.dumps(requests_of(job, time.time()), indent=1))
        return
    for line in create_schedule(job):
        click.echo(line)


@schedule.command("list")
@click.argument("job_file", type=click.Path(dir_okay=False))
def list_all(job_file: str) -> None:
    """List the schedules in the account that a job file names.

    \b
    Example:
      tokenmill schedule list job.yaml
    """
    from jobs.schedule import list_all as list_schedules

    for found in list_schedules(read_job(job_file, ())):
        click.echo(f"{found.id:40} {found.state:10} every {found.every}, next {found.next_run or '-'}")


@schedule.command("show")
@click.argument("job_file", type=click.Path(dir_okay=False))
def show(job_file: str) -> None:
    """Say how the job's schedule stands, and each of its runs.

    \b
    Example:
      tokenmill schedule show job.yaml
    """
    from jobs.schedule import show as show_schedule

    for line in show_schedule(read_job(job_file, ())):
        click.echo(line)


def _on_schedule(name: str, text: str) -> None:
    def act(job_file: str) -> None:
        from importlib import import_module

        click.echo(getattr(import_module("jobs.schedule"), name)(read_job(job_file, ())))

    act.__doc__ = f"{text}\n\n    \b\n    Example:\n      tokenmill schedule {name} job.yaml\n    "
    schedule.command(name)(click.argument("job_file", type=click.Path(dir_okay=False))(act))


_on_schedule("pause", "Start no further run of the job's schedule; one that is under way goes on.")
_on_schedule("resume", "Start runs again.")
_on_schedule("delete", "Delete the job's schedule, and end a run that is under way; what was committed stays.")
