"""The root of the `tokenmill` command and what its commands share: a job out of a file and flags, errors, storage."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from schemas.errors import EXIT_DRAINED
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.errors import TokenmillError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.storage import looks_secret

_WIDE = 150
"""Columns of a table in a file."""


class CommandGroup(click.Group):
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


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tokenmill")
def main() -> None:
    """Offline batch inference with Llama models: a table of prompts in, a table of completions out.

    Exit codes: 0 complete (rows may carry errors), 1 units failed, 2 wrong job, 3 a limit was reached, 130 drained.
    """


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
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
            click.option(
                "--insecure", is_flag=True, default=None, help="With --cluster address: no TLS; see jobs/cluster/README.md, Security."
            ),
            click.option(
                "--metrics-port",
                type=int,
                help="Serve Prometheus metrics there, on the loopback interface; see jobs/README.md, Metrics while it runs.",
            ),
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


FLAGS = {
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
    "metrics_port": "cluster.metrics_port",
    "replicas": "cluster.replicas",
    "scheduler": "cluster.address",
    "rendezvous": "cluster.rendezvous",
    "keys": "cluster.keys",
    "insecure": "cluster.insecure",
}


def build_job(job_file: str | None, flags: dict[str, Any], more: dict[str, Any] | None = None) -> JobSpec:
    """The job file's fields with the flags' over them, and with `more` fields by their paths. Raises JobError."""
    from jobs.api import load_job_data

    data = load_job_data(job_file) if job_file else {}
    if not job_file and not flags["model"]:
        raise JobError("give a job file, or --model, --input, --prompt and --output; see `tokenmill run --help`")
    for flag, field in FLAGS.items():
        if flags[flag] is not None:
            put(data, field, flags[flag])
    if flags["input_uri"]:
        uris = list(flags["input_uri"])
        put(data, "input.uri", uris[0] if len(uris) == 1 else uris)
    if flags["messages"] is not None:
        if flags["prompt"] is not None:
            raise JobError("--prompt and --messages: give one of them")
        put(data, "input.prompt", {"messages": flags["messages"]})
    put_settings(data, flags["settings"])
    for field, value in (more or {}).items():
        put(data, field, value)
    try:
        return parse_job(data)
    except JobError as error:
        raise JobError(f"{job_file}:\n{error}" if job_file else str(error)) from None


def print_table(table: Table) -> None:
    """On standard output, wide where no terminal says how wide it is."""
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def storage_option(command: Callable[..., Any]) -> Callable[..., Any]:
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
                put(data, field, value)
            credentials.use(credentials.parse(data))
        return command(*args, **kwargs)

    help_text = "A field of the job file's storage section, as in credential.kind=managed_identity; repeatable."
    return click.option("--storage", "recipe", multiple=True, metavar="FIELD=VALUE", help=help_text)(with_storage)


def reuse_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """For commands that look at what a job could take over."""
    help_text = "An earlier output: rows whose request it has answered are taken over, not generated; repeatable."
    return click.option("--reuse", multiple=True, metavar="OUTPUT", help=help_text)(command)


def put_settings(data: dict[str, Any], settings: Iterable[str]) -> None:
    """Fields as in --set."""
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise JobError(f"--set {setting}: expected FIELD=VALUE, as in sampling.top_p=0.9")
        try:
            put(data, field, yaml.safe_load(value))
        except yaml.YAMLError:
            raise JobError(f"--set {setting}: the value is not YAML") from None


def put(data: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise JobError(f"{field}: {parent} is {inner!r} in the job file, expected a mapping")
        data = inner
    data[last] = value
