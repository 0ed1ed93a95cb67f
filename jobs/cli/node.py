"""Commands on nodes of a cluster: node-start, scheduler, worker, keys."""

from __future__ import annotations

from typing import Any

import click

from jobs.cli.group import FLAGS
from jobs.cli.group import main
from jobs.cli.group import put
from jobs.cli.group import put_settings
from jobs.cli.group import storage_option


@main.command()
@click.argument("job_file", required=False, type=click.Path(dir_okay=False))
@click.option("--model", help="A folder with a Llama checkpoint, its URI, or 'demo'.")
@click.option("--engine", type=click.Choice(["vllm", "simulated"]), help="What generates.")
@click.option("--profile", help="Hardware profile ('auto').")
@click.option("--scheduler", help="The scheduler to join, as in tls://10.0.0.4:8786.")
@click.option("--rendezvous", metavar="URI", help="Instead of --scheduler: the folder or URI where it publishes its address.")
@click.option("--keys", help="The folder that `tokenmill keys` made.")
@click.option("--insecure", is_flag=True, default=None, help="Allow tcp://: whoever reaches this node's ports may run code on it.")
@click.option("--replicas", type=click.IntRange(min=1), help="Engine replicas; by default what the profile finds good.")
@click.option("--name", help="This node's name; by default the machine's.")
@click.option("--metrics-port", type=int, help="Serve Prometheus metrics: replica number n on this port + 1 + n.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Another field, as in engine.options.dtype=float16.")
def worker(job_file: str | None, replicas: int | None, name: str | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Run this node's engine replicas for a cluster: they join its scheduler when they are ready, and the next one when that is lost.

    What to run comes from a job file, from flags, or both (flags win). SIGTERM and Ctrl-C hand back what is in flight.

    \b
    Examples:
      tokenmill worker job.yaml
      tokenmill worker --model demo --scheduler tls://10.0.0.4:8786 --keys ~/cluster-keys
      tokenmill worker --model demo --rendezvous az://runs/cluster-a --keys ~/cluster-keys
    """
    from jobs.api import load_job_data
    from jobs.worker_node import parse_node
    from jobs.worker_node import serve

    data = load_job_data(job_file) if job_file else {}
    if flags["scheduler"] or flags["rendezvous"]:  # the file's cluster, if it has one, is another
        data["cluster"] = {"kind": "address"}
    for flag, value in flags.items():
        if value is not None:
            put(data, FLAGS[flag], value)
    put_settings(data, settings)
    raise click.exceptions.Exit(serve(parse_node(data, name=name, replicas=replicas), click.echo))


@main.command()
@click.argument("folder")
@click.option("--days", type=click.IntRange(min=1), default=30, show_default=True, help="How long they are good for.")
def keys(folder: str, days: int) -> None:
    """Make the keys of a cluster in FOLDER: a private CA's certificate, and one certificate and key for all its nodes.

    Copy the folder to every node. Whoever has node.key may run code on all of them; never put it beside results.

    \b
    Example:
      tokenmill keys ~/cluster-keys --days 90
    """
    from pipeline.tls import make_keys

    made = make_keys(folder, valid_days=days)
    click.echo(f"keys in {made.folder}, good until {made.expires_at:%Y-%m-%d %H:%M} UTC; whoever has node.key may run code on every node")


@main.command()
@storage_option
@click.option("--listen", default="tls://0.0.0.0:8786", show_default=True, help="Where workers and drivers connect.")
@click.option("--keys", help="The folder that `tokenmill keys` made.")
@click.option("--insecure", is_flag=True, help="Allow tcp://: whoever reaches it may run code on every node.")
@click.option("--rendezvous", metavar="URI", help="A folder or URI in which to publish the address.")
@click.option("--dashboard", default="127.0.0.1:8787", show_default=True, help="Loopback address of Dask's pages, or none.")
def scheduler(listen: str, keys: str | None, insecure: bool, rendezvous: str | None, dashboard: str) -> None:
    """Run a scheduler that `tokenmill worker` joins and jobs with cluster.kind: address use. Ends on SIGTERM.

    \b
    Examples:
      tokenmill scheduler --keys ~/cluster-keys
      tokenmill scheduler --keys ~/cluster-keys --rendezvous az://runs/cluster-a
    """
    from jobs.scheduler import SchedulerSpec
    from jobs.scheduler import serve

    shown = None if dashboard == "none" else dashboard
    spec = SchedulerSpec(listen=listen, keys=keys, insecure=insecure, rendezvous=rendezvous, dashboard=shown)
    raise click.exceptions.Exit(serve(spec, click.echo))


@main.command("node-start")
@click.argument("scratch", default="/mnt/tokenmill")
@click.option("--model", help="Also fetch this model, a URI, into SCRATCH/cache; else the first worker does.")
@storage_option
def node_start(scratch: str, model: str | None) -> None:
    """Prepare a node, as root, before it takes work: join its raw local disks to one, mounted at SCRATCH. Run again, it does no harm.

    The start task of the pools that infra/ makes. A disk that has anything on it is never touched.

    \b
    Examples:
      tokenmill node-start /mnt/tokenmill
      tokenmill node-start /mnt/tokenmill --model az://models/llama-3.3-70b
    """
    import os
    from pathlib import Path

    from pipeline.model import resolve_model
    from pipeline.scratch import make_scratch
    from pipeline.scratch import open_to_all
    from pipeline.scratch import run_command

    click.echo(make_scratch(scratch, run_command))
    cache = Path(scratch) / "cache"
    cache.mkdir(exist_ok=True)
    if model is not None:
        os.environ["TOKENMILL_CACHE"] = str(cache)
        click.echo(f"model {model} is in {resolve_model(model).path}")
    open_to_all(cache)
