"""The nodes of a running cluster, and orders to them over Dask: each node's go to the first of its replicas. Hears of no units."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from typing import Self

from distributed import Client
from distributed import wait
from distributed.comm import get_address_host

from jobs.cluster.cluster import node_of
from jobs.cluster.dask_units import quiet_client
from pipeline import rendezvous
from pipeline import tls
from pipeline.preflight import node_task
from pipeline.versions import PACKAGES
from pipeline.versions import differences
from pipeline.versions import from_dask
from pipeline.versions import versions
from pipeline.worker import registration
from pipeline.worker import replica_metrics
from schemas.address import check_address
from schemas.errors import JobError
from schemas.errors import TokenmillError
from schemas.errors import root_cause
from schemas.job import ClusterSpec

_CONNECT_S = 10.0
_SLACK_S = 30.0
"""For orders to reach a node and for answers to come back, on top of what the node may take."""


def check_fit(scheduler: Mapping[str, str], workers: Mapping[str, Mapping[str, Any]]) -> None:
    """Workers as a scheduler identifies them, by address. Raises JobError where they are not ours, not the same, or at work."""
    if not workers:
        raise JobError("no node has joined this cluster's scheduler yet; start `tokenmill worker` on each node")
    strangers = sorted(str(info["name"]) for info in workers.values() if registration(info) is None)
    if strangers:
        raise JobError(f"not started as `tokenmill worker`: {', '.join(strangers[:5])}; end them, or take another cluster")
    found = {"the scheduler": scheduler}
    found |= {f"worker {info['name']}": (registration(info) or {})["versions"] for info in workers.values()}
    if lines := differences(versions(), found):
        raise JobError("; ".join(lines[:5]) + "; install the same everywhere")
    busy = sorted(str(info["name"]) for info in workers.values() if replica_metrics(info).get("in_flight"))
    if busy:
        raise JobError(f"units are in flight on {', '.join(busy[:5])}, and figures would be too low; wait until the cluster is idle")


def by_node(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each node's first replica's address, by the node's name. Workers as a scheduler identifies them, by address."""
    names = sorted((str(info["name"]), address) for address, info in workers.items())
    found: dict[str, str] = {}
    for name, address in names:
        found.setdefault(node_of(name), address)
    return found


class DaskNodes:
    """A connection for as long as a preflight takes."""

    def __init__(self, spec: ClusterSpec) -> None:
        """Raises JobError where there is no cluster, or none that is fit; does not wait for one."""
        self._settings = quiet_client()
        try:
            self._client = _connect(spec)
            self._settings.callback(self._client.close, timeout=2)
            identity = self._client.sync(self._client.scheduler.identity, n_workers=-1)
            workers = identity["workers"]
            check_fit(from_dask(self._client.sync(self._client.scheduler.versions, packages=list(PACKAGES))), workers)
            self._addresses = {name: address for name, address in by_node(workers).items() if name not in spec.leave_out}
            if not self._addresses:
                raise JobError(f"cluster.leave_out: names every node that has joined: {', '.join(by_node(workers))}")
            self._models = {name: str((registration(workers[address]) or {})["model"]) for name, address in self._addresses.items()}
        except BaseException:
            self._settings.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._settings.close()

    @property
    def names(self) -> list[str]:
        return list(self._addresses)

    @property
    def models(self) -> Mapping[str, str | None]:
        """By node, the checkpoint on its disk that its engines run."""
        return dict(self._models)

    def host(self, name: str) -> str:
        """By which the other nodes reach it."""
        return str(get_address_host(self._addresses[name]))

    def ask(self, what: str, orders: Mapping[str, dict[str, Any]], limit_s: float) -> dict[str, dict[str, Any] | str]:
        """All of them at the same time. By node what it answered, or why it did not."""
        futures = {
            name: self._client.submit(
                node_task, what, order, workers=[self._addresses[name]], allow_other_workers=False, pure=False, retries=0,
                key=f"preflight-{uuid.uuid4().hex}",
            )
            for name, order in orders.items()
        }  # fmt: skip
        with contextlib.suppress(TimeoutError), self._client.as_current():
            wait(list(futures.values()), timeout=limit_s + _SLACK_S)
        answers = {name: _answer(future, limit_s + _SLACK_S) for name, future in futures.items()}
        for future in futures.values():
            future.cancel(force=True)
        return answers


def _answer(future: Any, limit_s: float) -> dict[str, Any] | str:
    if future.status == "finished":
        found: dict[str, Any] = future.result(timeout=_CONNECT_S)
        return found
    if future.status == "error":
        error = future.exception(timeout=_CONNECT_S)
        return str(error) if isinstance(error, TokenmillError) else root_cause(error)
    return f"the node gave no answer within {limit_s:.0f} s"


def _connect(spec: ClusterSpec) -> Client:
    address = spec.address
    if address is None:
        entry = rendezvous.look_up(spec.rendezvous or "")
        if entry is None:
            raise JobError(f"cluster.rendezvous: no scheduler has published itself in {spec.rendezvous}; start `tokenmill scheduler`")
        try:
            check_address(entry.address, spec.keys, spec.insecure)
        except ValueError as error:
            raise JobError(f"cluster.rendezvous: scheduler {entry.number} in {spec.rendezvous}: {error}") from None
        address = entry.address
    try:
        return Client(address, security=tls.security(spec.keys), timeout=_CONNECT_S, set_as_default=False)
    except OSError as error:
        raise JobError(f"the scheduler at {address} does not answer, or has other keys: {root_cause(error)}") from None
