"""Figures: evidence in, numbers out. Pure; what they are called and how they look is not known here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.caps import Caps
from jobs.cluster.cluster import node_of
from jobs.reporting.evidence import Counts
from schemas.ledger import Kind
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount
from schemas.manifest import UnitReport

Numbers = npt.NDArray[np.float64]

_BUCKETS = 120
_SAME_S = 1.0
"""Pauses shorter than this are none."""
_LEAST_S = 1e-3
"""That a unit took: it may have been copied whole within its clock's resolution."""
_EXAMPLES_A_KIND = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Output tokens/s over the seconds in which something was under way; pauses between runs are left out."""

    edges_s: Numbers  # (num_buckets + 1)
    tokens_per_s: Numbers  # (num_buckets)
    rows: Numbers  # (num_buckets + 1), committed by then
    run_begins_s: tuple[float, ...]
    """Of the second run and later ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one node, or one replica, did of the whole."""

    name: str
    replicas: int
    units: int
    rows: int
    output_tokens: int
    lifetime_s: float
    busy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Rows by tokens."""

    edges: Counts  # (num_bins + 1)
    rows: Counts  # (num_bins)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of all runs, by their nodes' price."""

    usd: float
    node_hours: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """Work that was not done for the first time, or not at all."""

    resumed_rows: int
    resumed_tokens: int
    copied_rows: int
    copied_tokens: int
    cached_prompt_tokens: int
    reused_rows: int
    reused_tokens: int
    retries: int
    doubled: int
    processes: int
    """Of engines, more than one a replica and run."""
    wasted_tokens: int
    """Generated and neither committed nor saved, by runs that are over."""


