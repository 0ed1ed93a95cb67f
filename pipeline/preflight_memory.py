"""How fast one device's memory is: copy and triad. torch; a process of its own (see pipeline.child)."""

from __future__ import annotations

from typing import Any

from pipeline.child import Say
from pipeline.child import serve
from pipeline.preflight_device import COPY_BYTES
from pipeline.preflight_device import GB
from pipeline.preflight_device import copy_bytes_per_s
from pipeline.preflight_device import free_bytes
from pipeline.preflight_device import take_device
from pipeline.preflight_device import triad_bytes_per_s
from schemas.preflight import Answer
from schemas.preflight import Measurement
from schemas.preflight import Order


def main(data: dict[str, Any], _: Say) -> dict[str, Any]:
    """The ceiling is the better of two plain copies, one before and one after the triad."""
    order = Order.model_validate(data["order"])
    device = take_device(data["device"], order.core_ids)
    num_bytes = min(COPY_BYTES, free_bytes(device) // 3)
    slice_s = order.seconds / 3
    copy = copy_bytes_per_s(device, num_bytes, budget_s=slice_s) / GB
    triad = triad_bytes_per_s(device, num_bytes, budget_s=slice_s) / GB
    copy = max(copy, copy_bytes_per_s(device, num_bytes, budget_s=slice_s) / GB)
    common = {"pillar": "memory", "group": "memory", "device": data["label"], "unit": "GB/s", "ceiling": copy, "rate": "memory"}
    measured = [
        Measurement.model_validate({**common, "name": name, "value": value, "detail": f"{num_bytes >> 20} MiB buffers, read and written"})
        for name, value in (("memory copy", copy), ("memory triad", triad))
    ]
    return Answer(measurements=tuple(measured)).model_dump(mode="json")


if __name__ == "__main__":
    serve(main)
