"""What was seen of a rehearsal in; figures out. Pure: no clock, no process, no storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from jobs.accept import Accepted
from jobs.bottlenecks import bottlenecks
from jobs.bottlenecks import fit_cost
from jobs.plan import unit_tokens
from jobs.rack import ENGINE_TOKENS_PER_S
from jobs.rack import NODE_ENGINES
from jobs.rack import RECORD_TOKENS_PER_S
from jobs.rack import node_speeds
from jobs.rehearsal_node import Reading
from schemas.ledger import ReplicaAccount
from schemas.manifest import Totals
from schemas.manifest import UnitReport
from schemas.rehearsal import NodeBalance
from schemas.rehearsal import ProcessCost
from schemas.rehearsal import Rehearsal
from schemas.rehearsal import RehearsalSpec
from schemas.rehearsal import Steady
from schemas.rehearsal import StorageCost
from schemas.rehearsal import Tail
from schemas.rehearsal import WorkerCost

_UNIT_KINDS = ("read", "render", "decode", "write", "commit")
_RATE_KEPT = 0.97
Accounts = Mapping[str, ReplicaAccount]


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One look at driver and scheduler while the job runs."""

    at: float
    """Seconds since it began."""
    units: float
    """The mean of those sent and those done, for each costs something."""
    driver_s: float
    """CPU seconds so far."""
    scheduler_s: float


@dataclass(kw_only=True, slots=True)
class Seen:
    """All that was looked at. Filled by the one who looks."""

    before: dict[str, Reading]
    """By node."""
    requests_before: int
    samples: list[Moment] = field(default_factory=list)
    full: tuple[float, Accounts] | None = None
    """Seconds since the job began when every engine was full for the first time, and the accounts then."""
    all_sent: tuple[float, Accounts] | None = None
    """Likewise when the last unit had been sent."""
    at_end: Accounts = field(default_factory=dict)
    after: dict[str, Reading] = field(default_factory=dict)
    requests_after: int = 0
    drive_s: float = 0.0
    driver_peak_mb: float = 0.0
    scheduler_peak_mb: float = 0.0
    totals: Totals = field(default_factory=Totals)


def describe(
    spec: RehearsalSpec,
    seen: Seen,
    *,
    accepted: Accepted,
    reports: Sequence[UnitReport],
    node_cores: float,
    bytes_in: int,
    bytes_out: int,
    counted: bool,
    up_s: float,
    finish_s: float,
    plan_cpu_s: float,
    finish_cpu_s: float,
) -> Rehearsal:
    """`counted` says whether requests to storage could be counted."""
    rows, units, totals = accepted.plan.num_rows, len(accepted.plan.units), seen.totals
    tokens_per_row, tokens_per_unit = totals.completion_tokens / rows, totals.completion_tokens / units
    replicas = spec.nodes * spec.engines_per_node
    spent = [seen.after[name].since(seen.before[name]) for name in seen.after]
    driver = _process_cost([(one.at, one.units, one.driver_s) for one in seen.samples], replicas, seen.driver_peak_mb)
    scheduler = _process_cost([(one.at, one.units, one.scheduler_s) for one in seen.samples], replicas, seen.scheduler_peak_mb)
    worker = worker_cost(spent, rows)
    storage = StorageCost(
        requests_per_unit=sum(one.requests for one in spent) / units if counted else None,
        driver_requests_per_s=(seen.requests_after - seen.requests_before) / seen.drive_s if counted else None,
        bytes_in_per_row=bytes_in / rows,
        bytes_out_per_row=bytes_out / rows,
    )
    hour_rows = rows_per_unit_of_an_hour(totals.prompt_tokens / rows + spec.max_tokens, tokens_per_row)
    between = steady(spec, seen.full, seen.all_sent)
    return Rehearsal(
        spec=spec,
        units=units,
        rows_per_unit=rows / units,
        rows_per_unit_of_an_hour=hour_rows,
        tokens_per_unit=tokens_per_unit,
        prompt_tokens_per_row=totals.prompt_tokens / rows,
        tokens_per_row=tokens_per_row,
        engine_s_per_unit=tokens_per_unit / ENGINE_TOKENS_PER_S,
        work_s_per_unit=sum(totals.seconds.get(kind, 0.0) for kind in _UNIT_KINDS) / max(1, len(reports)),
        up_s=up_s,
        drive_s=seen.drive_s,
        finish_s=finish_s,
        plan_cpu_s=plan_cpu_s,
        finish_cpu_s=finish_cpu_s,
        steady=between,
        tail=tail(spec, seen.at_end, seen.drive_s),
        nodes=balance(spec, seen.full, seen.all_sent, seen.at_end),
        driver=driver,
        scheduler=scheduler,
        worker=worker,
        storage=storage,
        node_cores=node_cores,
        bottlenecks=bottlenecks(
            driver=driver,
            scheduler=scheduler,
            worker=worker,
            storage=storage,
            tokens_per_row=tokens_per_row,
            tokens_per_unit=hour_rows * tokens_per_row,
            node_cores=node_cores,
            engines_per_node=spec.engines_per_node,
        ),
        notes=_notes(spec, between, counted=counted),
    )


