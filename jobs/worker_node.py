"""`tokenmill worker`: all engine replicas of one node, kept alive here and members of a cluster that is elsewhere.

Knows the model and the cluster, and nothing of the jobs that will run. SIGTERM, SIGINT or Azure's notice hands back what is in flight.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from jobs.cluster.cluster import MOST_UNITS_AT_ONCE
from pipeline import handover
from pipeline import rendezvous
from pipeline import storage
from pipeline import tls
from pipeline.eviction import watch_evictions
from pipeline.fit import MOST_NODES
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.profile import cut_machine
from pipeline.segments import record_death
from pipeline.supervisor import ReplicaSpec
from pipeline.supervisor import Supervisor
from pipeline.supervisor import engines_at_once
from pipeline.worker import EXIT_EVICTED
from pipeline.worker import WAITING
from pipeline.worker import WorkerConfig
from schemas.address import split_address
from schemas.errors import EXIT_COMPLETE
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.job import ClusterSpec
from schemas.job import EngineSpec
from schemas.job import LimitsSpec
from schemas.sampling import Frozen
from schemas.storage import StorageSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TELL_S = 0.5
_ALONE_S = 1200.0
"""On a node of Batch: longer than a driver needs to come back on a new machine, and a limit to what a lost one's nodes cost."""
_LEFT_OVER_S = 7200.0
"""While a scheduler is there, for the other nodes of a replica: those that replace a lost one may take their time."""
_ASK_S = 60.0
_REACH_S = 5.0
_GONE_S = 300.0
"""A machine is gone 30 s after Azure's notice. One that is still there then was spared, and Batch starts its task again."""
_NO_CLUSTER = "a worker needs --scheduler or --rendezvous, or a job file whose cluster is kind: address"


class NodeJob(Frozen):
    """What a node needs to know of the jobs that it will run; the parts of a job file that say so."""

    model: str
    engine: EngineSpec = EngineSpec()
    cluster: ClusterSpec
    limits: LimitsSpec = LimitsSpec()
    storage: StorageSpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSpec:
    """One node."""

    job: NodeJob
    name: str
    """Its replicas are named after it, so no two nodes may share it."""
    replicas: int | None = None
    """By default what the profile finds good for this machine."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise JobError(f"--name: found {self.name!r}, expected letters, digits, dots, underscores and hyphens")
        if self.job.cluster.kind != "address":
            raise JobError(_NO_CLUSTER)


def parse_node(data: Mapping[str, Any], *, name: str | None, replicas: int | None) -> NodeSpec:
    """A job file's fields, of which other sections do not matter here. Raises JobError."""
    if not data.get("model"):
        raise JobError("give a job file, or --model; see `tokenmill worker --help`")
    if "cluster" not in data:
        raise JobError(_NO_CLUSTER)
    try:
        job = NodeJob.model_validate({field: data[field] for field in NodeJob.model_fields if field in data})
    except ValidationError as error:
        raise JobError(describe_validation(error)) from None
    return NodeSpec(job=job, name=name or socket.gethostname(), replicas=replicas)


def serve(spec: NodeSpec, say: Callable[[str], None]) -> int:
    """Until the node is evicted. Returns the exit code. Raises JobError, or EngineStartError where no engine comes up."""
    storage.use(spec.job.storage)
    if spec.job.cluster.keys is not None and handover.is_remote(spec.job.cluster.keys):
        fetched = spec.job.cluster.model_copy(update={"keys": handover.fetch(spec.job.cluster.keys)})
        spec = replace(spec, job=spec.job.model_copy(update={"cluster": fetched}))
    cluster = spec.job.cluster
    if cluster.keys is not None:
        tls.read_keys(cluster.keys)
        tls.check_apart(cluster.keys, [cluster.rendezvous] if cluster.rendezvous else [])
    in_batch = bool(os.environ.get("AZ_BATCH_TASK_ID"))
    leave, notice = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave.set())

    def on_preempt() -> None:
        notice.set()
        leave.set()

    watch = watch_evictions(on_preempt)
    model = resolve_model(spec.job.model)
    plan = cut_machine(spec.job.engine, model, replicas=spec.replicas, most_nodes=MOST_NODES if cluster.rendezvous else 1)
    specs = replica_specs(spec, model, plan, tempfile.mkdtemp(prefix="tokenmill-"))
    what = f"{plan.replicas} replicas" if plan.nodes == 1 else f"part of a replica on {plan.nodes} nodes"
    say(f"node {spec.name}: {what} of {model.path} ({plan.profile}); logs in {specs[0].config.folder}")
    if plan.nodes > 1 and spec.job.engine.kind == "vllm":
        say("the engines of one replica talk from node to node without TLS: nobody else may be on their network")
    if plan.found:
        say(f"node {spec.name}: {plan.found}")
    kind = spec.job.engine.kind
    supervisor = Supervisor(
        specs, max_loading=engines_at_once(kind, plan.replicas), silence_s=spec.job.limits.engine_silence_s, on_death=record_death
    )
    try:
        _look_after(
            supervisor,
            [one.config for one in specs],
            leave,
            say,
            _ALONE_S if in_batch else None,
            lambda: plan.nodes > 1 and _answers(cluster),
        )
    finally:
        supervisor.close()
        if watch is not None:
            watch.close()
    if notice.is_set() and in_batch:
        # A task that ends by itself Batch would take for done; one whose machine vanishes it puts back into the queue.
        say(f"node {spec.name}: waiting for Azure to take the machine, so that Batch runs this task elsewhere")
        threading.Event().wait(_GONE_S)
        return EXIT_EVICTED
    return EXIT_COMPLETE


