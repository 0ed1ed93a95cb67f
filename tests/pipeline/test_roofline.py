"""The throughput model's arithmetic: what fits, what bounds, which way each number pulls."""

from __future__ import annotations

import pytest

from pipeline.hardware import load_device
from pipeline.roofline import Speed
from pipeline.roofline import Work
from pipeline.roofline import devices_needed
from pipeline.roofline import predict
from pipeline.shape import known_shape
from schemas.hardware import Precision

MLPERF = Work(prompt_tokens=230, output_tokens=285)


def speed(model: str, device: str, precision: Precision, work: Work = MLPERF, **values: object) -> Speed:
    options = {"kv_width_bytes": 1, "max_num_seqs": 2048, "most_devices": 8, **values}
    found = predict(known_shape(model), load_device(device), work, precision=precision, **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_fewest_devices_that_hold_weights_and_a_batch() -> None:
    sizes = {"weight_bytes": 70e9, "kv_bytes_per_token": 163_840, "live_tokens": 400, "most": 8}
    assert devices_needed(memory_bytes=80e9, **sizes) == 2
    assert devices_needed(memory_bytes=141e9, **sizes) == 1
    assert devices_needed(memory_bytes=10e9, **sizes) is None


def test_where_only_all_devices_hold_a_few_rows_all_are_taken() -> None:
    assert devices_needed(weight_bytes=410e9, kv_bytes_per_token=258_048, live_tokens=9770, memory_bytes=80e9, most=8) == 8


@pytest.mark.parametrize(
    ("model", "device", "precision", "devices"),
    [
        ("llama-2-70b", "h100-80", "fp8", 2),
        ("llama-2-70b", "h200-141", "fp8", 1),
        ("llama-2-70b", "gb300", "nvfp4", 1),
        ("llama-3.1-8b", "a100-40", "bf16", 1),
        ("llama-3.1-405b", "h100-80", "fp8", 8),
        ("llama-3.1-405b", "gb200", "nvfp4", 2),
        ("llama-3.1-405b", "gb300", "nvfp4", 1),
    ],
)
def test_replicas_are_as_small_as_the_records(model: str, device: str, precision: Precision, devices: int) -> None:
    assert speed(model, device, precision).devices == devices


def test_a_model_that_no_node_holds_has_no_speed() -> None:
    shape, device = known_shape("llama-3.1-405b"), load_device("h100-80")
    assert predict(shape, device, MLPERF, precision="bf16", kv_width_bytes=1, max_num_seqs=256, most_devices=8) is None


def test_a_precision_that_the_device_lacks_is_an_error() -> None:
    with pytest.raises(KeyError):
        speed("llama-3.1-8b", "a100-80", "nvfp4")


def test_times_add_up_to_the_rate() -> None:
    found = speed("llama-2-70b", "gb300", "nvfp4")
    assert found.output_tokens_per_s == pytest.approx(found.batch / sum(found.seconds_per_step.values()))
    assert found.prompt_tokens_per_s == pytest.approx(found.output_tokens_per_s * 230 / 285)
    assert min(found.seconds_per_step.values()) >= 0
    assert found.seconds_per_step["links"] == 0


def test_a_small_batch_is_bound_by_reading_the_weights() -> None:
    few, many = (speed("llama-2-70b", "h200-141", "fp8", max_num_seqs=batch) for batch in (4, 8))
    assert few.seconds_per_step["gemm"] == many.seconds_per_step["gemm"]
    assert many.output_tokens_per_s > 1.8 * few.output_tokens_per_s


def test_longer_prompts_cost_prefill_and_room() -> None:
    short = speed("llama-3.1-8b", "h100-80", "fp8", Work(prompt_tokens=100, output_tokens=128))
    long = speed("llama-3.1-8b", "h100-80", "fp8", Work(prompt_tokens=4000, output_tokens=128))
    assert long.batch < short.batch
    assert long.output_tokens_per_s < short.output_tokens_per_s / 5


def test_vllm_is_slower_than_the_submissions_of_the_makers() -> None:
    assert (
        speed("llama-2-70b", "h200-141", "fp8", vllm=False).output_tokens_per_s
        > speed("llama-2-70b", "h200-141", "fp8").output_tokens_per_s
    )
