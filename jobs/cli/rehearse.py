"""The command `rehearse`: what the orchestration of a whole rack costs, without a GPU."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from jobs.cli.group import main
from jobs.cli.group import storage_option

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from schemas.rehearsal import Rehearsal

_MIN_WIDTH = 140
"""Characters a line: cropped numbers are worse than wrapped lines."""


@main.command()
@storage_option
@click.option("--nodes", type=click.IntRange(1, 200), default=18, show_default=True, help="A rack has 18.")
@click.option("--engines", "engines_per_node", type=click.IntRange(1, 16), default=4, show_default=True, help="Of one node.")
@click.option("--rows", type=click.IntRange(min=1), help="Of the table; by default enough to fill every engine three times.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of a row's output.")
@click.option("--slow-down", type=click.FloatRange(min=1), help="Engines so many times slower; by default what this machine's cores carry.")
@click.option("--profile", default="nd128isr-gb300-v6", show_default=True, help="Whose batch and cores a node has.")
@click.option("--model", default="demo", show_default=True, help="Whose tokenizer and chat template; its weights are not loaded.")
@click.option("--store", metavar="URI", help="Where prompts and completions lie; by default in a folder that is thrown away.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on standard output.")
def rehearse(
    nodes: int,
    engines_per_node: int,
    rows: int | None,
    max_tokens: int,
    slow_down: float | None,
    profile: str,
    model: str,
    store: str | None,
    as_json: bool,
) -> None:
    """Rehearse the record of 1.1 million tokens/s: a rack of simulated engines at GB300's published rate, everything else real.

    Driver, scheduler, workers, tokenizer, Parquet and storage are the ones that `tokenmill run` uses; a node's replicas share a process.
    Engines run slower by --slow-down; what is no engine's is charged in real seconds against unscaled engine seconds, and a tail, in which
    engines decode or wait for others that do, in engine seconds.

    \b
    Examples:
      tokenmill rehearse
      tokenmill rehearse --nodes 1 --slow-down 1 --rows 60000
      tokenmill rehearse --store az://rehearsals --rows 2000000 --json
    """
    from jobs.rack import rows_for
    from jobs.rack import slow_down_for
    from jobs.rehearse import rehearse as rehearse_rack
    from schemas.rehearsal import RehearsalSpec

    spec = RehearsalSpec(
        nodes=nodes,
        engines_per_node=engines_per_node,
        rows=rows or rows_for(nodes * engines_per_node),
        max_tokens=max_tokens,
        slow_down=slow_down or slow_down_for(nodes, len(os.sched_getaffinity(0))),
        profile=profile,
        model=model,
        store=store,
    )
    found = rehearse_rack(spec, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)


def _print(found: Rehearsal) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _MIN_WIDTH)
    spec = found.spec
    console.print(
        f"{spec.rows:,} rows of {found.prompt_tokens_per_row:.0f} prompt and {found.tokens_per_row:.0f} output tokens in {found.units:,} "
        f"units of {found.rows_per_unit:,.0f} rows ({found.engine_s_per_unit:.1f} s of one engine at the record's rate)"
    )
    console.print(
        f"{spec.nodes} nodes of {spec.engines_per_node} engines, {spec.slow_down:g} times slower than real: up after {found.up_s:.0f} s, "
        f"driven for {found.drive_s:.0f} s, closed in {found.finish_s:.1f} s"
    )
    _print_engines(console, found)
    _print_costs(console, found)
    console.print(
        f"a table for an hour of the rack has units of {found.rows_per_unit_of_an_hour:,.0f} rows in the mean, by which the following goes"
    )
    table = _table("Where it would end, nearest first", "", "tokens/s", "times the record", "by")
    for one in found.bottlenecks:
        table.add_row(one.name, f"{one.tokens_per_s:,.0f}", f"{one.times_record:,.1f}", one.limit)
    console.print(table)
    for note in found.notes:
        console.print(note, markup=False)


def _print_engines(console: Console, found: Rehearsal) -> None:
    from jobs.spread import STATISTICS

    steady, tail = found.steady, found.tail
    if steady is not None:
        console.print(
            f"steady state, {steady.wall_s:.0f} s: idle {steady.idle_share:.2%} (starved {steady.starved_s:.1f} s and commit-blocked "
            f"{steady.blocked_s:.1f} s, real, of all engines; busy {steady.busy_s:.0f} s, unscaled); "
            f"{steady.tokens_per_s:,.0f} tokens/s; engines kept {steady.rate_kept:.1%} of their rate"
        )
    console.print(
        f"tail: {tail.node_s:.1f} engine seconds on the node that waits longest, {tail.node_share:.1%} of this job of {tail.job_s:.0f} "
        f"engine seconds, {tail.node_share_of_an_hour:.2%} of one of an hour; mean {tail.mean_s:.1f} s, longest engine {tail.max_s:.1f} s"
    )
    console.print(
        f"a unit keeps its engine for {found.engine_s_per_unit:.1f} s; its other work took {found.work_s_per_unit:.1f} s of a thread "
        "here, where all nodes share the cores"
    )
    table = _table("Nodes", "", *STATISTICS)
    columns = {
        "speed, tokens/s": [node.speed_tokens_per_s for node in found.nodes],
        "tokens/s, steady, unscaled": [node.tokens_per_s for node in found.nodes],
        "rows": [float(node.rows) for node in found.nodes],
        "rows by speed": [node.rows / node.speed_tokens_per_s for node in found.nodes],
        "tail, engine s": [node.tail_s for node in found.nodes],
    }
    for name, values in columns.items():
        table.add_row(name, *(f"{reduce(values):,.{3 if max(values) < 100 else 0}f}" for reduce in STATISTICS.values()))
    console.print(table)


def _print_costs(console: Console, found: Rehearsal) -> None:
    table = _table("CPU seconds, measured", "", "seconds", "of")
    for name, cost in (("driver", found.driver), ("scheduler", found.scheduler)):
        table.add_row(name, f"{1000 * cost.s_per_unit:.2f}", "1,000 units")
        table.add_row("", f"{1000 * cost.s_per_replica_s:.2f}", "1,000 replicas, each second")
    table.add_row("planning", f"{1000 * found.plan_cpu_s / found.units:.2f}", "1,000 units")
    table.add_row("closing", f"{1000 * found.finish_cpu_s / found.units:.2f}", "1,000 units")
    for kind, seconds in found.worker.by_kind.items():
        table.add_row(f"worker: {kind}", f"{1000 * seconds:.4f}", "1,000 rows")
    table.add_row(
        "worker", f"{1000 * found.worker.s_per_row:.3f}", f"1,000 rows: {found.node_cpu_share:.2%} of a node's {found.node_cores:.0f} cores"
    )
    table.add_row("(simulated engine)", f"{1000 * found.worker.simulated:.3f}", "1,000 rows, in none of the above")
    console.print(table)
    storage = found.storage
    requests = "not counted" if storage.requests_per_unit is None else f"{storage.requests_per_unit:.1f} a unit"
    driver = "" if storage.driver_requests_per_s is None else f" and {storage.driver_requests_per_s:.2f} a second of the driver"
    sizes = f"{storage.bytes_in_per_row:,.0f} bytes read and {storage.bytes_out_per_row:,.0f} written a row"
    console.print(f"storage: requests {requests}{driver}; {sizes}")
    console.print(
        f"peak memory: driver {found.driver.peak_mb:.0f} MB (the table's making in it), scheduler {found.scheduler.peak_mb:.0f} MB, "
        f"a node {found.worker.peak_mb:.0f} MB"
    )


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column not in ("of", "by") else "left")
    return table
