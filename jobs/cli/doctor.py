"""The command `doctor`: whether a job could run here."""

from __future__ import annotations

import json

import click

from jobs.cli.group import main
from jobs.cli.group import storage_option
from schemas.errors import EXIT_UNITS_FAILED

_WIDE = 120
"""Columns, where no terminal says how wide it is."""
_MARKS = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "note": "[yellow]note[/]"}


@main.command()
@click.argument("uris", nargs=-1, metavar="[URI]...")
@storage_option
@click.option("--write", is_flag=True, help="Also create an object of 16 bytes at each URI, and remove it.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(uris: tuple[str, ...], write: bool, as_json: bool) -> None:
    """Look at versions, devices, credentials (names only) and the stores URI...; say what is missing and the command that mends it.

    Exit code 0 when a job could run here, 1 otherwise.

    \b
    Examples:
      tokenmill doctor
      tokenmill doctor az://runs/out data/ --write
    """
    from jobs.doctor import examine

    found = examine(uris, write=write)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _WIDE
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("", "what", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for check in found.checks:
            table.add_row(_MARKS[check.state], Text(check.name), Text(check.found), Text(check.fix))
        console.print(table)
        console.print(", ".join(f"{name} {version}" for name, version in found.versions.items()), markup=False)
        console.print("a job could run here" if found.able else "no job could run here: mend what is missing")
    raise click.exceptions.Exit(0 if found.able else EXIT_UNITS_FAILED)
