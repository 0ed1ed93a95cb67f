"""Commands on models: prepare, and baseline for nodes that do not hold the unquantised one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from jobs.cli.group import main
from jobs.cli.group import storage_option


@main.group()
def model() -> None:
    """Checkpoints: make one faster.

    \b
    Example:
      tokenmill model prepare demo --table t.parquet --prompt question --reference answer
    """


def rows_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which rows a model is judged by."""
    for option in (
        click.option(
            "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each completion that is compared."
        ),
        click.option("--rows", type=click.IntRange(min=1), help="Rows that judge (128, or what the table has)."),
        click.option("--reference", required=True, metavar="COLUMN", help="The column with a good answer."),
        click.option("--prompt", required=True, help="A column's name, or a template such as 'Summarise: {body}'."),
        click.option("--table", multiple=True, required=True, help="Parquet with prompts and good answers; repeatable."),
    ):
        command = option(command)
    return command


@model.command()
@click.argument("name", metavar="MODEL")
@click.option(
    "--precision", default="auto", show_default=True, help="int8 (CPUs, A100), fp8 (H100, H200, MI300X), nvfp4 (GB200, GB300), or auto."
)
@rows_options
@click.option("--output", help="A folder or URI to put the checkpoint's folder in; by default the model cache.")
@click.option(
    "--allow-perplexity", type=click.FloatRange(min=1), metavar="RATIO", help="Lower the bar: perplexity may rise this much (1.02)."
)
@click.option("--allow-rouge", type=click.FloatRange(0, 1), metavar="RATIO", help="Lower the bar: ROUGE may fall to this much (0.99).")
@click.option(
    "--baseline", metavar="FILE", help="What `tokenmill model baseline` wrote, where this node does not hold the unquantised MODEL."
)
@click.option("--dtype", help="That the engine computes in while it judges, as in float16; by default the profile's.")
@click.option("--no-gate", is_flag=True, help="Do not judge at all; the checkpoint says so.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def prepare(
    name: str,
    table: tuple[str, ...],
    allow_perplexity: float | None,
    allow_rouge: float | None,
    no_gate: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Store MODEL in the precision that this machine computes fastest in, once, if it stays as good on a table of yours.

    Exit code 1 and nothing stored where it does not. Run again, it finds what it stored.

    \b
    Example:
      tokenmill model prepare demo --table gsm8k.parquet --prompt question --reference answer
    """
    from jobs.prepare import Order
    from jobs.prepare import prepare as prepare_model
    from schemas.errors import JobError
    from schemas.prepared import Bar

    if values["baseline"] and no_gate:
        raise JobError("--baseline and --no-gate: give one of them")
    given = {"max_perplexity_ratio": allow_perplexity, "min_rouge_ratio": allow_rouge}
    bar = Bar(**{key: value for key, value in given.items() if value is not None})
    order = Order(model=name, table=_one_or_all(table), bar=bar, gate=not no_gate, **values)
    result = prepare_model(order, _say)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=1))
    else:
        for line in describe(result.to_dict()):
            click.echo(line)
    raise click.exceptions.Exit(result.exit_code)


@model.command()
@click.argument("name", metavar="MODEL")
@rows_options
@click.option("--to", required=True, metavar="FILE", help="A path or URI to write.")
@storage_option
def baseline(name: str, table: tuple[str, ...], to: str, **values: Any) -> None:
    """Write down what the unquantised MODEL makes of the rows that judge, for `tokenmill model prepare --baseline` on smaller nodes.

    \b
    Example:
      tokenmill model baseline az://models/large --table t.parquet --prompt question --reference answer --to large.json
    """
    from jobs.prepare import Order
    from jobs.prepare import make_baseline

    made = make_baseline(Order(model=name, table=_one_or_all(table), **values), to, _say)
    click.echo(f"{len(made.logprobs)} rows, by {made.engine} in {made.dtype}: {to}")


def _one_or_all(table: tuple[str, ...]) -> str | list[str]:
    return table[0] if len(table) == 1 else list(table)


def _say(line: str) -> None:
    click.echo(line, err=True)


def describe(result: dict[str, Any]) -> list[str]:
    """The result for a reader."""
    prepared, gate = result["prepared"], result["prepared"]["gate"]
    lines = []
    if gate is None:
        lines.append("not judged: --no-gate")
    else:
        lines.append(
            f"perplexity of {gate['rows']} references: {gate['perplexity_before']:.3f} before, {gate['perplexity_after']:.3f} in "
            f"{prepared['precision']}: {gate['perplexity_ratio']:.4f} times (allowed {gate['bar']['max_perplexity_ratio']:g})"
        )
        lines += [
            f"{kind:8} {change['before']:.2f} before, {change['after']:.2f} after: {change['ratio']:.4f} times, "
            f"error {change['error']:.4f} (asked {gate['bar']['min_rouge_ratio']:g})"
            for kind, change in gate["rouge"].items()
        ]
        lines += [f"before: as the baseline says, by {gate['baseline']}"] if gate["baseline"] else []
    if result["uri"] is None:
        return [*lines, "refused, nothing was stored:", *(f"  {reason}" for reason in gate["refusals"])]
    sizes = f"{result['bytes_before'] / 1e6:.0f} MB of weights before, {result['bytes_after'] / 1e6:.0f} after"
    return [*lines, f"{'there already' if result['existed'] else 'stored'} ({sizes}): {result['uri']}"]
