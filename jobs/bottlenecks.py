"""Measured costs in; the aggregate tokens/s at which each part would hold the others back out. Pure arithmetic, no clock."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.rack import ENGINE_TOKENS_PER_S
from jobs.rack import RECORD_TOKENS_PER_S
from schemas.rehearsal import Bottleneck
from schemas.rehearsal import ProcessCost
from schemas.rehearsal import StorageCost
from schemas.rehearsal import WorkerCost

ACCOUNT_REQUESTS_PER_S = 20_000
"""Default target of a general-purpose v2 account, as are the next two; some regions have two to four times as much, and more can be
asked for. learn.microsoft.com, "Scalability and performance targets for standard storage accounts"."""
ACCOUNT_INGRESS_BYTES_PER_S = 25e9 / 8
ACCOUNT_EGRESS_BYTES_PER_S = 50e9 / 8

MOST_HEARD = 400
"""Replicas whose hearing costs as much as that of any more. From 200 on both Dask's heartbeats (distributed.scheduler.heartbeat_interval)
and the driver's polls are spread to 200 replicas a second; below that heartbeats come half as often, hence twice as many here."""


def fit_cost(samples: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Least squares of cpu = constant + a * units + b * seconds over (seconds, units, cpu); returns a and b, neither below 0.

    A run begins with a burst of units, waits for the first of them, and then gets them one by one, which tells the two apart.
    """
    if len(samples) < 3:
        return 0.0, 0.0
    mean_t, mean_u, mean_c = (sum(column) / len(samples) for column in zip(*samples, strict=True))
    tt = sum((t - mean_t) ** 2 for t, _, _ in samples)
    uu = sum((u - mean_u) ** 2 for _, u, _ in samples)
    tu = sum((t - mean_t) * (u - mean_u) for t, u, _ in samples)
    tc = sum((t - mean_t) * (c - mean_c) for t, _, c in samples)
    uc = sum((u - mean_u) * (c - mean_c) for _, u, c in samples)
    determinant = tt * uu - tu * tu
    if determinant > 1e-9 * tt * uu > 0:
        a, b = (uc * tt - tc * tu) / determinant, (tc * uu - uc * tu) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if a < 0:
            return 0.0, max(0.0, tc / tt)
    return (max(0.0, uc / uu), 0.0) if uu > 0 else (0.0, max(0.0, tc / tt if tt > 0 else 0.0))


def bottlenecks(
    *,
    driver: ProcessCost,
    scheduler: ProcessCost,
    worker: WorkerCost,
    storage: StorageCost,
    tokens_per_row: float,
    tokens_per_unit: float,
    node_cores: float,
    engines_per_node: int,
) -> tuple[Bottleneck, ...]:
    """The nearest first. Engines are the record's; more tokens/s mean more nodes, or for the node's own parts quicker engines."""
    found = []
    for name, cost in (("driver", driver), ("scheduler", scheduler)):
        a_unit, a_replica = cost.s_per_unit / tokens_per_unit, cost.s_per_replica_s / ENGINE_TOKENS_PER_S
        found += _at(f"{name}, units alone", a_unit, "one core, busy with units")
        with_all = a_unit + a_replica
        hearing = MOST_HEARD * cost.s_per_replica_s
        if hearing < 1 and a_unit > 0 and (1 - hearing) / a_unit > MOST_HEARD * ENGINE_TOKENS_PER_S:
            with_all = a_unit / (1 - hearing)  # there are more replicas than are heard of at the pace of a few
        found += _at(f"{name}, units and replicas", with_all, "one core, busy with units and with hearing of replicas")
    node_share_of_record = engines_per_node * ENGINE_TOKENS_PER_S / RECORD_TOKENS_PER_S
    row = worker.s_per_row / tokens_per_row
    found += _at("a worker's process", row * ENGINE_TOKENS_PER_S / RECORD_TOKENS_PER_S, "one core for each engine, its Python's lock")
    found += _at("a node's CPU", row * node_share_of_record / node_cores, f"{node_cores:.0f} cores of each node")
    if storage.requests_per_unit is not None:
        per_token = storage.requests_per_unit / tokens_per_unit / ACCOUNT_REQUESTS_PER_S
        found += _at("storage requests", per_token, f"{ACCOUNT_REQUESTS_PER_S:,} a second, one account")
    egress, ingress = storage.bytes_in_per_row / tokens_per_row, storage.bytes_out_per_row / tokens_per_row
    found += _at("storage egress", egress / ACCOUNT_EGRESS_BYTES_PER_S, "prompts read, 50 Gbit/s of one account")
    found += _at("storage ingress", ingress / ACCOUNT_INGRESS_BYTES_PER_S, "completions written, 25 Gbit/s of one account")
    return tuple(sorted(found, key=lambda one: one.tokens_per_s))


def _at(name: str, share_per_token_s: float, limit: str) -> list[Bottleneck]:
    """From the share of the limit that each token/s takes; what takes nothing holds nobody back."""
    if share_per_token_s <= 0:
        return []
    most = 1 / share_per_token_s
    return [Bottleneck(name=name, tokens_per_s=most, times_record=most / RECORD_TOKENS_PER_S, limit=limit)]
