"""The raw engine inside a worker of a running cluster: requests in, counts and seconds out, on the replica that units run on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from distributed import get_worker

from pipeline.engine.engine import Core
from pipeline.engine.engine import Request
from pipeline.trial_worker import drive

_FIRST_KEY = 1 << 40
"""Far from the keys that the engine's own rows have."""


def raw_task(requests: Sequence[Request]) -> dict[str, Any]:
    """The Dask task: the bare loop of a trial in this worker's engine; see pipeline.trial_worker.drive."""

    def work(core: Core) -> dict[str, Any]:
        return drive(
            core,
            requests,
            itertools.count(_FIRST_KEY),
            stop_after_s=None,
            tick_s=None,
            on_finished=lambda _: None,
            on_tick=lambda _: None,
            asked_to_stop=lambda: False,
        )

    result: dict[str, Any] = get_worker().replica.engine.borrow(work)
    return result
