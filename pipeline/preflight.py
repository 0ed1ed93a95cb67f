"""One node's part of a preflight: orders in, answers out. Each measurement runs in a process of its own, which may hang or die.

On a cluster this runs inside a replica's worker process, beside its idle engine; here, in whatever process asks. Knows no torch.
"""

from __future__ import annotations

import os
import platform
import socket
import tempfile
import uuid
from collections.abc import Callable
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.azure_node import this_azure_node
from pipeline.child import run_child
from pipeline.preflight_storage import missing_folders
from pipeline.profile import this_machine
from pipeline.shape import read_shape
from schemas.errors import JobError
from schemas.preflight import Answer
from schemas.preflight import NodeFacts
from schemas.preflight import Order

_START_S = 60.0
"""For processes to start: torch takes 2 s where a machine is idle, and CUDA on eight GPUs at once ten times that."""
_OVER = 3.0
"""Times its seconds that a pillar may take once it has started: the last repetition of each figure may be a long one."""
_CLEAN_S = 30.0
_DECIDING_FLAGS = ("avx512_fp16", "avx512_bf16", "amx_bf16", "amx_int8", "avx512_vnni")


def limit_s(seconds: float) -> float:
    """After which a pillar's processes are ended."""
    return _START_S + _OVER * seconds


def node_task(what: str, data: dict[str, Any]) -> dict[str, Any]:
    """The Dask task. Runs in a replica's process, whose parent is the node's own command: what the replica may not see, that one may."""
    if what == "facts":
        return facts(data["model"], _environment(os.getppid()), _cores(os.getppid())).model_dump(mode="json")
    return measure(Order.model_validate(data)).model_dump(mode="json")


def facts(model: str | None, environment: Mapping[str, str] | None = None, core_ids: tuple[int, ...] | None = None) -> NodeFacts:
    """Of this node, as the environment says which GPUs are its own. `model` is a checkpoint's folder here. Raises JobError."""
    environment = os.environ if environment is None else environment
    machine = this_machine(environment)
    cores = (machine.core_ids if core_ids is None else core_ids) or ()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return NodeFacts(
        architecture=platform.machine(),
        core_ids=cores,
        num_cores=len(cores) or machine.cores,
        load=os.getloadavg()[0],
        cpu_name=machine.cpu_name,
        cpu_flags=tuple(flag for flag in _DECIDING_FLAGS if flag in machine.cpu_flags),
        gpus=machine.visible_gpus or tuple(map(str, range(machine.num_gpus))),
        gpu_name=machine.gpu_name,
        free_port=port,
        shape=asdict(read_shape(model)) if model is not None else None,
        azure=this_azure_node(),
    )


def measure(order: Order) -> Answer:
    """One pillar. Raises JobError where a process of it failed; what the others measured is lost then, for a node counts as a whole."""
    if order.pillar == "storage":
        return _storage(order)
    if order.pillar == "network":
        return _network(order)
    orders = [{"device": device, "label": label_of(device), "order": order.model_dump(mode="json")} for device in order.devices]
    return _together(f"pipeline.preflight_{order.pillar}", orders, order)


def label_of(device: str) -> str:
    return device if device == "cpu" else f"gpu {device}"


def _network(order: Order) -> Answer:
    world = order.world
    assert world is not None
    own = world.places[world.first_rank]
    count = world.places.count(own)
    devices = [order.devices[index % len(order.devices)] for index in range(count)]  # several processes on the CPU of a single node
    orders = [
        {
            "device": device,
            "label": label_of(device),
            "rank": world.first_rank + index,
            "join_s": _START_S,
            "order": order.model_dump(mode="json"),
        }
        for index, device in enumerate(devices)
    ]
    found = _together("pipeline.preflight_network", orders, order)
    if count <= len(order.devices):
        return found
    return Answer(measurements=found.measurements[: len(found.measurements) // count])  # all of one CPU: the others say the same


def _together(module: str, orders: list[dict[str, Any]], order: Order) -> Answer:
    """A process for each, all at the same time: that is how a node's devices share its power and its links when they work."""

    def one(data: dict[str, Any]) -> Answer:
        found = run_child(module, data, environment=_own_cores(order, data["device"]), say=lambda _: None, limit_s=limit_s(order.seconds))
        return Answer.model_validate(found)

    with ThreadPoolExecutor(len(orders)) as pool:
        answers = _all([pool.submit(one, data).result for data in orders])
    measured = tuple(found for answer in answers for found in answer.measurements)
    return Answer(measurements=measured, left_out=tuple(dict.fromkeys(text for answer in answers for text in answer.left_out)))


def _all(results: list[Callable[[], Answer]]) -> list[Answer]:
    """Of every process, or JobError with what each of those said that failed."""
    found, failed = [], []
    for result in results:
        try:
            found.append(result())
        except JobError as error:
            failed.append(str(error))
    if failed:
        raise JobError("; ".join(dict.fromkeys(failed)))
    return found


def _own_cores(order: Order, device: str) -> dict[str, str]:
    """A replica's process may be told of a few cores and one GPU; measurements are the node's."""
    threads = str(max(1, len(order.core_ids))) if order.core_ids else str(os.cpu_count() or 1)
    chosen = {"OMP_NUM_THREADS": threads, "OMP_PROC_BIND": "false"}
    return chosen if device == "cpu" else {**chosen, "CUDA_VISIBLE_DEVICES": device}


def _storage(order: Order) -> Answer:
    mark = f".tokenmill-preflight-{uuid.uuid4().hex}"
    store = storage.join(storage.absolute(order.output), mark) if order.output else None
    disk = Path(storage.absolute(order.disk or tempfile.gettempdir()), mark)
    if not disk.parent.is_dir():
        raise JobError(f"--disk: there is no folder {disk.parent} on this node")
    made = missing_folders(store) if store else []
    data = {"store": store, "made": made, "disk": str(disk), "seconds": order.seconds}
    module = "pipeline.preflight_storage"
    try:
        found = run_child(module, data, environment={}, say=lambda _: None, limit_s=limit_s(order.seconds))
    except JobError as error:
        try:
            run_child(module, {**data, "clean": True}, environment={}, say=lambda _: None, limit_s=_CLEAN_S)
        except JobError as left:
            where = " and ".join(filter(None, (store, str(disk))))
            raise JobError(f"{error}; what was written to {where} may still be there, delete it yourself: {left}") from None
        raise
    return Answer.model_validate(found)


def _environment(pid: int) -> dict[str, str]:
    """Of another process of ours, when it was started."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return dict(os.environ)
    return dict(word.split("=", 1) for word in words if "=" in word)


def _cores(pid: int) -> tuple[int, ...] | None:
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except (OSError, AttributeError):
        return None