def replica_specs(spec: NodeSpec, model: Model, plan: ReplicaPlan, folder: str) -> list[ReplicaSpec]:
    """What each replica's process is told."""
    cluster = spec.job.cluster
    return [
        ReplicaSpec(
            config=WorkerConfig(
                name=f"{spec.name}-{index}",
                model=asdict(model),
                kind=spec.job.engine.kind,
                options=plan.options,
                num_threads=MOST_UNITS_AT_ONCE,  # each starts when it is needed; how many the driver sends, its job's rows decide
                folder=folder,
                scheduler=cluster.address or "",
                rendezvous=storage.absolute(cluster.rendezvous) if cluster.rendezvous else None,
                nodes=plan.nodes,
                group=group_uri(cluster.rendezvous, model, plan) if cluster.rendezvous else None,
                keys=storage.absolute(cluster.keys) if cluster.keys else None,
                insecure=cluster.insecure,
                metrics_port=cluster.metrics_port_of(index),
                metrics_host=cluster.metrics_host,
            ),
            environment=plan.environment_of(index),
        )
        for index in range(plan.replicas)
    ]


def group_uri(rendezvous: str, model: Model, plan: ReplicaPlan) -> str:
    """Where nodes meet that run the same weights with the same settings; others could not work together."""
    told = json.dumps([model.digests, plan.options], sort_keys=True, default=str)
    return storage.join(storage.absolute(rendezvous), f"groups-{hashlib.sha256(told.encode()).hexdigest()[:8]}")


def alone(members: Sequence[str | None]) -> bool:
    """Whether every replica is up and has no scheduler, or waits for other nodes, going by their own words."""
    return bool(members) and all(member is not None and member.startswith(WAITING) for member in members)


def _answers(cluster: ClusterSpec) -> bool:
    """Whether somebody is at the scheduler's address."""
    try:
        entry = rendezvous.look_up(storage.absolute(cluster.rendezvous)) if cluster.rendezvous else None
        address = entry.address if entry is not None else cluster.address
        if address is None:
            return False
        _, host, port = split_address(address)
        socket.create_connection((host.strip("[]"), port), _REACH_S).close()
    except (OSError, ValueError, JobError):
        return False
    return True


def _look_after(
    supervisor: Supervisor,
    configs: list[WorkerConfig],
    leave: threading.Event,
    say: Callable[[str], None],
    alone_s: float | None,
    answers: Callable[[], bool],
) -> None:
    """Say what happens; on notice, or alone for longer than this, evict, and wait for the end of that. Raises EngineStartError.

    A node that waits for others of its replica while the scheduler `answers` may stay longer: those may be on their way.
    """
    members: dict[str, str] = {}
    told, company, next_ask = False, time.monotonic(), 0.0
    while not supervisor.ended:
        if not alone([members.get(config.name) for config in configs]):
            company = time.monotonic()
        elif alone_s is not None and time.monotonic() > max(company + alone_s, next_ask) and not told:
            next_ask, waited_s = time.monotonic() + _ASK_S, time.monotonic() - company
            if waited_s > _LEFT_OVER_S or not answers():
                say(f"nobody to work with for {waited_s / 60:.0f} minutes: this node costs money and nobody needs it")
                leave.set()
        if leave.wait(_TELL_S) and not told:
            told = True
            say("leaving: units in flight save their finished rows and are handed back")
            supervisor.evict()
        elif told:
            threading.Event().wait(_TELL_S)
        for note in supervisor.notes():
            say(note)
        for config in configs:
            member = _member(config)
            if member and members.get(config.name) != member:
                members[config.name] = member
                say(f"replica {config.name}: {member}")
    for note in supervisor.notes():
        say(note)
    if not told:
        supervisor.raise_if_hopeless()
        raise EngineStartError("no engine replica is left on this node; see what was said of each above")


def _member(config: WorkerConfig) -> str | None:
    """How a replica stands with its scheduler, in its own words."""
    try:
        said: str | None = json.loads(config.status_path.read_text()).get("member")
    except (OSError, ValueError):
        return None
    return said
