"""What a rehearsal of the record is asked for, and what it found. Values only."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from schemas.sampling import Frozen


class RehearsalSpec(Frozen):
    """A rack of simulated engines and a table for it."""

    nodes: int = Field(default=18, ge=1, le=200)
    engines_per_node: int = Field(default=4, ge=1, le=16)
    rows: int = Field(ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    """Of a row's output, as in MLPerf's Llama 2 70B; rows end sooner, by themselves."""
    slow_down: float = Field(ge=1)
    """How many times slower than the record the engines run, so that this machine's cores carry the workers' real work."""
    profile: str = "nd128isr-gb300-v6"
    """Whose batch and cores a node has."""
    model: str = "demo"
    """Whose tokenizer and chat template; no weights are loaded."""
    store: str | None = None
    """Folder or URI for prompts and completions; by default a folder that is thrown away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steady:
    """From the moment when every engine is full until the last unit is sent. Idle seconds are real ones, busy ones are unscaled."""

    wall_s: float
    busy_s: float
    """Of all engines, as the record's would have needed."""
    starved_s: float
    blocked_s: float
    idle_share: float
    """Starved and commit-blocked, of both and busy."""
    idle_share_scaled: float
    """The same against the scaled engine seconds that really passed; what a ledger would say."""
    rate_kept: float
    """Tokens/s of the engines while busy, as a share of what they were asked for. Under 1: this machine was too slow for the slow-down."""
    tokens_per_s: float
    """Of all engines, unscaled and with the idle seconds in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tail:
    """The end: batches under half full and no row to come. In engine seconds at the record's rate."""

    job_s: float
    """From the first unit sent to the last one committed."""
    mean_s: float
    max_s: float
    """Of one engine."""
    node_s: float
    """Of the node that waits the longest: the mean of its engines."""

    @property
    def node_share(self) -> float:
        return self.node_s / self.job_s

    @property
    def node_share_of_an_hour(self) -> float:
        """The tail does not grow with the table: its share of a job that takes an hour."""
        return self.node_s / 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeBalance:
    """One node: how fast it was made, and what it did until the last unit was sent."""

    name: str
    speed_tokens_per_s: float
    tokens_per_s: float
    """Unscaled; None-like 0 where there was no steady state."""
    rows: int
    tail_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessCost:
    """CPU seconds of the driver or the scheduler, fitted over the run: for a unit, and in a second for each replica that it knows."""

    s_per_unit: float
    s_per_replica_s: float
    total_s: float
    """While the job was driven."""
    peak_mb: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerCost:
    """CPU seconds of all workers, a row; the simulated engine's own are in none but `simulated`."""

    by_kind: dict[str, float]
    """read, render (tokenising), feed (the engine's queue, order and ledger), decode, write, commit, other (Dask, heartbeats, Python)."""
    simulated: float
    peak_mb: float
    """Of the largest process."""

    @property
    def s_per_row(self) -> float:
        return sum(self.by_kind.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageCost:
    """What a job asks of its storage account."""

    requests_per_unit: float | None
    """Of workers. None where the store is no Azure account, whose requests nobody counted."""
    driver_requests_per_s: float | None
    bytes_in_per_row: float
    bytes_out_per_row: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Bottleneck:
    """What would hold the whole back, and from where on."""

    name: str
    tokens_per_s: float
    """Aggregate output tokens/s."""
    times_record: float
    limit: str
    """In words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """All that was found."""

    spec: RehearsalSpec
    units: int
    rows_per_unit: float
    rows_per_unit_of_an_hour: float
    """As the planner cuts the table that the record's rack needs an hour for: the units for which bottlenecks are told."""
    tokens_per_unit: float
    """Output."""
    prompt_tokens_per_row: float
    tokens_per_row: float
    """Output."""
    engine_s_per_unit: float
    """At the record's rate."""
    work_s_per_unit: float
    """Real thread seconds of a unit beside waiting for its engine, on this machine, where all nodes share the cores."""
    up_s: float
    """Until all replicas had joined."""
    drive_s: float
    finish_s: float
    plan_cpu_s: float
    """Of accepting the job and storing its plan."""
    finish_cpu_s: float
    """Of checking all parts and writing the manifest."""
    steady: Steady | None
    """None where the table was too small for one."""
    tail: Tail
    nodes: tuple[NodeBalance, ...]
    driver: ProcessCost
    scheduler: ProcessCost
    worker: WorkerCost
    storage: StorageCost
    node_cores: float
    bottlenecks: tuple[Bottleneck, ...]
    notes: tuple[str, ...]

    @property
    def node_cpu_share(self) -> float:
        """Of its cores, at its engines' full rate."""
        rows_per_s = sum(node.speed_tokens_per_s for node in self.nodes) / len(self.nodes) / self.tokens_per_row
        return rows_per_s * self.worker.s_per_row / self.node_cores

    def to_dict(self) -> dict[str, Any]:
        """For --json: plain data."""
        values = {name: getattr(self, name) for name in self.__slots__}
        plain = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in values.items()}
        return {
            **plain,
            "spec": self.spec.model_dump(),
            "nodes": [asdict(node) for node in self.nodes],
            "bottlenecks": [asdict(one) for one in self.bottlenecks],
            "notes": list(self.notes),
            "node_cpu_share": self.node_cpu_share,
            "worker_s_per_row": self.worker.s_per_row,
            "tail_node_share": self.tail.node_share,
            "tail_node_share_of_an_hour": self.tail.node_share_of_an_hour,
        }