def rows_per_unit_of_an_hour(planned_tokens_per_row: float, tokens_per_row: float) -> float:
    """In the mean, as the planner cuts the table that the record's rack would need an hour for. `planned` is what a row may come to."""
    rows = 3600 * RECORD_TOKENS_PER_S / tokens_per_row
    total = left = rows * planned_tokens_per_row
    units = 0
    while left > 0:
        left -= unit_tokens(left, total)
        units += 1
    return rows / units


def steady(spec: RehearsalSpec, full: tuple[float, Accounts] | None, all_sent: tuple[float, Accounts] | None) -> Steady | None:
    """Between the two; None where the last unit was sent before every engine was full, or hardly later."""
    if full is None or all_sent is None or all_sent[0] <= full[0]:
        return None
    busy_s = starved_s = blocked_s = tokens_per_s = 0.0
    rates: list[float] = []
    for name, after in all_sent[1].items():
        before = full[1].get(name)
        if before is None:
            continue
        # A moment of waiting that was pending then may have been counted as another kind's since.
        own = {
            kind: max(0.0, after.seconds.get(kind, 0.0) - before.seconds.get(kind, 0.0)) for kind in ("busy", "starved", "commit_blocked")
        }
        heard_s, tokens = after.busy_s - before.busy_s, after.busy_tokens - before.busy_tokens
        idle_s, unscaled_s = own["starved"] + own["commit_blocked"], own["busy"] / spec.slow_down
        busy_s, starved_s, blocked_s = busy_s + unscaled_s, starved_s + own["starved"], blocked_s + own["commit_blocked"]
        if heard_s > 0:
            rate = tokens / heard_s * spec.slow_down
            rates.append(rate / (_speed_of(spec, name) / NODE_ENGINES))
            tokens_per_s += rate * unscaled_s / (unscaled_s + idle_s) if unscaled_s + idle_s > 0 else 0.0
    if not rates or busy_s <= 0:
        return None
    idle_s = starved_s + blocked_s
    return Steady(
        wall_s=all_sent[0] - full[0],
        busy_s=busy_s,
        starved_s=starved_s,
        blocked_s=blocked_s,
        idle_share=idle_s / (idle_s + busy_s),
        idle_share_scaled=idle_s / (idle_s + busy_s * spec.slow_down),
        rate_kept=sum(rates) / len(rates),
        tokens_per_s=tokens_per_s,
    )


