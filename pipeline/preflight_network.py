"""How fast processes talk: all-reduce by message size, then pairs of nodes. torch.distributed, gloo on CPUs and NCCL on GPUs.

One of these processes runs for each device of each node, all at the same time; they meet at the first one's port. Nothing is encrypted
here, whatever the cluster's keys: what travels are ones and zeros, and no message is ever unpickled.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from pipeline.child import Say
from pipeline.child import serve
from pipeline.interface import interface_of
from pipeline.preflight_device import GB
from pipeline.preflight_device import free_bytes
from pipeline.preflight_device import take_device
from pipeline.preflight_device import wait_for
from pipeline.preflight_shapes import partners
from schemas.preflight import Answer
from schemas.preflight import Measurement
from schemas.preflight import Order
from schemas.preflight import World

_SIZES = {"cpu": (64 << 10, 1 << 20, 16 << 20), "cuda": (1 << 20, 32 << 20, 512 << 20)}
_PAIR_SIZES = {"cpu": (64 << 10, 1 << 20, 16 << 20), "cuda": (1 << 20, 32 << 20, 256 << 20)}
_MAX_ROUNDS = 4
"""Of pairs: a node that is slow with all of four partners is slow itself."""
_MAX_CALLS = 200


def main(data: dict[str, Any], _: Say) -> dict[str, Any]:
    order, rank = Order.model_validate(data["order"]), int(data["rank"])
    assert order.world is not None
    device = take_device(data["device"], order.core_ids)
    world = order.world
    interface = interface_of(world.own_address)
    if interface is not None:  # else they take what the host's name resolves to, often an address that no other node reaches
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    distributed.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        init_method=f"tcp://{world.address}:{world.port}",
        rank=rank,
        world_size=world.size,
        timeout=timedelta(seconds=data["join_s"]),
    )
    try:
        free = _least_free_bytes(device)
        measured = [*_all_reduces(order, world, device, data["label"], free), *_pairs(order, world, rank, device, data["label"], free)]
    finally:
        distributed.destroy_process_group()
    return Answer(measurements=tuple(measured)).model_dump(mode="json")


def _least_free_bytes(device: torch.device) -> int:
    """Of all processes' devices: they must choose the same sizes, or they wait for each other for ever."""
    free = torch.tensor([free_bytes(device)], device=device, dtype=torch.int64)
    distributed.all_reduce(free, op=distributed.ReduceOp.MIN)
    return int(free.item())


def _all_reduces(order: Order, world: World, device: torch.device, label: str, free: int) -> list[Measurement]:
    """Bus bandwidth, as NCCL's tests define it: 2 (n-1)/n of the message's bytes, divided by the time. Of one GPU alone there is none."""
    sizes = [size for size in _SIZES[device.type] if size <= free]
    if world.size < 2 or not sizes:
        return []
    slice_s = order.seconds / 2 / len(sizes)
    measured = []
    for size in sizes:
        tensor = torch.ones(size // 4, device=device)
        seconds = _agreed_seconds(lambda tensor=tensor: distributed.all_reduce(tensor.fill_(1.0)), device, slice_s)
        rate = 2 * (world.size - 1) / world.size * size / seconds / GB
        measured.append(
            Measurement(
                pillar="network", group="all-reduce", name=f"all-reduce {_size(size)}", device=label, value=rate, unit="GB/s",
                rate="all-reduce" if size == sizes[-1] else None,
                detail=f"bus bandwidth, {world.size} processes on {len(set(world.places))} nodes, {seconds * 1e3:,.2f} ms",
            )
        )  # fmt: skip
    return measured


def _agreed_seconds(call: Any, device: torch.device, slice_s: float) -> float:
    """Of one call of all processes together, the slowest one's; how many calls are made the first process decides."""
    wait = wait_for(device)
    call()
    wait()
    began = time.perf_counter()
    call()
    wait()
    calls = torch.tensor([min(_MAX_CALLS, max(1, int(slice_s / max(time.perf_counter() - began, 1e-6))))], device=device)
    distributed.broadcast(calls, 0)
    began = time.perf_counter()
    for _ in range(int(calls.item())):
        call()
    wait()
    seconds = torch.tensor([(time.perf_counter() - began) / int(calls.item())], device=device, dtype=torch.float64)
    distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
    return float(seconds.item())


def _pairs(order: Order, world: World, rank: int, device: torch.device, label: str, free: int) -> list[Measurement]:
    """To and from one partner at a time, in both directions at once; bytes of one direction count, and the best partner."""
    others = partners(world.places, rank, most=_MAX_ROUNDS)
    if not others:
        return []
    across = len(set(world.places)) > 1
    group = "node to node" if across else "process to process"
    sizes = [size for size in _PAIR_SIZES[device.type] if 2 * size <= free]
    measured = []
    for size in sizes:
        sent, received = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
        rates: dict[int, float] = {}
        for other in others:
            seconds = _pair_seconds(sent, received, other, device, order.seconds / 2 / len(sizes) / len(others))
            if other is not None:
                rates[other] = size / seconds / GB
        if rates:
            whom = ", ".join(f"{rate:.2f} with process {other}" for other, rate in rates.items())
            measured.append(
                Measurement(
                    pillar="network", group=group, name=f"{group} {_size(size)}", device=label, value=max(rates.values()), unit="GB/s",
                    rate="link" if across and size == sizes[-1] else None, detail=f"each way at once; {whom}",
                )
            )  # fmt: skip
    return measured


def _pair_seconds(sent: torch.Tensor, received: torch.Tensor, other: int | None, device: torch.device, slice_s: float) -> float:
    """Everybody makes as many exchanges as the slowest pair has time for, so that all are there for the next round."""

    def exchange() -> None:
        if other is not None:
            ops = [distributed.P2POp(distributed.isend, sent, other), distributed.P2POp(distributed.irecv, received, other)]
            for work in distributed.batch_isend_irecv(ops):
                work.wait()
        wait_for(device)()

    exchange()
    began = time.perf_counter()
    exchange()
    calls = torch.tensor([min(_MAX_CALLS, max(1, int(slice_s / max(time.perf_counter() - began, 1e-6))))], device=device)
    distributed.all_reduce(calls, op=distributed.ReduceOp.MIN)
    began = time.perf_counter()
    for _ in range(int(calls.item())):
        exchange()
    return (time.perf_counter() - began) / int(calls.item())


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


if __name__ == "__main__":
    serve(main)
