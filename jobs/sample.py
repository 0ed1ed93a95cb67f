"""Rows of a job's table for trials: read from all over it, rendered as a run would, generated to known lengths. Starts no engine."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import pyarrow as pa

from jobs.plan import make_plan
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.prompts import check_columns
from pipeline.prompts import read_prompts
from pipeline.read import read_unit
from pipeline.render import Renderer
from pipeline.render import Text
from pipeline.render import load_tokenizer
from schemas.job import JobSpec
from schemas.prompts import Prompt
from schemas.prompts import RowError
from schemas.unit import WorkUnit

_PLACES = 32
"""In the table, evenly over its rows, at which a sample is taken."""
_READ_ROWS = 4096
"""Of each unit that is looked into."""
_BATCH_ROWS = 128
_WARM_TOKENS = 4

Item = TypeVar("Item")


def read_sample(job: JobSpec, model: Model, rows: int, *, max_model_len: int, seed_base: str = "tune") -> list[Request]:
    """Rows from all over the table, rendered as a run would; those that cannot be asked are left out. The same for the same table.

    Drawn rows have the seeds of a run where `seed_base` is the job's fingerprint.
    """
    return [request for request, _ in read_sampled(job, model, rows, max_model_len=max_model_len, seed_base=seed_base)]


def read_sampled(
    job: JobSpec,
    model: Model,
    rows: int,
    *,
    max_model_len: int,
    seed_base: str,
) -> list[tuple[Request, Text]]:
    """Those rows, each with the text that was tokenised."""
    looked_at = look_at(job, model, rows, max_model_len=max_model_len, seed_base=seed_base)
    return [row for row in looked_at if row][:rows]


def look_at(
    job: JobSpec,
    model: Model,
    rows: int,
    *,
    max_model_len: int,
    seed_base: str,
    planned: tuple[Sequence[WorkUnit], pa.Schema] | None = None,
) -> list[tuple[Request, Text] | None]:
    """At least so many rows where there are as many, with None for each that cannot be asked.

    Of the `planned` units alone, read by that schema, where there are some. Any beginning of them is a sample itself.
    """
    if planned is None:
        plan, schema = make_plan(job)
        planned = plan.units, schema
    all_units, schema = planned
    check_columns(schema, job.input)
    renderer = Renderer(load_tokenizer(model.path), job, max_model_len=max_model_len, seed_base=seed_base)
    sampled: list[tuple[int, tuple[Request, Text] | None]] = []
    for unit, places in _places(all_units, _PLACES):
        prompts: list[tuple[int, Prompt | RowError]] = []
        for position, batch in read_unit(unit, schema, _BATCH_ROWS):
            prompts += enumerate(read_prompts(batch, position, job), start=position)
            if len(prompts) >= _READ_ROWS:
                break
        chosen = evenly(prompts, -(-rows * places // _PLACES))
        for (position, prompt), item in zip(chosen, renderer.render([prompt for _, prompt in chosen]), strict=True):
            text = renderer.text(prompt) if isinstance(prompt, Prompt) else prompt
            asked = (item, text) if isinstance(item, Request) and not isinstance(text, RowError) else None
            sampled.append((position, asked))
    sampled.sort(key=lambda one: hashlib.blake2b(str(one[0]).encode(), digest_size=8).digest())
    return [row for _, row in sampled]


def longest_of(requests: Sequence[Request]) -> int:
    """Tokens of the longest prompt with all that may follow it."""
    return max(len(request.token_ids) + request.sampling.max_tokens for request in requests)


def fixed(sample: Sequence[Request], lengths: Mapping[int, int]) -> list[Request]:
    """The rows whose lengths are known, each to be generated to just that length: every trial does the same work.

    Longest first, as a run does, so that no trial's time is that of a single late row. What ends or steers a row early is dropped.
    """
    requests = [
        replace(
            request,
            sampling=request.sampling.model_copy(
                update={
                    "max_tokens": lengths[request.position], "ignore_eos": True, "min_tokens": 0, "stop": [], "stop_token_ids": [],
                    "structured_outputs": None,
                }
            ),
        )
        for request in sample
        if request.position in lengths
    ]  # fmt: skip
    return sorted(requests, key=lambda request: (-request.sampling.max_tokens, request.position))


def warm(requests: Sequence[Request]) -> list[Request]:
    """Few tokens of prompts that no row has, so that no cache knows a row's."""
    return [
        replace(
            request,
            token_ids=request.token_ids[::-1],
            sampling=request.sampling.model_copy(update={"max_tokens": min(_WARM_TOKENS, request.sampling.max_tokens)}),
        )
        for request in requests
    ]


def _places(units: Sequence[WorkUnit], count: int) -> list[tuple[WorkUnit, int]]:
    """The units in which so many places lie, evenly over the rows, and how many lie in each: units get smaller towards the table's end."""
    ends = list(accumulate(unit.num_rows for unit in units))
    if not ends or not ends[-1]:
        return []
    found = Counter(bisect_right(ends, (2 * place + 1) * ends[-1] // (2 * count)) for place in range(count))
    return [(units[index], places) for index, places in sorted(found.items())]


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them at most, from all over."""
    return list(items) if len(items) <= count else [items[index * len(items) // count] for index in range(count)]
