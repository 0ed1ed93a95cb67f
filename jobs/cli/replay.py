"""The command `replay`: a committed row generated once more."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from jobs.cli.group import main
from jobs.cli.group import storage_option

if TYPE_CHECKING:
    from jobs.replay import Replayed

_EXIT_DIFFERENT = 1


@main.command()
@click.argument("output")
@click.option("--row", "rows", type=click.IntRange(min=0), multiple=True, required=True, help="Its position in the input; repeatable.")
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def replay(output: str, rows: tuple[int, ...], as_json: bool) -> None:
    """Generate committed rows of OUTPUT once more, and say whether they come out the same.

    The row is read from the input again, whose object must be unchanged, rendered as the job did, and generated alone, by an engine
    with the precision and options that its part records. What had to be different here (machine, version, what depends on a node's
    size) is said. For an error row: what was recorded, and what happens now.

    A row alone is not a row in a batch: other shapes add floating point numbers in another order, so that a completion may part
    at a late token, where two tokens were nearly as likely, without anything being wrong. At the first tokens, something is.

    Exit codes: 0 the same, 1 different, 2 no such row, or it cannot be replayed here.

    \b
    Examples:
      tokenmill replay out/ --row 17
      tokenmill replay out/ --row 17 --row 40000 --json
    """
    from jobs.replay import replay as replay_rows

    found = replay_rows(output, rows)
    if as_json:
        click.echo(json.dumps([row.to_dict() for row in found], indent=1))
    else:
        for row in found:
            _print(row)
    raise click.exceptions.Exit(0 if all(row.same for row in found) else _EXIT_DIFFERENT)


def _print(found: Replayed) -> None:
    row, difference = found.row, found.difference
    click.echo(f"row {row.position} (unit {row.unit}, {row.part}): {'same' if found.same else 'DIFFERENT'}")
    if row.answer.error is not None and difference is None and found.now.error is not None:
        click.echo(f"  recorded  {row.answer.error.kind}: {row.answer.error.message}")
        click.echo(f"  now       {found.now.error.kind}: {found.now.error.message}")
    elif difference is None:
        click.echo(f"  {row.answer.completion_tokens} tokens, {', '.join(choice.finish_reason for choice in row.answer.choices)}")
    else:
        places = [f"token {difference.token}" if difference.token is not None else ""]
        places += [f"character {difference.character}" if difference.character is not None else ""]
        places += [f"choice {difference.choice}" if len(row.answer.choices) > 1 else ""]
        place = ", ".join(filter(None, places))
        click.echo(f"  {difference.what.replace('_', ' ')} differ{f' first at {place}' if place else ''}")
        click.echo(f"  recorded  {difference.recorded}")
        click.echo(f"  now       {difference.now}")
    for remark in found.remarks:
        click.echo(f"  not as then: {remark}")
