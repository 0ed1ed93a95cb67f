"""The command `preflight`: whether nodes are as fast as they should be, before a job finds out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from typing import Any

import click

from jobs.cli.group import FLAGS
from jobs.cli.group import main
from jobs.cli.group import put
from jobs.cli.group import put_settings
from schemas.errors import JobError
from schemas.preflight import PILLARS
from schemas.preflight import Thresholds

if TYPE_CHECKING:
    from jobs.preflight import PreflightResult

_MIN_WIDTH = 120
"""Characters a line: cropped numbers are worse than wrapped lines."""
_USUAL = Thresholds()


@main.command()
@click.argument("job_file", required=False, type=click.Path(dir_okay=False))
@click.option("--model", help="Whose layers are multiplied: a checkpoint, 'demo', or a name as llama-3.1-8b; by default the nodes' own.")
@click.option("--output", "output_uri", help="The job's output, beside which the store is measured; without it only the local disk is.")
@click.option("--disk", help="A folder on the local disk; by default the system's temporary one.")
@click.option("--profile", help="What nodes should reach: a profile, VM size or path; by default as Azure or the GPUs say.")
@click.option("--cluster", type=click.Choice(["local", "address"]), help="local: this machine, the default. address: a cluster's nodes.")
@click.option("--scheduler", help="With --cluster address: the scheduler, as in tls://10.0.0.4:8786.")
@click.option("--rendezvous", help="Instead of --scheduler: the folder or URI where it publishes its address.")
@click.option("--keys", help="With --cluster address: the folder that `tokenmill keys` made.")
@click.option("--insecure", is_flag=True, default=None, help="With --cluster address: no TLS; see jobs/cluster/README.md, Security.")
@click.option("--leave-out", multiple=True, metavar="NODE", help="With --cluster address: a node to leave out; repeatable.")
@click.option("--skip", multiple=True, type=click.Choice(PILLARS), help="A pillar not to measure; repeatable.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="To measure for (34); starting processes comes on top.")
@click.option("--of-profile", type=float, default=_USUAL.of_profile, show_default=True, help="A smaller share of the profile is slow.")
@click.option("--of-median", type=float, default=_USUAL.of_median, show_default=True, help="A smaller share of the nodes' median is slow.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Another field, as in storage.credential.env=NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on standard output.")
def preflight(
    job_file: str | None,
    disk: str | None,
    skip: tuple[str, ...],
    seconds: float | None,
    of_profile: float,
    of_median: float,
    leave_out: tuple[str, ...],
    settings: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure compute, memory, network and storage of this machine or of every node of an idle cluster, and name slow nodes.

    A node is slow where a figure is below a share of what its profile says, or a group of figures below a share of the nodes' median.
    To run a job without slow nodes: `tokenmill run job.yaml --preflight`, or their names under cluster.leave_out.

    Exit codes: 0 fine, 1 a node is slow or a pillar could not be measured, 2 wrong options.

    \b
    Examples:
      tokenmill preflight
      tokenmill preflight job.yaml --json
      tokenmill preflight --cluster address --scheduler tls://10.0.0.4:8786 --keys ~/cluster-keys --output az://results/run-1
    """
    from jobs.api import load_job_data
    from jobs.preflight import DEFAULT_SECONDS
    from jobs.preflight import PreflightSpec
    from jobs.preflight import parse_preflight
    from jobs.preflight import preflight as run_preflight

    data = load_job_data(job_file) if job_file else {}
    own: dict[str, Any] = {}
    if flags["scheduler"] or flags["rendezvous"]:  # the file's cluster, if it has one, is another
        data["cluster"] = {"kind": "address"}
    for flag, value in flags.items():
        if value is not None:
            put(own, FLAGS[flag], value)
            put(data, FLAGS[flag], value)
    cluster = data.get("cluster")
    before = cluster.get("leave_out", []) if isinstance(cluster, dict) else []
    if leave_out and isinstance(before, list):  # anything else is refused below, where the rest is checked
        put(data, "cluster.leave_out", [*before, *leave_out])
    put_settings(own, settings)
    put_settings(data, settings)
    if not 0 < of_profile <= 1 or not 0 < of_median <= 1:
        raise JobError(f"--of-profile and --of-median are shares above 0 and up to 1, found {of_profile:g} and {of_median:g}")
    spec = PreflightSpec(
        job=parse_preflight(data, own),
        pillars=tuple(pillar for pillar in PILLARS if pillar not in skip),
        seconds=DEFAULT_SECONDS if seconds is None else seconds,
        disk=disk,
        thresholds=Thresholds(of_profile=of_profile, of_median=of_median),
    )
    found = run_preflight(spec, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print(found)
    raise click.exceptions.Exit(found.exit_code)


def _print(found: PreflightResult) -> None:
    from rich.console import Console

    from jobs.preflight import sentence
    from jobs.preflight_judge import busy
    from jobs.preflight_table import figures
    from jobs.preflight_table import machines

    console = Console(highlight=False)
    console.width = max(console.width, _MIN_WIDTH)
    console.print(machines(found.nodes))
    console.print(figures(found.nodes, found.expected))
    sentences = [f"left out: {text}" for text in dict.fromkeys(text for report in found.nodes for text in report.left_out)]
    for report in found.nodes:
        sentences += [f"node {report.name}: {failure.pillar} was not measured: {failure.reason}" for failure in report.failures]
    sentences += [sentence(finding) for finding in found.findings] or ["no node is slow"]
    sentences += busy(found.nodes)
    if found.leave_out and len(found.nodes) > len(found.leave_out):
        names = ", ".join(found.leave_out)
        sentences.append(f"to run without: tokenmill run ... --set 'cluster.leave_out=[{names}]', or tokenmill run ... --preflight")
    for text in sentences:
        console.print(text, markup=False, soft_wrap=True)
