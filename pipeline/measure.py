"""An engine's plan, prompts and references in; how likely it finds each reference, and what it generates itself, out.

A process of its own around one vLLM engine (see pipeline.child), so that what is judged is what a job will compute. Knows neither texts
nor tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

from pipeline.child import Say
from pipeline.child import run_child
from pipeline.child import serve
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.profile import ReplicaPlan
from pipeline.worker import ENVIRONMENT
from schemas.sampling import Sampling

_BATCH_TOKENS = 1024
"""Prompt tokens of one step: each has a float32 row of logits as wide as the vocabulary, several times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What an engine said to each row, in order."""

    logprobs: list[float]
    """Sum over the reference's tokens, each after the prompt and the tokens before it."""
    completions: list[list[int]]
    """Greedy, token ids."""
    dtype: str
    engine: str


def measure(model: Model, plan: ReplicaPlan, rows: Sequence[tuple[list[int], list[int]]], *, max_tokens: int, say: Say) -> Measured:
    """Rows are (prompt, reference) in token ids. Raises JobError."""
    order = {"model": asdict(model), "options": {**plan.options, "max_num_batched_tokens": _BATCH_TOKENS}}
    return Measured(
        **run_child(
            "pipeline.measure",
            {**order, "rows": list(rows), "max_tokens": max_tokens},
            environment={**ENVIRONMENT, **plan.environment_of(0)},
            say=say,
        )
    )


def _main(order: dict[str, Any], say: Say) -> dict[str, Any]:
    from pipeline.engine.vllm import VllmCore
    from pipeline.trial_worker import drive

    rows: list[tuple[list[int], list[int]]] = [(prompt, reference) for prompt, reference in order["rows"]]
    say("starting the engine")
    core = VllmCore(model_path=order["model"]["path"], options=order["options"])
    say(f"asking how likely {len(rows)} references are")
    logprobs = core.reference_logprobs(rows)
    say(f"generating {len(rows)} completions")
    sampling = Sampling(max_tokens=order["max_tokens"], temperature=0)
    requests = [Request(position=index, token_ids=prompt, sampling=sampling) for index, (prompt, _) in enumerate(rows)]
    done: dict[int, list[int]] = {}

    def take(finished: list[Generation]) -> None:
        done.update({generation.position: generation.choices[0].token_ids for generation in finished})

    drive(
        core, requests, itertools.count(), stop_after_s=None, tick_s=None, on_finished=take, on_tick=lambda _: None,
        asked_to_stop=lambda: False,
    )  # fmt: skip
    return {
        "logprobs": logprobs,
        "completions": [done[index] for index in range(len(rows))],
        "dtype": core.info.dtype,
        "engine": core.info.version,
    }


if __name__ == "__main__":
    serve(_main)
