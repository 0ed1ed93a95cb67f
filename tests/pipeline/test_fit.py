"""How many GPUs hold a replica, and how long a row may be in it; in round numbers, so that they can be checked by head."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.fit import LONGEST_ROW
from pipeline.fit import Span
from pipeline.fit import asked_span
from pipeline.fit import kv_width_bytes
from pipeline.fit import longest_row
from pipeline.fit import span_of
from pipeline.roofline import OVERHEAD_BYTES
from schemas.errors import JobError

GB = 10**9
MEMORY = 100 * GB
ROOM = 0.92 * MEMORY - OVERHEAD_BYTES


def devices(weights: float, *, most: int = 8, memory: float = MEMORY, **options: Any) -> int | None:
    """With 100 kB of keys and values a token: 64 rows of 1,024 tokens are 6.6 GB."""
    span = span_of(options, weight_bytes=weights, kv_bytes_per_token=1e5, memory_bytes=memory, most=most, context=131_072)
    return span.devices if span is not None and span.nodes == 1 else None


def longest(weights: float, *, width: int = 1, memory: float = MEMORY, **options: Any) -> int | None:
    return longest_row(options, span=Span(devices=width), weight_bytes=weights, kv_bytes_per_token=1e5, memory_bytes=memory)


def test_the_fewest_devices_that_hold_weights_and_a_batch_are_taken() -> None:
    assert [devices(weights * GB) for weights in (10, 79, 80, 165, 170, 600)] == [1, 1, 2, 2, 4, 8]
    assert devices(700 * GB) is None


def test_a_model_that_no_node_holds_is_split_over_as_few_whole_nodes_as_do() -> None:
    def span(weights: float, most: int = 8) -> Span | None:
        return span_of({}, weight_bytes=weights * GB, kv_bytes_per_token=1e5, memory_bytes=MEMORY, most=most, context=131_072)

    assert [span(weights) for weights in (700, 1400, 2100)] == [Span(nodes=nodes, devices=8) for nodes in (2, 3, 4)]
    assert span(700, most=1) == Span(nodes=9, devices=1)
    assert span(20_000) is None
    assert Span(nodes=2, devices=8).all_devices == 16


def test_whoever_asks_for_stages_and_nodes_gets_them_if_they_divide() -> None:
    assert asked_span({"nnodes": 2, "pipeline_parallel_size": 2, "tensor_parallel_size": 8}) == Span(nodes=2, devices=8)
    assert asked_span({"pipeline_parallel_size": 2}) == Span(nodes=1, devices=2)
    with pytest.raises(JobError, match=r"engine\.options\.nnodes: found 3, expected a divisor of the replica's 4 devices"):
        asked_span({"nnodes": 3, "pipeline_parallel_size": 2, "tensor_parallel_size": 2})


def test_a_shorter_context_needs_less_room_for_a_batch() -> None:
    assert devices(82 * GB, max_model_len=128) == 1


def test_a_smaller_share_of_the_memory_needs_more_devices() -> None:
    assert devices(60 * GB) == 1
    assert devices(60 * GB, gpu_memory_utilization=0.5) == 2


def test_whoever_asks_for_a_width_gets_it() -> None:
    assert devices(10 * GB, tensor_parallel_size=4) == 4
    with pytest.raises(JobError, match=r"engine\.options\.tensor_parallel_size: found 'four'"):
        devices(10 * GB, tensor_parallel_size="four")


def test_where_nobody_knows_the_memory_one_device_is_taken_and_no_row_too_long() -> None:
    assert devices(700 * GB, memory=0) == 1
    assert longest(700 * GB, memory=0) is None


def test_the_longest_row_fills_what_the_weights_leave_but_for_a_twentieth() -> None:
    tokens = longest(66 * GB)
    assert tokens is not None
    assert 0 <= (ROOM - 66 * GB) / (LONGEST_ROW * 1e5) - tokens < 256
    assert tokens % 256 == 0


def test_a_wider_replica_holds_longer_rows_and_one_that_is_full_none() -> None:
    assert (longest(66 * GB, width=2) or 0) > 4 * (longest(66 * GB) or 0)
    assert longest(90 * GB) is None


def test_a_cache_of_the_users_own_size_bounds_the_row() -> None:
    assert longest(66 * GB, width=2, memory=0, kv_cache_memory_bytes=GB) == int(2e9 / 1.05e5) // 256 * 256


@pytest.mark.parametrize(
    ("options", "dtype", "width"),
    [({}, "bfloat16", 2), ({}, "float32", 4), ({}, "auto", 2), ({"kv_cache_dtype": "fp8_e4m3"}, "bfloat16", 1)],
)
def test_a_numbers_width_in_the_cache_goes_by_its_type(options: dict[str, Any], dtype: str, width: int) -> None:
    assert kv_width_bytes(options, dtype) == width
