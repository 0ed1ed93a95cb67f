"""The `tokenmill` command: parse, call one function of jobs.api, print."""

from __future__ import annotations

import errno
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import click
import yaml
from rich.console import Console

from schemas.errors import EXIT_DRAINED
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.errors import TokenmillError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.storage import looks_secret


class _Group(click.Group):
    """Turns the project's errors into a message and the exit code that each kind has."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TokenmillError as error:
            click.echo(f"tokenmill: {error}", err=True)
            raise click.exceptions.Exit(error.exit_code) from error
        except OSError as error:  # a store that failed where nothing tries again
            if error.errno == errno.EPIPE:
                raise  # click's own: nobody reads what is printed
            click.echo(f"tokenmill: {type(error).__name__}: {error}; what was committed stays, run the same command again", err=True)
            raise click.exceptions.Exit(EXIT_UNITS_FAILED) from error
        except KeyboardInterrupt:
            click.echo("\nstopped", err=True)
            raise click.exceptions.Exit(EXIT_DRAINED) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tokenmill")
def main() -> None:
    """Offline batch inference with Llama models: a table of prompts in, a table of completions out.

    Exit codes: 0 complete (rows may carry errors), 1 units failed, 2 wrong job, 3 a limit was reached, 130 drained.
    """


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A job file, the short form's flags, or both (flags win)."""
    for option in reversed(
        [
            click.argument("job_file", required=False, type=click.Path(dir_okay=False)),
            click.option("--name", help="The job's name."),
            click.option("--model", help="A folder with a Llama checkpoint, its URI, or 'demo'."),
            click.option("--input", "input_uri", multiple=True, help="A Parquet file, folder or quoted glob; repeatable."),
            click.option("--prompt", help="A column's name, or a template such as 'Summarise: {body}'."),
            click.option("--messages", help="A column of chat messages, instead of --prompt."),
            click.option("--system", help="System prompt."),
            click.option("--chat/--no-chat", default=None, help="Whether to apply the model's chat template."),
            click.option("--output", "output_uri", help="The folder to write to."),
            click.option("--prefix", help="Put before the names of the added columns."),
            click.option("--max-tokens", type=int, help="Completion tokens per row at most (256)."),
            click.option("--temperature", type=float, help="0 is greedy, and the default."),
            click.option("--engine", type=click.Choice(["vllm", "simulated"]), help="What generates."),
            click.option("--profile", help="Hardware profile ('auto')."),
            click.option("--cluster", type=click.Choice(["local", "inline", "address"]), help="Who runs the engines."),
            click.option("--scheduler", help="With --cluster address: the scheduler, as in tls://10.0.0.4:8786."),
            click.option("--rendezvous", help="Instead of --scheduler: the folder or URI where it publishes its address."),
            click.option("--keys", help="With --cluster address: the folder that `tokenmill keys` made."),
            click.option("--insecure", is_flag=True, default=None, help="With --cluster address: no TLS; see README, Security."),
            click.option("--replicas", type=int, help="Engine replicas; by default what the profile finds good."),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="FIELD=VALUE",
                help="Any other field of the job file, as in sampling.top_p=0.9; repeatable.",
            ),
        ]
    ):
        command = option(command)
    return command


_FLAGS = {
    "name": "name",
    "model": "model",
    "prompt": "input.prompt",
    "system": "input.system",
    "chat": "input.chat",
    "output_uri": "output.uri",
    "prefix": "output.prefix",
    "max_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "engine": "engine.kind",
    "profile": "engine.profile",
    "cluster": "cluster.kind",
    "replicas": "cluster.replicas",
    "scheduler": "cluster.address",
    "rendezvous": "cluster.rendezvous",
    "keys": "cluster.keys",
    "insecure": "cluster.insecure",
}


def build_job(job_file: str | None, flags: dict[str, Any]) -> JobSpec:
    """The job file's fields with the flags' over them. Raises JobError."""
    from jobs.api import load_job_data

    data = load_job_data(job_file) if job_file else {}
    if not job_file and not flags["model"]:
        raise JobError("give a job file, or --model, --input, --prompt and --output; see `tokenmill run --help`")
    for flag, field in _FLAGS.items():
        if flags[flag] is not None:
            _put(data, field, flags[flag])
    if flags["input_uri"]:
        uris = list(flags["input_uri"])
        _put(data, "input.uri", uris[0] if len(uris) == 1 else uris)
    if flags["messages"] is not None:
        if flags["prompt"] is not None:
            raise JobError("--prompt and --messages: give one of them")
        _put(data, "input.prompt", {"messages": flags["messages"]})
    _put_settings(data, flags["settings"])
    try:
        return parse_job(data)
    except JobError as error:
        raise JobError(f"{job_file}:\n{error}" if job_file else str(error)) from None