def tail(spec: RehearsalSpec, accounts: Accounts, drive_s: float) -> Tail:
    """Engines decode in it, or wait for those that do, so its seconds are scaled as engines are."""
    seconds = {name: account.seconds.get("tail", 0.0) / spec.slow_down for name, account in accounts.items()}
    nodes = by_node(seconds)
    return Tail(
        job_s=drive_s / spec.slow_down,
        mean_s=sum(seconds.values()) / max(1, len(seconds)),
        max_s=max(seconds.values(), default=0.0),
        node_s=max((sum(each) / len(each) for each in nodes.values()), default=0.0),
    )


def balance(
    spec: RehearsalSpec, full: tuple[float, Accounts] | None, all_sent: tuple[float, Accounts] | None, at_end: Accounts
) -> tuple[NodeBalance, ...]:
    """Each node's speed and what it did with it."""
    rows = by_node({name: float(account.rows) for name, account in at_end.items()})
    tails = by_node({name: account.seconds.get("tail", 0.0) / spec.slow_down for name, account in at_end.items()})
    rates: dict[str, float] = {}
    if full is not None and all_sent is not None and all_sent[0] > full[0]:
        wall_s = all_sent[0] - full[0]
        made = {
            name: float(after.generated_tokens - full[1][name].generated_tokens) for name, after in all_sent[1].items() if name in full[1]
        }
        rates = {node: sum(tokens) / wall_s * spec.slow_down for node, tokens in by_node(made).items()}
    return tuple(
        NodeBalance(
            name=node,
            speed_tokens_per_s=_speed_of(spec, f"{node}-0") / NODE_ENGINES * spec.engines_per_node,
            tokens_per_s=rates.get(node, 0.0),
            rows=round(sum(rows[node])),
            tail_s=sum(tails[node]) / len(tails[node]),
        )
        for node in sorted(rows)
    )


def worker_cost(spent: Sequence[Reading], rows: int) -> WorkerCost:
    """Of all nodes together. What is in no unit's thread and no engine's is `other`."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for one in spent:
        for kind, seconds in one.by_kind.items():
            kinds[kind] += seconds
    owner_s, simulated_s = sum(one.owner_s for one in spent), sum(one.simulated_s for one in spent)
    other_s = sum(one.process_s for one in spent) - sum(kinds.values()) - owner_s
    by_kind = {kind: kinds.get(kind, 0.0) for kind in _UNIT_KINDS}
    by_kind["feed"] = kinds.get("generate", 0.0) + max(0.0, owner_s - simulated_s)
    by_kind["other"] = max(0.0, other_s)
    return WorkerCost(
        by_kind={kind: seconds / rows for kind, seconds in by_kind.items()},
        simulated=simulated_s / rows,
        peak_mb=max((one.peak_mb for one in spent), default=0.0),
    )


def by_node(values: Mapping[str, float]) -> dict[str, list[float]]:
    """Replicas' values by the node that they are on."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        found[name.rpartition("-")[0]].append(value)
    return dict(found)


def _speed_of(spec: RehearsalSpec, replica: str) -> float:
    """Tokens/s of its node, as the record's had four engines."""
    return node_speeds(spec.nodes)[int(replica.split("-")[1])]


def _process_cost(samples: Sequence[tuple[float, float, float]], replicas: int, peak_mb: float) -> ProcessCost:
    s_per_unit, s_per_s = fit_cost(samples)
    total_s = samples[-1][2] - samples[0][2] if samples else 0.0
    return ProcessCost(s_per_unit=s_per_unit, s_per_replica_s=s_per_s / replicas, total_s=total_s, peak_mb=peak_mb)


def _notes(spec: RehearsalSpec, between: Steady | None, *, counted: bool) -> tuple[str, ...]:
    notes = []
    if between is None:
        notes.append("the table is too small for a steady state: every unit was sent before all engines were full; give more --rows")
    elif between.rate_kept < _RATE_KEPT:
        notes.append(f"the engines kept {between.rate_kept:.0%} of their rate: this machine is too slow for --slow-down {spec.slow_down:g}")
    if not counted:
        notes.append("requests to storage are counted on Azure alone: give --store az://CONTAINER")
    return tuple(notes)
