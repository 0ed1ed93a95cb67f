"""The command `report`: a job as a page, and where its engine seconds went as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from jobs.cli.group import main
from jobs.cli.group import storage_option

if TYPE_CHECKING:
    from jobs.report import Report

_MIN_WIDTH = 110
"""Characters a line: cropped numbers are worse than wrapped lines."""


@main.command()
@click.argument("output")
@storage_option
@click.option("--raw", metavar="FILE.json", help="What `tokenmill bench engine --json` said of the same model and settings.")
@click.option("--html", metavar="PATH", help="Where the page goes, instead of _tokenmill/report.html in OUTPUT.")
@click.option("--markdown", metavar="PATH", help="Write the same as Markdown there, too.")
@click.option("--usd-per-hour", type=click.FloatRange(min=0, min_open=True), metavar="USD", help="What a node costs, for the page's cost.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON; write only what --html and --markdown name.")
def report(output: str, raw: str | None, html: str | None, markdown: str | None, usd_per_hour: float | None, as_json: bool) -> None:
    """Report on the job that writes to OUTPUT, done or not, over all its runs, from storage alone.

    Writes one page, OUTPUT/_tokenmill/report.html, that loads nothing from elsewhere, and prints where every engine second went:

    \b
    start           from a replica's spawn until its engine is up
    busy            prefill and decode, the batch at least half full
    starved         the batch under half full, or empty, and more rows came later
    commit-blocked  the same, while units wrote or committed and none read
    tail            the batch under half full, or empty, and no more rows came
    lost            generating what was thrown away or made again, and what dead processes took with them

    The share of the raw engine is output tokens/s from each run's command to its end (start and last commit included), divided by
    what all replicas together generate in a second while their batches are at least half full: the share of the run in which it
    might as well have been generating at that rate. With --raw, divided by the rate in that file.

    \b
    Examples:
      tokenmill report out/
      tokenmill report out/ --html report.html --markdown report.md
      tokenmill report out/ --raw engine.json --json
      tokenmill report out/ --usd-per-hour 12.5
    """
    from jobs.report import report as report_on

    found = report_on(output, raw=raw)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)
    if not as_json or html or markdown:
        from jobs.reporting.write import write_report

        page = not as_json or html is not None
        for uri in write_report(output, account=found, html=html, markdown=markdown, page=page, usd_per_hour=usd_per_hour):
            click.echo(f"report: {uri}", err=as_json)


def _print(found: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jobs.progress import seconds_words
    from jobs.report import share_of_raw
    from jobs.spread import STATISTICS
    from schemas.ledger import KINDS

    console = Console(highlight=False)
    console.width = max(console.width, _MIN_WIDTH)
    console.print(Text(f"{found.name} ({found.fingerprint[:8]}): {len(found.runs)} runs, {seconds_words(found.elapsed_s)} in all"))
    values = found.to_dict()
    table = Table("replica", title="Engine seconds", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("seconds", *(kind.replace("_", "-") for kind in KINDS), "tokens", "tokens/s"):
        table.add_column(column, justify="right")
    for replica in values["replicas"]:
        seconds = [replica["lifetime_s"], *(replica["seconds"][kind] for kind in KINDS)]
        tokens = [f"{replica['output_tokens']:,}", f"{replica['output_tokens_per_s']:,.1f}"]
        table.add_row(Text(replica["name"]), *(f"{value:,.1f}" for value in seconds), *tokens)
    table.add_section()
    columns = values["statistics"]
    for name in STATISTICS if columns else ():
        seconds = [columns[key][name] for key in ("lifetime_s", *KINDS)]
        tokens = [f"{columns['output_tokens'][name]:,.0f}", f"{columns['output_tokens_per_s'][name]:,.1f}"]
        table.add_row(name, *(f"{value:,.1f}" for value in seconds), *tokens)
    console.print(table)
    runs = Table("run", "state", title="Runs", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("seconds", "units", "rows", "retries", "tokens", "tokens/s", "of raw"):
        runs.add_column(column, justify="right")
    for run, described in zip(found.runs, values["runs"], strict=True):
        numbers = [f"{run.elapsed_s:,.1f}", f"{run.units:,}", f"{run.rows:,}", f"{run.retries:,}", f"{run.output_tokens:,}"]
        rate = f"{described['output_tokens_per_s']:,.1f}"
        runs.add_row(Text(run.run), Text(run.state + ("" if run.whole else " (last word)")), *numbers, rate, _percent(share_of_raw(run)))
    console.print(runs)
    console.print(
        f"{found.output_tokens_per_s:,.1f} output tokens/s, {found.total_tokens_per_s:,.1f} with prompts, over all "
        f"{seconds_words(found.elapsed_s)} and {found.num_requests:,} rows"
    )
    against = "the rate given" if found.raw_tokens_per_s is not None else "what the replicas generate with their batches at least half full"
    once_up = _percent(share_of_raw(*found.runs, once_up=True))
    console.print(f"{_percent(found.share_of_raw_engine)} of the raw engine ({against}); without the starts {once_up}")
    for sentence in (*found.unknown, *found.left_out):
        console.print(sentence, markup=False, soft_wrap=True)


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"
