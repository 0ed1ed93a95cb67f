"""What is multiplied, and who talks to whom."""

from __future__ import annotations

import pytest

from pipeline.preflight_shapes import attentions
from pipeline.preflight_shapes import layer_gemms
from pipeline.preflight_shapes import part_of
from pipeline.preflight_shapes import partners
from pipeline.preflight_shapes import rounds
from pipeline.shape import known_shape


def test_the_gemms_are_those_of_the_models_own_layers() -> None:
    shape = known_shape("llama-3.1-8b")
    found = {gemm.name: (gemm.rows, gemm.inner, gemm.columns) for gemm in layer_gemms(shape, prefill_rows=512, decode_rows=64)}
    assert found == {
        "q, k, v, prefill": (512, 4096, 6144),
        "o, prefill": (512, 4096, 4096),
        "gate, up, prefill": (512, 4096, 28672),
        "down, prefill": (512, 14336, 4096),
        "q, k, v, decode": (64, 4096, 6144),
        "o, decode": (64, 4096, 4096),
        "gate, up, decode": (64, 4096, 28672),
        "down, decode": (64, 14336, 4096),
        "output layer": (64, 4096, 128256),
    }


def test_devices_of_a_replica_share_every_matrix() -> None:
    shape = known_shape("llama-3.1-70b")
    whole, part = ({gemm.name: gemm for gemm in layer_gemms(one, prefill_rows=512, decode_rows=64)} for one in (shape, part_of(shape, 4)))
    assert {name: gemm.flops / part[name].flops for name, gemm in whole.items()} == dict.fromkeys(whole, 4)
    assert (part["o, decode"].inner, part["o, decode"].columns) == (2048, 8192)
    assert part_of(shape, 16).kv_heads == 1  # each is computed twice


def test_they_hold_every_weight_of_a_layer_once() -> None:
    shape = known_shape("llama-2-70b")
    prefill = [gemm for gemm in layer_gemms(shape, prefill_rows=1, decode_rows=1) if "prefill" in gemm.name]
    assert shape.layers * sum(gemm.columns * gemm.inner for gemm in prefill) == shape.layer_weights
    assert sum(gemm.flops for gemm in prefill) * shape.layers == 2 * shape.layer_weights


def test_attention_counts_half_of_the_square_where_it_is_causal() -> None:
    prefill, decode = attentions(known_shape("llama-3.1-8b"), on_gpu=True, decode_rows=256)
    assert prefill.flops == 2 * 32 * 4096**2 * 128
    assert decode.flops == 4 * 256 * 32 * 1024 * 128
    assert decode.kv_values == 2 * 256 * 8 * 1024 * 128


@pytest.mark.parametrize("num_places", range(2, 9))
def test_in_every_round_everybody_has_one_partner_at_most_and_in_the_end_everybody_has_met(num_places: int) -> None:
    found = rounds(num_places, most=99)
    for pairs in found:
        talking = [place for pair in pairs for place in pair]
        assert len(talking) == len(set(talking)) == num_places // 2 * 2
    met = {frozenset(pair) for pairs in found for pair in pairs}
    assert len(met) == num_places * (num_places - 1) // 2
    assert len(rounds(num_places, most=1)) == 1


def test_nobody_talks_where_nobody_else_is() -> None:
    assert rounds(1, most=4) == []
    assert partners([0], 0, most=4) == []


@pytest.mark.parametrize(
    "places", [[0, 0], [0, 1], [0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1, 2, 2], [0, 0, 1], [0] * 8 + [1] * 8]
)
def test_partners_agree_and_are_of_another_node_where_there_is_one(places: list[int]) -> None:
    by_rank = [partners(places, rank, most=4) for rank in range(len(places))]
    assert len({len(found) for found in by_rank}) == 1
    for rank, found in enumerate(by_rank):
        for number, other in enumerate(found):
            if other is not None:
                assert by_rank[other][number] == rank
                assert places[other] != places[rank] or len(set(places)) == 1
    assert any(other is not None for found in by_rank for other in found)
