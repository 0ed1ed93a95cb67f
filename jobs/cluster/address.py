"""A running `tokenmill scheduler`, found by address or rendezvous, and the nodes that joined it.

Nothing here starts or ends a worker. The scheduler may go away and come back elsewhere: what was in flight then comes back
as lost, and the next one is looked for. Whoever is in the cluster and does not belong there stops the job.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client
from distributed.comm.core import FatalCommClosedError

from jobs.cluster.cluster import ReplicaState
from jobs.cluster.cluster import Result
from jobs.cluster.cluster import node_of
from jobs.cluster.dask_units import DaskUnits
from jobs.cluster.dask_units import addresses_of
from jobs.cluster.dask_units import quiet_client
from jobs.cluster.dask_units import replica_states
from pipeline import rendezvous
from pipeline import tls
from pipeline.model import Model
from pipeline.replica import unit_tag
from pipeline.versions import PACKAGES
from pipeline.versions import differences
from pipeline.versions import from_dask
from pipeline.versions import versions
from pipeline.worker import registration
from pipeline.worker import replica_metrics
from schemas.address import check_address
from schemas.errors import JobError
from schemas.errors import ReplicaLost
from schemas.errors import root_cause
from schemas.job import ClusterSpec
from schemas.unit import WorkUnit

_CONNECT_S = 5.0
"""Before the address is looked up again, for the scheduler may be another one by then."""
_ANSWER_S = 10.0
_POLL_ANSWER_S = 2.0
_CLOSE_S = 2.0
_POLL_S = 1.0
_POLLED_PER_S = 200
"""Replicas that are heard of in a second at most, by this side and by the scheduler: Dask spreads their heartbeats just so."""
_RETURN_S = 20.0
"""For replicas of a lost scheduler to join its successor, before units go to others: those in flight there would be run twice."""
_MAX_WAIT_S = 15.0
_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What every worker must have."""

    versions: Mapping[str, str]
    digests: Mapping[str, str]
    """Of the model; see pipeline.model.Model.digests."""
    engine: str


