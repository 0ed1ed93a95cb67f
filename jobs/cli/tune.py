"""The command that tunes: tokenmill tune."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from jobs.cli.group import build_job
from jobs.cli.group import job_options
from jobs.cli.group import main
from schemas.duration import parse_duration
from schemas.errors import JobError


class _Show:
    """Lines with the time that passed; on a terminal, what goes on now below them."""

    def __init__(self, budget: str) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._budget, self._began = budget, time.monotonic()

    def say(self, text: str) -> None:
        self._console.print(f"{self._time()} {text}", markup=False)

    def doing(self, text: str, *, first: bool) -> None:
        if self._status is not None:
            self._status.start()
            self._status.update(f"{self._time()} {text}".replace("[", "\\["))
        elif first:
            self.say(text)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()

    def _time(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes}m{seconds:02d}s of {self._budget}:"


@main.command()
@job_options
@click.option("--budget", default="10m", show_default=True, help="Time for the search, engine starts included: 90s, 10m or 1h.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows of each trial; by default as many as the budget allows.")
@click.option("--prepared", multiple=True, help="A checkpoint that `tokenmill model prepare` made; those in the cache are tried anyway.")
@click.option("--kv-cache-dtype", "kv_cache_dtypes", multiple=True, help="Also try a less precise KV cache, such as fp8; repeatable.")
@click.option("--fresh", is_flag=True, help="Measure again what an earlier search of the same measured.")
@click.option("--show", "shown", is_flag=True, help="Say what was tuned for this model and node, and do nothing else.")
@click.option("--yaml", "as_yaml", is_flag=True, help="With --show: as a profile, for engine.profile on other nodes.")
@click.option("--forget", is_flag=True, help="Forget what was tuned for this model and node, and do nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def tune(
    job_file: str | None,
    budget: str,
    rows: int | None,
    prepared: tuple[str, ...],
    kv_cache_dtypes: tuple[str, ...],
    fresh: bool,
    shown: bool,
    as_yaml: bool,
    forget: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Find the quickest engine settings for this model, this node and this table, by short trials.

    The result is saved in the user's cache; `tokenmill run` takes it for the same model on the same kind of node, unless the job
    names a profile. Stopped or killed, the same command goes on. Nothing is written to the job's output, which need not be given.

    \b
    Examples:
      tokenmill tune job.yaml --budget 10m
      tokenmill tune --model demo --input 'data/*.parquet' --prompt question --max-tokens 128 --prepared demo-int8/
      tokenmill tune --model demo --show
      tokenmill tune --model demo --show --yaml > /mnt/share/mine.yaml
    """
    if as_yaml and (as_json or not shown):
        raise JobError("--yaml: give it with --show, and without --json")
    if shown or forget:
        _look(job_file, flags, forget=forget, as_json=as_json, as_yaml=as_yaml)
        return
    from jobs.tune import tune as tune_job
    from jobs.tune import words

    budget_s = parse_duration(budget, "--budget")
    if not job_file:
        flags["output_uri"] = flags["output_uri"] or "out/"
    job = build_job(job_file, flags)
    show = _Show(budget)
    try:
        tuning = tune_job(
            job, budget_s=budget_s, rows=rows, prepared=prepared, kv_cache_dtypes=kv_cache_dtypes, fresh=fresh, show=show
        )  # fmt: skip
    finally:
        show.close()
    if as_json:
        click.echo(json.dumps(tuning.to_dict(), indent=1))
        return
    for line in words(tuning):
        click.echo(line)


def _look(job_file: str | None, flags: dict[str, Any], *, forget: bool, as_json: bool, as_yaml: bool) -> None:
    from jobs.api import load_job_data
    from pipeline.hardware import profile_yaml
    from pipeline.model import resolve_model
    from pipeline.profile import node_kind
    from pipeline.profile import this_machine
    from pipeline.tuned import forget_tuned
    from pipeline.tuned import load_tuned
    from pipeline.tuned import tuned_path

    name = flags["model"] or (load_job_data(job_file).get("model") if job_file else None)
    if not isinstance(name, str):
        raise JobError("give a job file, or --model; see `tokenmill tune --help`")
    weights, node = resolve_model(name).weights_digest, node_kind(this_machine())
    path = tuned_path(weights, node)
    if forget:
        click.echo(f"forgotten: {path}" if forget_tuned(weights, node) else f"nothing was tuned for {name} on {node}")
        return
    tuned = load_tuned(path)
    if as_yaml:
        if tuned is None:
            raise JobError(f"nothing was tuned for {name} on {node}; run tokenmill tune")
        click.echo(profile_yaml(tuned.profile), nl=False)
    elif tuned is None:
        click.echo(f"nothing was tuned for {name} on {node}; run tokenmill tune")
    elif as_json:
        click.echo(json.dumps(tuned.model_dump(mode="json"), indent=1))
    else:
        times = f", {tuned.times_defaults:.1f} times its own defaults" if tuned.times_defaults else ""
        click.echo(f"{path}\n{tuned.made_at}, {tuned.engine}: {tuned.output_tokens_per_s:,.0f} output tok/s on {tuned.rows} rows{times}")
        for field, value in tuned.profile.model_dump(
            mode="json", exclude_defaults=True, exclude={"name", "description", "environment", "accelerator"}
        ).items():
            click.echo(f"  {field}: {value}")
        if tuned.quicker_model:
            click.echo(f"quicker still: --model {tuned.quicker_model}")
