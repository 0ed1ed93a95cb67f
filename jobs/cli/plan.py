"""`tokenmill plan`: what a run would do, and what it would take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING
from typing import Any

import click
from rich.table import Table

from jobs.cli.group import build_job
from jobs.cli.group import job_options
from jobs.cli.group import main
from jobs.cli.group import print_table
from jobs.cli.group import reuse_option

if TYPE_CHECKING:
    from jobs.api import PlanReport
    from jobs.backtest import Backtest
    from jobs.estimate import Offer
    from jobs.forecast import Forecast
    from jobs.lengths import Lengths


@main.command()
@job_options
@click.option("--estimate/--no-estimate", default=True, help="Read a sample and say tokens, hours and cost.  [default: estimate]")
@click.option("--canary", type=click.IntRange(min=8), metavar="ROWS", help="Really run so many rows here, to learn lengths and speed.")
@click.option("--history", multiple=True, metavar="OUTPUT", help="Completions are as long as in this earlier output; repeatable.")
@click.option("--nodes", default="1,2,4,8,16", show_default=True, help="Numbers of nodes to compare.")
@click.option("--deadline", metavar="DURATION", help="Name the cheapest way that is done by then, as in 8h.")
@click.option("--max-cost", type=float, metavar="USD", help="Name the quickest way that costs no more.")
@click.option("--backtest", "as_backtest", is_flag=True, help="Only: the throughput model against published results.")
@reuse_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(
    job_file: str | None,
    estimate: bool,
    canary: int | None,
    history: tuple[str, ...],
    nodes: str,
    deadline: str | None,
    max_cost: float | None,
    as_backtest: bool,
    as_json: bool,
    reuse: tuple[str, ...],
    **flags: Any,
) -> None:
    """Check a job and say what a run would do, how long it would take and what it would cost. Writes nothing to the output.

    Lengths come from a sample that is read and tokenised; completions' from --canary, from --history, or else from max_tokens.
    Speeds of Azure's sizes come from a roofline (--backtest shows how well it knows published results), this machine's from --canary.

    \b
    Examples:
      tokenmill plan job.yaml --canary 64
      tokenmill plan job.yaml --history out-of-last-week/ --deadline 8h
      tokenmill plan --backtest
    """
    from jobs.api import plan as plan_job
    from jobs.forecast import forecast
    from jobs.forecast import node_counts
    from schemas.duration import parse_duration
    from schemas.errors import JobError

    if as_backtest:
        from jobs.backtest import backtest

        _show_backtest(backtest(), as_json)
        return
    counts, deadline_s = node_counts(nodes), parse_duration(deadline, "--deadline") if deadline else None
    if canary and history:
        raise JobError("--canary and --history: give one of them")
    report = plan_job(build_job(job_file, flags, more={"reuse": list(reuse)} if reuse else None))
    made = forecast(report, canary_rows=canary, history=history, nodes=counts, say=_say) if estimate and report.accepted.todo else None
    values = _values(report)
    if as_json:
        more = made.to_dict(deadline_s=deadline_s, max_usd=max_cost) if made else None
        click.echo(json.dumps({**values, "estimate": more}, indent=1))
        return
    for key, value in values.items():
        if value != []:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            click.echo(f"{key.replace('_', ' '):16} {shown}")
    if made:
        if made.lengths.unasked.value:
            click.echo(f"of {made.lengths.rows:,} rows about {_count(made.lengths.unasked.value)} cannot be asked, and become error rows")
        if report.earlier:
            click.echo(_reused(made.lengths, [one.out_uri for one in report.earlier]))
        _show_forecast(made, deadline_s, max_cost)
    elif estimate:
        click.echo("nothing is left to estimate: every unit is committed")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _values(report: PlanReport) -> dict[str, Any]:
    accepted = report.accepted
    sizes = [unit.num_rows for unit in accepted.plan.units]
    return {
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
        "settings": [accepted.cut.found] if accepted.cut is not None and accepted.cut.found else [],
        "left_out": [f"{uri}: {reason}" for uri, reason in accepted.plan.skipped],
        "new_objects": list(accepted.new_objects),
        "changed_objects": list(accepted.changed_objects),
        "reuse": [f"{one.out_uri}: {one.rows:,} committed rows" for one in report.earlier],
        "output": accepted.out_uri,
        "columns": accepted.record.input_schema.names,
    }


def _reused(lengths: Lengths, outputs: Sequence[str]) -> str:
    reused = lengths.reused
    return (
        f"of {lengths.rows:,} rows about {_count(reused.value)} ({_count(reused.low)} to {_count(reused.high)}) are copied from "
        f"{', '.join(outputs)}; what follows is of the others"
    )


def _show_forecast(made: Forecast, deadline_s: float | None, max_usd: float | None) -> None:
    from jobs.estimate import cheapest
    from jobs.estimate import quickest

    tokens = made.tokens
    click.echo(
        f"{'prompt tokens':16} {_count(tokens.prompt.value)} ({_count(tokens.prompt.low)} to {_count(tokens.prompt.high)}), "
        f"from {made.lengths.sampled:,} rows read and tokenised"
    )
    click.echo(
        f"{'output tokens':16} {_count(tokens.output.value)} ({_count(tokens.output.low)} to {_count(tokens.output.high)}), "
        f"{_BASES[made.lengths.basis]}"
    )
    table = Table(title="What it takes, and where it lies four times in five")
    for title in ("node", "nodes", "weights", "replicas", "rows in batch", "output tok/s", "hours", "USD", "known from"):
        table.add_column(title, justify="left" if title in ("node", "weights", "known from") else "right")
    for offer in made.offers:
        table.add_row(_node(offer, made.offers), *_cells(offer))
    print_table(table)
    for text in made.remarks:
        click.echo(text)
    if deadline_s is not None:
        click.echo(_choice("cheapest by the deadline", cheapest(made.offers, deadline_s), made.offers))
    if max_usd is not None:
        click.echo(_choice(f"quickest for at most {max_usd:,.2f} USD", quickest(made.offers, max_usd), made.offers))
    if deadline_s is None and max_usd is None:
        click.echo(_choice("cheapest", cheapest(made.offers, None), made.offers))


_BASES = {
    "max_tokens": "guessed from max_tokens; --canary or --history would know",
    "history": "as in the earlier output",
    "canary": "as in the canary",
}


def _node(offer: Offer, among: Sequence[Offer]) -> str:
    """The VM size, or the profile where that is of no size or not the only one."""
    if offer.here:
        return "this machine"
    alike = {other.profile for other in among if other.vm_size == offer.vm_size}
    return offer.profile if offer.vm_size is None or len(alike) > 1 else offer.vm_size


def _cells(offer: Offer) -> list[str]:
    usd = "?" if offer.usd is None else f"{offer.usd.value:,.2f} ({offer.usd.low:,.2f} to {offer.usd.high:,.2f})"
    hours = offer.hours
    width = f" x {offer.devices_per_replica} devices" if offer.devices_per_replica > 1 else ""
    return [
        str(offer.nodes),
        offer.precision or "as they are",
        f"{offer.replicas}{width}",
        f"{offer.batch:,.0f}",
        f"{offer.output_tokens_per_s:,.0f}",
        f"{hours.value:,.2f} ({hours.low:,.2f} to {hours.high:,.2f})",
        usd,
        offer.basis,
    ]


def _choice(words: str, offer: Offer | None, among: Sequence[Offer]) -> str:
    if offer is None:
        return f"{words}: none of these"
    usd = "" if offer.usd is None else f", {offer.usd.value:,.2f} USD"
    return f"{words}: {offer.nodes} x {_node(offer, among)}, {offer.hours.value:,.2f} h{usd}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _show_backtest(found: Backtest, as_json: bool) -> None:
    closed, blind, opened = found.errors(), found.errors(fitted=False), found.errors(division="open")
    slower, faster = found.ratio_interval(0.8)
    values: dict[str, Any] = {
        "rows": len(closed),
        "rows_fitted": len(closed) - len(blind),
        "median_error": statistics.median(closed),
        "median_error_not_fitted": statistics.median(blind),
        "largest_error": max(closed),
        "largest_error_open_division": max(opened),
        "published_over_predicted_80": [slower, faster],
        "constants": asdict(found.constants),
    }
    if as_json:
        rows = [
            {**row.published.model_dump(), "predicted": row.speed.per_device, "ratio": row.ratio, "devices": row.speed.devices,
             "batch": row.speed.batch}
            for row in found.rows
        ]  # fmt: skip
        click.echo(json.dumps({**values, "results": rows}, indent=1))
        return
    table = Table(title="Output tokens/s and device, Offline: predicted over published")
    for title in ("device", "model", "weights", "engine", "published", "predicted", "ratio", "devices", "batch", "note"):
        table.add_column(title, justify="right" if title in ("published", "predicted", "ratio", "devices", "batch") else "left")
    for row in found.rows:
        of = row.published
        note = "; ".join(
            word for word in ("fitted" if of.fitted else "", "open division" if of.division == "open" else "", of.note) if word
        )
        table.add_row(
            of.device, of.model, of.precision, of.engine, f"{of.per_device:,.6g}", f"{row.speed.per_device:,.4g}", f"{row.ratio:.2f}",
            str(row.speed.devices), f"{row.speed.batch:,.0f}", note,
        )  # fmt: skip
    print_table(table)
    click.echo(
        f"closed division and records, {len(closed)} rows: median error {values['median_error']:.0%}, largest {max(closed):.0%}; "
        f"the {len(blind)} that no constant was fitted on: median {values['median_error_not_fitted']:.0%}"
    )
    click.echo(f"open division, {len(opened)} rows: largest error {max(opened):.0%}")
    click.echo("constants: " + ", ".join(f"{name} {value:g}" for name, value in values["constants"].items()))