def active_spans(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals: [(0, 5), (3, 8), (20, 21)] is [(0, 8), (20, 21)]."""
    spans: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if spans and start <= spans[-1][1] + _SAME_S:
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
    return spans


def throughput(units: Sequence[UnitReport], runs: Sequence[RunAccount], *, num_buckets: int = _BUCKETS) -> Throughput:
    """Each unit's tokens spread evenly from its first read to its commit."""
    begun = np.array([unit.started_at for unit in units], dtype=np.float64)
    took_s = np.maximum(np.array([unit.finished_at for unit in units], dtype=np.float64) - begun, _LEAST_S)
    tokens = np.array([_made_tokens(unit) for unit in units], dtype=np.float64)
    intervals = [(run.began_at, run.began_at + run.elapsed_s) for run in runs]
    intervals += list(zip(begun.tolist(), (begun + took_s).tolist(), strict=True))
    spans = active_spans(intervals)
    if not spans:
        return Throughput(edges_s=np.zeros(1), tokens_per_s=np.zeros(0), rows=np.zeros(1), run_begins_s=())
    lengths = np.array([stop - start for start, stop in spans])
    offsets = np.concatenate([[0.0], np.cumsum(lengths)])
    clock = np.array([moment for span in spans for moment in span])
    under_way = np.array([at for index in range(len(spans)) for at in (offsets[index], offsets[index + 1])])
    edges_s = np.linspace(0.0, max(float(offsets[-1]), _LEAST_S), num_buckets + 1)
    begun_s = np.interp(begun, clock, under_way)
    made = np.array([float(np.sum(tokens * np.clip((edge - begun_s) / took_s, 0.0, 1.0))) for edge in edges_s])
    ended_s = np.interp(begun + took_s, clock, under_way)
    order = np.argsort(ended_s)
    committed = np.concatenate([[0.0], np.cumsum(np.array([unit.rows for unit in units], dtype=np.float64)[order])])
    later = [float(np.interp(run.began_at, clock, under_way)) for run in runs]
    return Throughput(
        edges_s=edges_s,
        tokens_per_s=np.diff(made) / np.diff(edges_s),
        rows=committed[np.searchsorted(ended_s[order], edges_s, side="right")],
        run_begins_s=tuple(sorted(later)[1:]),
    )


def _made_tokens(unit: UnitReport) -> int:
    """Output tokens as a run's account counts them: also those that were copied, or saved by earlier attempts, but of this job."""
    return unit.completion_tokens - unit.reused_tokens


def balance(units: Iterable[UnitReport], replicas: Iterable[ReplicaAccount], *, by_node: bool) -> list[Share]:
    """What each did, by name. Units are the committed ones, seconds those of all runs."""
    sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for unit in units:
        mine = sums[node_of(unit.worker) if by_node else unit.worker]
        mine["units"] += 1
        mine["rows"] += unit.rows
        mine["output_tokens"] += _made_tokens(unit)
    for replica in replicas:
        mine = sums[node_of(replica.name) if by_node else replica.name]
        mine["replicas"] += 1
        mine["lifetime_s"] += replica.lifetime_s
        mine["busy_s"] += replica.seconds.get("busy", 0.0)
    return [
        Share(
            name=name,
            replicas=int(mine["replicas"]),
            units=int(mine["units"]),
            rows=int(mine["rows"]),
            output_tokens=int(mine["output_tokens"]),
            lifetime_s=mine["lifetime_s"],
            busy_s=mine["busy_s"],
        )
        for name, mine in sorted(sums.items())
    ]


def histogram(lengths: Counts, *, num_bins: int = 40) -> Histogram:
    """In bins of one width, in whole tokens."""
    if not lengths.size:
        return Histogram(edges=np.zeros(1, dtype=np.int64), rows=np.zeros(0, dtype=np.int64))
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // num_bins))
    edges = np.arange(low, high + width + 1, width, dtype=np.int64)
    rows, _ = np.histogram(lengths, bins=edges)
    return Histogram(edges=edges, rows=rows.astype(np.int64))


def cost(runs: Iterable[RunAccount], usd_per_hour: Mapping[str, float | None]) -> Cost | None:
    """None where the price of some run's nodes is not known."""
    usd = node_hours = 0.0
    for run in runs:
        node_s = run.node_s
        if node_s is None:  # an earlier version's account: as if every node had been there all the time
            node_s = run.elapsed_s * max(1, len({node_of(replica.name) for replica in run.replicas}))
        node_hours += node_s / 3600
        spent = Caps(usd_per_hour=usd_per_hour[run.run]).usd(node_s)
        if spent is None:
            return None
        usd += spent
    return Cost(usd=usd, node_hours=node_hours)


def repeated(units: Sequence[UnitReport], runs: Sequence[RunAccount], *, goes_on: bool) -> Repeated:
    """`goes_on`: of the last run nobody can say yet which tokens will be kept."""
    over = runs[:-1] if goes_on else runs
    return Repeated(
        resumed_rows=sum(unit.resumed_rows for unit in units),
        resumed_tokens=sum(unit.resumed_tokens for unit in units),
        copied_rows=sum(unit.copied_rows for unit in units),
        copied_tokens=sum(unit.copied_tokens for unit in units),
        cached_prompt_tokens=sum(unit.cached_prompt_tokens for unit in units),
        reused_rows=sum(unit.reused_rows for unit in units),
        reused_tokens=sum(unit.reused_tokens for unit in units),
        retries=sum(run.retries for run in runs),
        doubled=sum(run.doubled for run in runs),
        processes=sum(max(0, replica.processes - 1) for run in runs for replica in run.replicas),
        wasted_tokens=sum(max(0, replica.generated_tokens - replica.output_tokens) for run in over for replica in run.replicas),
    )


def counted(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Added up, most first."""
    sums: defaultdict[str, int] = defaultdict(int)
    for one in counts:
        for key, count in one.items():
            sums[key] += count
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def first_flagged(units: Iterable[UnitReport], flaw: str, *, most: int = _EXAMPLES_A_KIND) -> list[int]:
    """Positions of the first rows with a flaw."""
    return [row for unit in units for row in unit.flagged.get(flaw, [])][:most]


def error_examples(units: Iterable[UnitReport], *, each: int = _EXAMPLES_A_KIND) -> dict[str, list[dict[str, Any]]]:
    """A few of each kind, the first in the table."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for unit in units:
        for example in unit.examples:
            if len(found[example["kind"]]) < each:
                found[example["kind"]].append(example)
    return found


def ends_of(shares: Sequence[ReplicaAccount], most: int, kind: Kind = "busy") -> list[ReplicaAccount]:
    """All of them, or of many those that were least and most of that kind, half of each, by name."""
    if len(shares) <= most:
        return list(shares)
    ranked = sorted(shares, key=lambda replica: replica.seconds.get(kind, 0.0))
    return sorted([*ranked[: most // 2], *ranked[-(most - most // 2) :]], key=lambda replica: replica.name)