def _storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """For commands that look at an output and have no job file: how Azure storage is reached."""

    @functools.wraps(command)
    def with_storage(*args: Any, recipe: tuple[str, ...], **kwargs: Any) -> Any:
        if recipe:
            from pipeline import credentials

            data: dict[str, Any] = {}
            for setting in recipe:
                field, equals, value = setting.partition("=")
                if not equals or looks_secret(setting):
                    raise JobError("--storage: expected FIELD=VALUE, as in credential.env=NAME_OF_A_VARIABLE; secrets have no place there")
                _put(data, field, value)
            credentials.use(credentials.parse(data))
        return command(*args, **kwargs)

    help_text = "A field of the job file's storage section, as in credential.kind=managed_identity; repeatable."
    return click.option("--storage", "recipe", multiple=True, metavar="FIELD=VALUE", help=help_text)(with_storage)


def _put_settings(data: dict[str, Any], settings: Iterable[str]) -> None:
    """Fields as in --set."""
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise JobError(f"--set {setting}: expected FIELD=VALUE, as in sampling.top_p=0.9")
        try:
            _put(data, field, yaml.safe_load(value))
        except yaml.YAMLError:
            raise JobError(f"--set {setting}: the value is not YAML") from None


def _put(data: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise JobError(f"{field}: {parent} is {inner!r} in the job file, expected a mapping")
        data = inner
    data[last] = value


@main.command()
@_job_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def run(job_file: str | None, as_json: bool, **flags: Any) -> None:
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
    try:
        result = run_job(build_job(job_file, flags))
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
@_job_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(job_file: str | None, as_json: bool, **flags: Any) -> None:
    """Check a job and say what a run would do. Writes nothing to the output.

    \b
    Example:
      tokenmill plan job.yaml
    """
    from jobs.api import plan as plan_job

    report = plan_job(build_job(job_file, flags))
    accepted = report.accepted
    sizes = [unit.num_rows for unit in accepted.plan.units]
    values = {
        "fingerprint": accepted.record.fingerprint,
        "model": accepted.model.path,
        "objects": len(accepted.plan.objects),
        "rows": accepted.plan.num_rows,
        "units": len(sizes),
        "rows_per_unit": [min(sizes), max(sizes)],
        "units_done": len(accepted.done),
        "units_to_do": len(accepted.todo),
        "profile": report.profile,
        "replicas": report.replicas,
        "left_out": [f"{uri}: {reason}" for uri, reason in accepted.plan.skipped],
        "new_objects": list(accepted.new_objects),
        "changed_objects": list(accepted.changed_objects),
        "output": accepted.out_uri,
        "columns": accepted.record.input_schema.names,
    }
    if as_json:
        click.echo(json.dumps(values, indent=1))
        return
    for key, value in values.items():
        if value != []:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            click.echo(f"{key.replace('_', ' '):16} {shown}")


@main.command()
@click.argument("output")
@_storage_option
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
@_storage_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def status(output: str, as_json: bool) -> None:
    """Say how the job that writes to OUTPUT stands, from storage alone.

    \b
    Example:
      tokenmill status out/
    """
    from dataclasses import asdict

    from jobs.progress import seconds_words
    from jobs.status import read_status

    found = read_status(output)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    click.echo(f"{found.name} ({found.fingerprint[:8]}): {found.state}")
    click.echo(f"{found.rows_done:,} of {found.rows:,} rows and {found.units_done} of {found.units} units are committed in {found.out_uri}")
    said = found.said
    if said and found.age_s is not None:
        eta = "" if said["eta_s"] is None else f", ETA {seconds_words(said['eta_s'])}"
        click.echo(
            f"{seconds_words(found.age_s)} ago on {said['host']}: {said['output_tokens_per_s']} output tok/s, "
            f"{said['error_rows']} error rows, {len(said['replicas'])} replicas{eta}"
        )
        for unit, reason in said["failed_units"].items():
            click.echo(f"unit {unit} failed: {reason}")


@main.command()
@click.argument("output")
@_storage_option
def cancel(output: str) -> None:
    """Ask the job that writes to OUTPUT to drain: units in flight are finished and committed.

    \b
    Example:
      tokenmill cancel out/
    """
    from jobs.status import cancel as cancel_job

    state = cancel_job(output)
    if state in ("starting", "running", "draining"):
        click.echo("asked to drain; `tokenmill status` shows when it has")
    else:
        click.echo(f"nothing to cancel: the job is {state}")


@main.command()
@click.argument("job_file", required=False, type=click.Path(dir_okay=False))
@click.option("--model", help="A folder with a Llama checkpoint, its URI, or 'demo'.")
@click.option("--engine", type=click.Choice(["vllm", "simulated"]), help="What generates.")
@click.option("--profile", help="Hardware profile ('auto').")
@click.option("--scheduler", help="The scheduler to join, as in tls://10.0.0.4:8786.")
@click.option("--rendezvous", metavar="URI", help="Instead of --scheduler: the folder or URI where it publishes its address.")
@click.option("--keys", help="The folder that `tokenmill keys` made.")
@click.option("--insecure", is_flag=True, default=None, help="Allow tcp://: whoever reaches this node's ports may run code on it.")
@click.option("--replicas", type=click.IntRange(min=1), help="Engine replicas; by default what the profile finds good.")
@click.option("--name", help="This node's name; by default the machine's.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Another field, as in engine.options.dtype=float16.")
def worker(job_file: str | None, replicas: int | None, name: str | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Run this node's engine replicas for a cluster: they join its scheduler when they are ready, and the next one when that is lost.

    What to run comes from a job file, from flags, or both (flags win). SIGTERM and Ctrl-C hand back what is in flight.

    \b
    Examples:
      tokenmill worker job.yaml
      tokenmill worker --model demo --scheduler tls://10.0.0.4:8786 --keys ~/cluster-keys
      tokenmill worker --model demo --rendezvous az://runs/cluster-a --keys ~/cluster-keys
    """
    from jobs.api import load_job_data
    from jobs.worker_node import parse_node
    from jobs.worker_node import serve

    data = load_job_data(job_file) if job_file else {}
    if flags["scheduler"] or flags["rendezvous"]:  # the file's cluster, if it has one, is another
        data["cluster"] = {"kind": "address"}
    for flag, value in flags.items():
        if value is not None:
            _put(data, _FLAGS[flag], value)
    _put_settings(data, settings)
    raise click.exceptions.Exit(serve(parse_node(data, name=name, replicas=replicas), click.echo))


@main.command()
@click.argument("folder")
@click.option("--days", type=click.IntRange(min=1), default=30, show_default=True, help="How long they are good for.")
def keys(folder: str, days: int) -> None:
    """Make the keys of a cluster in FOLDER: a private CA's certificate, and one certificate and key for all its nodes.

    Copy the folder to every node. Whoever has node.key may run code on all of them; never put it beside results.

    \b
    Example:
      tokenmill keys ~/cluster-keys --days 90
    """
    from pipeline.tls import make_keys

    made = make_keys(folder, valid_days=days)
    click.echo(f"keys in {made.folder}, good until {made.expires_at:%Y-%m-%d %H:%M} UTC; whoever has node.key may run code on every node")


@main.command()
@_storage_option
@click.option("--listen", default="tls://0.0.0.0:8786", show_default=True, help="Where workers and drivers connect.")
@click.option("--keys", help="The folder that `tokenmill keys` made.")
@click.option("--insecure", is_flag=True, help="Allow tcp://: whoever reaches it may run code on every node.")
@click.option("--rendezvous", metavar="URI", help="A folder or URI in which to publish the address.")
@click.option("--dashboard", default="127.0.0.1:8787", show_default=True, help="Loopback address of Dask's pages, or none.")
def scheduler(listen: str, keys: str | None, insecure: bool, rendezvous: str | None, dashboard: str) -> None:
    """Run a scheduler that `tokenmill worker` joins and jobs with cluster.kind: address use. Ends on SIGTERM.

    \b
    Examples:
      tokenmill scheduler --keys ~/cluster-keys
      tokenmill scheduler --keys ~/cluster-keys --rendezvous az://runs/cluster-a
    """
    from jobs.scheduler import SchedulerSpec
    from jobs.scheduler import serve

    shown = None if dashboard == "none" else dashboard
    spec = SchedulerSpec(listen=listen, keys=keys, insecure=insecure, rendezvous=rendezvous, dashboard=shown)
    raise click.exceptions.Exit(serve(spec, click.echo))


@main.command()
def schema() -> None:
    """Print the job file's JSON Schema, for editors.

    \b
    Example:
      tokenmill schema > job.schema.json
    """
    from schemas.job import json_schema

    click.echo(json_schema())


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
    ctx.invoke(run, job_file=job_file, as_json=False, **dict.fromkeys(_FLAGS), input_uri=(), messages=None, settings=())


if __name__ == "__main__":
    main()
