"""`tokenmill profiles`: what is known of each kind of node."""

from __future__ import annotations

import click
from rich.table import Table

from jobs.cli.group import main
from jobs.cli.group import print_table
from pipeline.hardware import device_of
from pipeline.hardware import find_profile
from pipeline.hardware import profile_names
from pipeline.hardware import profile_text
from schemas.profile import Profile


@main.command()
@click.argument("name", required=False)
def profiles(name: str | None) -> None:
    """List the kinds of node that are known, or print the profile NAME, from which to write one of your own.

    \b
    Examples:
      tokenmill profiles
      tokenmill profiles nd96isr-h100-v5 > mine.yaml
      tokenmill plan job.yaml --profile mine.yaml
    """
    if name is not None:
        click.echo(profile_text(name), nl=False)
        return
    table = Table(title="Profiles; `tokenmill profiles NAME` prints one with the source of every number")
    for title in ("name", "devices", "memory", "GEMM", "bandwidth", "weights", "USD an hour", "in Azure Batch"):
        table.add_column(title)
    for profile in map(find_profile, profile_names()):
        table.add_row(profile.name, *_cells(profile))
    print_table(table)


def _cells(profile: Profile) -> list[str]:
    node, device = profile.node, device_of(profile)
    if node is None or device is None or profile.precision is None:
        return [profile.description]
    price = f"{node.price.usd_per_hour:,.2f} ({node.price.basis}, {node.price.date})" if node.price else "?"
    return [
        f"{node.devices} x {device.description}",
        f"{device.memory_gb.value:g} GB",
        f"{device.gemm_flops(profile.precision) / 1e12:,.0f} TFLOPS",
        f"{device.bytes_per_s / 1e12:.2f} TB/s",
        profile.precision,
        price,
        node.batch,
    ]
