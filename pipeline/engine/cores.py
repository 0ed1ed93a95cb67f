"""An engine's kind and options in, what starts its Core out. Loads a kind's packages only when it is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.engine.engine import Core
from pipeline.model import Model
from schemas.job import SimulatedOptions

PLACE = ("node_rank", "master_addr", "master_port")
"""Engine options that say where a node stands in its group; see pipeline/group.py."""


def core_maker(model: Model, kind: str, options: dict[str, Any]) -> Callable[[], Core]:
    """Starts one engine; to be called by the thread that will own it."""
    if kind == "simulated":
        from pipeline.engine.simulated import SimulatedCore

        chosen = SimulatedOptions.model_validate({name: value for name, value in options.items() if name not in PLACE})
        return lambda: SimulatedCore(chosen, vocab_size=model.vocab_size, max_model_len=model.max_position_embeddings)

    def make() -> Core:
        from pipeline.engine.vllm import VllmCore  # imports vllm: 10 to 20 s

        return VllmCore(model_path=model.path, options=options)

    return make


def follower(model: Model, kind: str, options: dict[str, Any]) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Holds this node's part of an engine that another node drives: says what it is when it is there, returns when its part died."""
    if kind == "simulated":
        from pipeline.engine.simulated import follow as pretend

        return pretend

    def hold(ready: Callable[[dict[str, Any]], None]) -> None:
        from pipeline.engine.vllm import follow

        follow(model_path=model.path, options=options, ready=ready)

    return hold