def objections(needs: Needs, scheduler: Mapping[str, str], workers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why a cluster cannot run the job, a sentence for each reason. Workers as a scheduler identifies them, by address."""
    registered = {f"worker {info['name']} ({address})": registration(info) for address, info in workers.items()}
    ours = {who: said for who, said in registered.items() if said is not None}
    strangers = sorted(set(registered) - set(ours))
    problems = []
    if strangers:
        more = f" and {len(strangers) - _NAMED} more" if len(strangers) > _NAMED else ""
        problems.append(
            f"not started as `tokenmill worker`: {', '.join(strangers[:_NAMED])}{more}; units would fail there. "
            "End them, or give this job a scheduler of its own"
        )
    found = {"the scheduler": scheduler, **{who: said["versions"] for who, said in ours.items()}}
    problems += [f"{line}; install the same everywhere" for line in differences(needs.versions, found)[:_NAMED]]
    others = [
        f"{who} runs {said['model']} on engine {said['engine']}"
        for who, said in ours.items()
        if (said["digests"], said["engine"]) != (needs.digests, needs.engine)
    ]
    problems += [f"{line}, which is not what this job asks for; start it with this job's file or model" for line in others[:_NAMED]]
    return problems


def changes(before: Sequence[ReplicaState], after: Sequence[ReplicaState]) -> list[str]:
    """Who came and who went, for people."""
    old, new = {state.name for state in before}, {state.name for state in after}
    return [f"replica {name} joined" for name in sorted(new - old)] + [f"replica {name} is gone" for name in sorted(old - new)]


def kept(workers: Mapping[str, Mapping[str, Any]], leave_out: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Those of other nodes than these."""
    return {address: info for address, info in workers.items() if node_of(str(info["name"])) not in leave_out}


def holders(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By unit (see pipeline.replica.unit_tag) the replica in which it is in flight, whoever asked for it."""
    return {tag: str(info["name"]) for info in workers.values() for tag in replica_metrics(info).get("units", ())}


class AddressCluster:
    """A thread of its own holds the connection; the driver sees what is ready now and never waits for a network."""

    dashboard = None  # on the scheduler's machine, which says where

    def __init__(self, *, spec: ClusterSpec, out_uri: str, model: Model, kind: str) -> None:
        """Raises JobError for keys that are no good."""
        if spec.keys is not None:
            tls.check_apart(spec.keys, [uri for uri in (out_uri, spec.rendezvous) if uri is not None])
        self._spec, self._security = spec, tls.security(spec.keys)
        self._needs = Needs(versions=versions(), digests=model.digests, engine=kind)
        self._client: Client | None = None
        self._units: DaskUnits | None = None
        self._replicas: list[ReplicaState] = []
        self._holders: dict[str, str] = {}
        self._missing: frozenset[str] = frozenset()
        self._left_out: set[str] = set()
        self._wait_until = 0.0
        self._start_s: dict[str, float] = {}
        self._refusal: BaseException | None = None
        self._notes: list[str] = []
        self._said = ""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._settings = quiet_client()
        self._thread = threading.Thread(target=self._keep_connected, name="connection", daemon=True)
        self._thread.start()

    def replicas(self) -> list[ReplicaState]:
        """Raises JobError where the cluster is not fit for the job."""
        if self._refusal is not None:
            raise self._refusal
        client = self._client  # whose word comes before the connection's thread has heard of it
        return self._replicas if client is not None and client.status == "running" else []

    @property
    def num_replicas(self) -> int:
        return len(self.replicas())

    def submit(
        self, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Callable[[Result], None], on: str | None = None
    ) -> None:
        units = self._units
        if units is None:
            done(ReplicaLost("there is no scheduler at the moment"))
        else:
            # What a replica still has in flight from an earlier scheduler or driver it need not begin again.
            holder = self._holders.get(unit_tag(out_uri, fingerprint, unit.index))
            units.submit(out_uri, fingerprint, unit, attempt, done, on if units.has(unit.index) else holder or on)

    def leave_out(self, nodes: Iterable[str]) -> None:
        """From now on these get no unit, whatever is in flight on them."""
        self._spec = self._spec.model_copy(update={"leave_out": sorted({*self._spec.leave_out, *nodes})})
        self._replicas = [replica for replica in self._replicas if node_of(replica.name) not in self._spec.leave_out]

    def notes(self) -> list[str]:
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def start_seconds(self) -> dict[str, float]:
        return dict(self._start_s)

    def loading_seconds(self) -> dict[str, float]:
        return {}  # a replica is heard of when it is ready

    def evict(self) -> None:
        """This machine is needed, not the nodes: what they have in flight they finish and commit, and a next run finds it."""
        if self._units is not None:
            self._units.lose_all("the driver's machine is needed")

    def close(self, *, at_once: bool = False) -> None:
        """Lets go of the cluster. What its replicas are at they finish and commit, whether anybody waits for it or not."""
        self._closing.set()
        self._thread.join(0 if at_once else _CONNECT_S + _CLOSE_S)
        self._settings.close()

    def _keep_connected(self) -> None:
        failures = 0
        try:
            while not self._closing.is_set():
                address, waiting = self._find()
                client = None if address is None else self._connect(address, waiting)
                if client is None:
                    failures += 1
                    self._closing.wait(min(_MAX_WAIT_S, 0.25 * 2**failures))
                else:
                    failures = 0
                    self._use(client)
        except BaseException as error:  # the thread's outermost: the driver must hear of it, or it would wait for ever
            self._refusal = error

    def _find(self) -> tuple[str | None, str]:
        """The scheduler's address where it is known, and a word on whom we wait for. Raises JobError."""
        if self._spec.address is not None:
            return self._spec.address, f"the scheduler at {self._spec.address}"
        uri = self._spec.rendezvous or ""
        try:
            entry = rendezvous.look_up(uri)
        except OSError as error:
            self._say_once(f"waiting for {uri}, which says where the scheduler is, to answer: {error}")
            return None, ""
        if entry is None:
            self._say_once(f"waiting for a scheduler: start `tokenmill scheduler --rendezvous {uri}` on a machine that stays")
            return None, ""
        try:
            check_address(entry.address, self._spec.keys, self._spec.insecure)
        except ValueError as error:
            raise JobError(f"cluster.rendezvous: scheduler {entry.number} in {uri}: {error}") from None
        return entry.address, f"scheduler {entry.number} at {entry.address} (named in {uri})"

    def _connect(self, address: str, whom: str) -> Client | None:
        try:
            return Client(address, security=self._security, timeout=_CONNECT_S, set_as_default=False)
        except FatalCommClosedError as error:
            raise JobError(
                f"cluster.keys: {whom} has keys of another cluster than {self._spec.keys}: {root_cause(error)}; use its keys"
            ) from None
        except OSError as error:
            self._say_once(f"waiting for {whom} to answer: {root_cause(error)}")
            return None

    def _use(self, client: Client) -> None:
        """One scheduler, until it is lost. Raises JobError where the cluster is not fit for the job."""
        units, address = DaskUnits(client), client.scheduler.address
        try:
            with contextlib.suppress(OSError, TimeoutError):
                self._watch(client, units, address)
            if not self._closing.is_set():
                flying = units.num_flying
                self._say_once(f"lost the scheduler at {address}" + (f"; {flying} units in flight will be run again" if flying else ""))
        finally:
            self._missing = frozenset(state.name for state in self._replicas) or self._missing
            self._client, self._units, self._replicas, self._holders = None, None, [], {}
            units.lose_all(f"the scheduler at {address} went away")
            with contextlib.suppress(Exception):  # it is of no use any more, however it ends
                client.close(timeout=_CLOSE_S)

    def _watch(self, client: Client, units: DaskUnits, address: str) -> None:
        identity = _identity(client)
        scheduler, me = _versions(client), identity["id"]
        self._say_once(f"connected to the scheduler at {address}")
        self._wait_until = time.monotonic() + _RETURN_S
        # Dask's client may come back by itself to another scheduler at the same address, which has forgotten everything.
        while not self._closing.is_set() and client.status == "running" and identity["id"] == me:
            self._take(identity["workers"], scheduler, units)
            self._client, self._units = client, units
            self._closing.wait(max(_POLL_S, len(self._replicas) / _POLLED_PER_S))
            with contextlib.suppress(OSError, TimeoutError):  # a slow answer is no loss; a loss shows in the client's status
                identity = _identity(client, timeout_s=_POLL_ANSWER_S)

    def _take(self, joined: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, str], units: DaskUnits) -> None:
        problems = objections(self._needs, scheduler, joined)
        if problems:
            raise JobError("this cluster cannot run the job:\n  " + "\n  ".join(problems))
        workers = kept(joined, self._spec.leave_out)
        units.allow(addresses_of(workers))
        if self._spec.leave_out:
            for node in sorted({node_of(str(info["name"])) for info in joined.values()} & set(self._spec.leave_out) - self._left_out):
                self._left_out.add(node)
                self._note(f"node {node} is left out, as cluster.leave_out says")
        replicas = replica_states(workers)
        self._missing -= {state.name for state in replicas}
        if self._missing and time.monotonic() < self._wait_until:
            return
        self._holders = holders(workers)
        for note in changes(self._replicas, replicas):
            self._note(note)
        if not replicas:
            self._say_once("waiting for workers: start `tokenmill worker` on each node, with this job's file and keys")
        elif not self._replicas:
            self._said = ""
        for info in workers.values():
            said = registration(info)
            if said is not None:
                self._start_s[str(info["name"])] = said["start_s"]
        self._replicas = replicas

    def _say_once(self, text: str) -> None:
        """Not again while nothing else was said: waiting may take hours."""
        if text != self._said:
            self._said = text
            self._note(text)

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)


def _identity(client: Client, *, timeout_s: float = _ANSWER_S) -> dict[str, Any]:
    """The scheduler and all its workers, as it knows them."""
    found: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=timeout_s)
    return found


def _versions(client: Client) -> dict[str, str]:
    return from_dask(client.sync(client.scheduler.versions, packages=list(PACKAGES), callback_timeout=_ANSWER_S))
