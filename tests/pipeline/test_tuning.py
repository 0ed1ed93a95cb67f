"""The search over engine settings. Values in, values out; the machines' speeds are functions of a setting."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.model import Model
from pipeline.profile import Machine
from pipeline.profile import load_profile
from pipeline.tuning import Outcome
from pipeline.tuning import Setting
from pipeline.tuning import Space
from pipeline.tuning import Step
from pipeline.tuning import agreement
from pipeline.tuning import best_of
from pipeline.tuning import engine_defaults
from pipeline.tuning import expected_s
from pipeline.tuning import goes_on
from pipeline.tuning import next_trial
from pipeline.tuning import parse_key
from pipeline.tuning import plan_of
from pipeline.tuning import profile_of
from pipeline.tuning import shared_share
from pipeline.tuning import sooner_of
from pipeline.tuning import space_for

GB = 10**9
MODEL = Model(
    path="/m", weights_digest="plain", tokenizer_digest="t", template_digest="", weights_bytes=GB, max_position_embeddings=2048,
    vocab_size=32_000, kv_values_per_token=10_000,
)  # fmt: skip
INT8 = replace(MODEL, path="/int8", weights_digest="int8", weights_bytes=GB // 2)
LLAMA_70B = replace(MODEL, weights_digest="70b", weights_bytes=141 * GB, max_position_embeddings=131_072, kv_values_per_token=163_840)
LLAMA_70B_FP8 = replace(LLAMA_70B, path="/fp8", weights_digest="70b-fp8", weights_bytes=72 * GB)
LLAMA_70B_FP4 = replace(LLAMA_70B, path="/fp4", weights_digest="70b-fp4", weights_bytes=42 * GB)
CPU = Machine(cores=2, memory_bytes=24 * GB, cpu_flags=frozenset({"sse2", "avx512_bf16"}), libraries={"iomp": "/lib/iomp"})
H100 = Machine(cores=96, memory_bytes=1900 * GB, num_gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_bytes=81_559 << 20)
GB200 = Machine(cores=144, memory_bytes=900 * GB, num_gpus=4, gpu_name="NVIDIA GB200", gpu_memory_bytes=189_471 << 20)
FOREVER = 1e9


def space(machine: Machine = CPU, *models: Model, **values: Any) -> Space:
    base = load_profile("auto", machine)
    return space_for(machine, base, models or (MODEL,), **{"options": {}, "rows": 512, "tokens_per_row": 1024, **values})


def search(where: Space, speed: Callable[[Setting], float], *, left_s: float = FOREVER) -> tuple[Step, dict[str, Outcome]]:
    """Every trial of a search on a machine with such speeds; 0 stands for an engine that does not come up."""
    outcomes: dict[str, Outcome] = {}
    while (step := next_trial(where, outcomes, left_s=left_s)).next is not None:
        rate = speed(step.next)
        state = "done" if rate else "failed"
        outcomes[step.next.key] = Outcome(state=state, output_tokens_per_s=rate, start_s=20.0 * step.next.replicas, run_s=10.0)  # type: ignore[arg-type]
    return step, outcomes


def cpu_speed(setting: Setting) -> float:
    """INT8 likes float32, plain weights bfloat16; two replicas, batches of 64 and libiomp are better."""
    if setting.defaults:
        return 100.0
    dtype = {"plain": {"bfloat16": 300.0, "float32": 200.0}, "int8": {"bfloat16": 310.0, "float32": 500.0}}[setting.model][
        setting.get("dtype")
    ]
    batch = {16: 0.7, 32: 0.9, 64: 1.1, 128: 1.0, 256: 0.95, 512: 0.9}[setting.get("max_num_seqs")]
    return dtype * batch * (1.2 if setting.replicas == 2 else 1.0) * (1.15 if setting.preload == ("iomp",) else 1.0)


def test_the_search_begins_with_what_a_run_takes_now_and_then_the_engines_own_defaults() -> None:
    where = space()
    first = next_trial(where, {}, left_s=FOREVER).next
    assert first == where.start
    second = next_trial(where, {where.start.key: Outcome(state="done", output_tokens_per_s=1.0)}, left_s=FOREVER).next
    assert second == engine_defaults(where)


def test_the_search_finds_the_best_setting_of_a_machine_whose_dimensions_do_not_hinder_each_other() -> None:
    step, _ = search(space(CPU, MODEL, INT8), cpu_speed)
    best = step.best
    assert (best.model, best.get("dtype"), best.replicas, best.get("max_num_seqs"), best.preload) == ("int8", "float32", 2, 64, ("iomp",))


def test_replicas_are_tried_again_with_weights_that_proved_quicker() -> None:
    def speed(setting: Setting) -> float:
        return cpu_speed(setting) * (0.5 if setting.replicas == 2 and setting.model == "plain" else 1.0)

    step, _ = search(space(CPU, MODEL, INT8), speed)
    assert (step.best.model, step.best.replicas) == ("int8", 2)


def test_it_needs_few_trials() -> None:
    _, outcomes = search(space(CPU, MODEL, INT8), cpu_speed)
    assert len(outcomes) <= 19


def test_a_search_goes_on_where_it_was_stopped() -> None:
    where = space(CPU, MODEL, INT8)
    step, outcomes = search(where, cpu_speed)
    keys = list(outcomes)
    for count in range(len(keys)):
        known = {key: outcomes[key] for key in keys[:count]}
        assert next_trial(where, known, left_s=FOREVER).next == parse_key(keys[count])
    assert next_trial(where, outcomes, left_s=FOREVER) == step


def test_who_must_keep_the_weights_gets_what_was_learnt_with_others() -> None:
    where = space(CPU, MODEL, INT8)
    _, outcomes = search(where, cpu_speed)
    own = best_of(outcomes, "plain")
    assert own is not None
    assert (own.get("dtype"), own.replicas, own.get("max_num_seqs"), own.preload) == ("bfloat16", 2, 64, ("iomp",))


def test_a_setting_that_does_not_start_is_a_result_and_not_the_end() -> None:
    step, outcomes = search(space(CPU, MODEL, INT8), lambda setting: 0.0 if setting.replicas == 2 else cpu_speed(setting))
    assert step.best.replicas == 1
    assert any(outcome.state == "failed" for outcome in outcomes.values())
    assert (step.best.model, step.best.get("max_num_seqs")) == ("int8", 64)


def test_noise_moves_nothing() -> None:
    where = space()
    step, _ = search(where, lambda setting: 100.0 + (zlib.crc32(setting.key.encode()) % 15) / 10)
    assert step.best == where.start


def test_where_no_time_is_left_nothing_but_what_all_is_compared_with_is_tried() -> None:
    step, outcomes = search(space(CPU, MODEL, INT8), cpu_speed, left_s=1.0)
    assert list(map(parse_key, outcomes)) == [space().start, engine_defaults(space())]
    assert step.skipped > 3


def test_a_setting_too_slow_for_the_time_left_gives_way_to_a_quicker_start() -> None:
    where = space()
    outcomes = {where.start.key: Outcome(state="done", output_tokens_per_s=100.0, start_s=20.0, run_s=10.0)}
    outcomes[engine_defaults(where).key] = Outcome(state="done", output_tokens_per_s=50.0, start_s=100.0, run_s=20.0)
    asked = []
    while (step := next_trial(where, outcomes, left_s=40.0)).next is not None:
        asked.append(step.next)
        outcomes[step.next.key] = Outcome(state="done", output_tokens_per_s=90.0, start_s=20.0, run_s=10.0)
    assert asked
    assert all(setting.get("enforce_eager") for setting in asked)


def test_a_setting_that_is_up_sooner_is_named_with_the_tokens_from_which_it_loses() -> None:
    start = space().start
    outcomes = {
        start.key: Outcome(state="done", output_tokens_per_s=100.0, start_s=20.0),
        start.but(enforce_eager=False).key: Outcome(state="done", output_tokens_per_s=200.0, start_s=80.0),
        start.but(max_num_seqs=8).key: Outcome(state="done", output_tokens_per_s=50.0, start_s=20.0),
        start.but(dtype="float64").key: Outcome(state="done", output_tokens_per_s=190.0, start_s=1.0),  # another output
        start.but(max_num_seqs=9).key: Outcome(state="stopped", output_tokens_per_s=150.0, start_s=1.0),
    }
    # 20 s and 10 ms a token are 80 s and 5 ms a token after 12,000 of them.
    assert sooner_of(outcomes, start.but(enforce_eager=False)) == [(start, 12_000)]
    nearly = start.but(enforce_eager=False, preload=("iomp",))
    outcomes[nearly.key] = Outcome(state="done", output_tokens_per_s=199.0, start_s=75.0)  # is ahead for 200,000 tokens, by 5 s at most
    assert sooner_of(outcomes, start.but(enforce_eager=False)) == [(start, 12_000)]
    assert sooner_of(outcomes, start) == []


def test_each_size_of_a_small_job_has_the_setting_that_is_done_first() -> None:
    start = space().start
    two, compiled = start.but(replicas=2), start.but(replicas=2, enforce_eager=False)
    outcomes = {  # as measured on two cores
        start.key: Outcome(state="done", output_tokens_per_s=719.4, start_s=16.7),
        two.key: Outcome(state="done", output_tokens_per_s=804.6, start_s=38.6),
        compiled.key: Outcome(state="done", output_tokens_per_s=894.9, start_s=70.7),
    }
    found = sooner_of(outcomes, compiled)
    assert [setting for setting, _ in found] == [start, two]

    def quickest(tokens: int) -> str:
        return min(outcomes, key=lambda key: outcomes[key].start_s + tokens / outcomes[key].output_tokens_per_s)

    for (setting, below), (after, _) in zip(found, [*found[1:], (compiled, 0)], strict=True):
        assert (quickest(below - 100), quickest(below + 100)) == (setting.key, after.key)


def test_the_expected_time_counts_starts_replicas_and_compiling() -> None:
    where = space()
    seen = {where.start.key: Outcome(state="done", output_tokens_per_s=100.0, start_s=20.0, run_s=8.0)}
    assert expected_s(where.start, seen) == pytest.approx(30.0)
    assert expected_s(where.start.but(replicas=2), seen) == pytest.approx(30.0)  # they start together
    assert expected_s(where.start.but(enforce_eager=False), seen) > 100


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([], True),
        ([(1.0, 100)], True),
        ([(2.0, 150), (4.1, 250)], True),
        ([(2.0, 150), (4.2, 250)], False),
        ([(4.2, 200)], False),
        ([(3.0, 250), (6.2, 500)], True),
        ([(3.0, 250), (6.3, 500)], False),
        ([(3.0, 250), (6.0, 500), (12.6, 990)], False),
        ([(3.0, 250), (6.0, 500), (12.6, 1000)], True),
    ],
)
def test_a_trial_ends_at_a_quarter_or_half_where_it_is_clearly_slower(curve: list[tuple[float, int]], expected: bool) -> None:
    best = [(2.5, 250), (5.0, 500), (10.0, 1000)]
    assert goes_on(curve, best, total_tokens=1000) is expected


def test_nothing_ends_a_trial_that_there_is_no_better_one_for() -> None:
    assert goes_on([(100.0, 1)], [], total_tokens=1000)


def test_keys_bring_their_settings_back() -> None:
    for setting in (
        space().start,
        engine_defaults(space()),
        space().start.but(preload=("a", "b"), environment={"B": "1", "A": "2"}, pin_cores=True, block_size=32),
    ):
        assert parse_key(setting.key) == setting


def test_what_the_user_says_is_not_varied() -> None:
    fixed = space(CPU, options={"dtype": "float16", "max_num_seqs": 7, "enforce_eager": True}, replicas=2)
    assert (fixed.dtypes, fixed.cuts, fixed.start.replicas) == ((), (), 2)
    assert "max_num_seqs" not in dict(fixed.ladders)
    assert all("enforce_eager" not in change for change in (*fixed.changes, *fixed.rest))
    _, outcomes = search(fixed, lambda setting: 100.0)
    for setting in map(parse_key, outcomes):
        plan = plan_of(setting, load_profile("auto", CPU), CPU, MODEL, {"dtype": "float16", "max_num_seqs": 7, "enforce_eager": True})
        if not setting.defaults:
            assert (plan.replicas, plan.options["dtype"], plan.options["max_num_seqs"]) == (2, "float16", 7)


def test_where_a_run_stands_is_a_rung_of_every_ladder_however_few_the_rows() -> None:
    few = space(CPU, rows=24)
    assert (few.start.get("max_num_seqs"), dict(few.ladders)["max_num_seqs"]) == (128, (16, 32, 64, 128))
    step, _ = search(few, cpu_speed)
    assert step.best.get("max_num_seqs") == 64


def test_options_of_a_profile_that_are_lists_are_kept_and_not_varied() -> None:
    base = load_profile("auto", CPU)
    base = base.model_copy(update={"options": {**base.options, "cudagraph_capture_sizes": [1, 2]}})
    where = space_for(CPU, base, (MODEL,), options={}, rows=512, tokens_per_row=1024)
    _, outcomes = search(where, cpu_speed)
    assert len(outcomes) > 3
    assert profile_of(where.start, base).options["cudagraph_capture_sizes"] == [1, 2]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_as_many_replicas_as_the_user_says_run_on_gpus_too(replicas: int) -> None:
    base = load_profile("auto", H100)
    where = space(H100, replace(LLAMA_70B, weights_bytes=16 * GB), replicas=replicas)
    plan = plan_of(where.start, base, H100, LLAMA_70B_FP4, {})
    assert (where.cuts, where.start.replicas, plan.replicas) == ((), replicas, replicas)


def test_a_dtype_without_arithmetic_of_its_own_is_not_tried() -> None:
    assert space().dtypes == ("float32", "bfloat16")
    assert space(replace(CPU, cpu_flags=frozenset({"sse2", "avx512_fp16"}))).dtypes == ("float16", "bfloat16", "float32")
    assert set(space(replace(CPU, cpu_flags=frozenset({"asimd"}))).dtypes) == {"float16", "bfloat16", "float32"}
    assert space(replace(CPU, cpu_flags=frozenset({"sse2", "avx512_fp16", "amx_bf16"}))).dtypes == ("bfloat16",)


def dtypes_tried(where: Space) -> set[Any]:
    _, outcomes = search(where, lambda setting: 100.0)
    return {setting.get("dtype") for setting in map(parse_key, outcomes) if not setting.defaults}


def test_with_amx_bfloat16_alone_is_tried_also_where_a_profile_begins_with_another() -> None:
    amx = replace(CPU, cpu_flags=frozenset({"sse2", "amx_bf16"}))
    assert dtypes_tried(space(amx)) == {"bfloat16"}
    base = load_profile("auto", amx).model_copy(update={"dtype": "float32", "dtype_by_cpu_flag": {}})
    assert dtypes_tried(space_for(amx, base, (MODEL,), options={}, rows=512, tokens_per_row=1024)) == {"float32", "bfloat16"}


def test_blocks_of_every_size_but_those_of_now_are_tried() -> None:
    def sizes(machine: Machine) -> list[Any]:
        return [change["block_size"] for change in space(machine).rest if "block_size" in change]

    assert sizes(CPU) == [64, 32]
    assert sizes(replace(CPU, cpu_flags=frozenset({"amx_bf16"}))) == [64, 128]


def test_the_engines_defaults_have_nothing_of_ours_but_a_bound_on_memory() -> None:
    where, base = space(), load_profile("auto", CPU)
    plan = plan_of(engine_defaults(where), base, CPU, MODEL, {"max_num_seqs": 5})
    assert (plan.replicas, plan.environment, plan.bare, list(plan.options)) == (1, {}, True, ["kv_cache_memory_bytes"])
    gpu = plan_of(engine_defaults(space(H100, LLAMA_70B)), load_profile("auto", H100), H100, LLAMA_70B, {})
    assert (gpu.replicas, gpu.options, gpu.environment) == (1, {}, {})


def test_a_setting_becomes_a_profile_that_plans_the_same() -> None:
    base = load_profile("auto", CPU)
    setting = space().start.but(replicas=2, preload=("iomp",), dtype="bfloat16", max_num_seqs=64, block_size=32, enforce_eager=False)
    profile = profile_of(setting, base)
    assert (profile.replicas, profile.dtype, profile.max_num_seqs, profile.preload) == (2, "bfloat16", 64, ("iomp",))
    plan = plan_of(setting, base, CPU, MODEL, {})
    assert {name: plan.options[name] for name in ("dtype", "max_num_seqs", "block_size", "enforce_eager", "enable_prefix_caching")} == {
        "dtype": "bfloat16", "max_num_seqs": 64, "block_size": 32, "enforce_eager": False, "enable_prefix_caching": False,
    }  # fmt: skip
    assert (plan.environment["OMP_NUM_THREADS"], plan.environment["LD_PRELOAD"]) == ("1", "/lib/iomp")
    pinned = plan_of(setting.but(pin_cores=True, environment={"OMP_WAIT_POLICY": "PASSIVE"}), base, CPU, MODEL, {})
    assert [pinned.environment_of(index)["OMP_PLACES"] for index in range(2)] == ["{0}", "{1}"]
    assert pinned.environment_of(1)["OMP_WAIT_POLICY"] == "PASSIVE"
    assert plan.environment["MALLOC_TRIM_THRESHOLD_"] == base.environment["MALLOC_TRIM_THRESHOLD_"]


def test_allocators_are_tried_where_they_are_found() -> None:
    both = space(replace(CPU, libraries={"tcmalloc": "/t", "mimalloc": "/m", "iomp": "/i"}))
    assert both.start.preload == ("tcmalloc",)
    assert [change["preload"] for change in both.changes if "preload" in change] == [("iomp", "tcmalloc"), ("iomp",), ("mimalloc",), ()]
    assert not [change for change in space(replace(CPU, libraries={})).changes if "preload" in change]


def test_an_engine_core_of_its_own_is_tried_where_there_are_cores_to_spare() -> None:
    own = {"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "pin_cores": True}
    assert own not in space().changes
    assert own in space(replace(CPU, cores=16)).changes


def test_compiling_is_tried_before_what_is_worth_less() -> None:
    step, outcomes = search(space(), lambda setting: cpu_speed(setting) * (1.0 if setting.get("enforce_eager") else 1.5))
    tried = [setting.get("enforce_eager") for setting in map(parse_key, outcomes) if not setting.defaults]
    assert tried.index(False) <= 3
    assert (step.best.get("enforce_eager"), step.best.get("max_num_seqs"), step.best.preload) == (False, 64, ("iomp",))


def test_ten_minutes_are_enough_for_prepared_weights_two_replicas_and_compiling() -> None:
    """With the times that a shared machine of two cores took."""
    where = space(CPU, MODEL, INT8)
    outcomes: dict[str, Outcome] = {}
    left_s = 600.0 - 35.0  # completion lengths
    while (wanted := next_trial(where, outcomes, left_s=left_s).next) is not None and left_s > 0:
        eager_start_s = (32.0 if wanted.model == "plain" else 20.0) * wanted.replicas
        start_s, run_s, again_s = (105.0, 60.0, 0.0) if wanted.defaults else (eager_start_s, 30.0, 0.0)
        if wanted.get("enforce_eager") is False:
            start_s, again_s = start_s + 60.0, eager_start_s
        left_s -= start_s + run_s + again_s
        rate = cpu_speed(wanted) * (1.1 if wanted.get("enforce_eager") is False else 1.0)
        outcomes[wanted.key] = Outcome(state="done", output_tokens_per_s=rate, start_s=start_s, run_s=run_s)
    best = next_trial(where, outcomes, left_s=0.0).best
    assert (best.model, best.replicas, best.get("enforce_eager")) == ("int8", 2, False)
    assert left_s > 0


def test_a_whole_space_of_a_node_with_eight_h100() -> None:
    where = space(H100, LLAMA_70B, LLAMA_70B_FP8, rows=4096)
    assert (where.start.replicas, where.start.get("tensor_parallel_size"), where.start.get("dtype")) == (2, 4, "bfloat16")
    assert where.models == ("70b", "70b-fp8")
    assert where.cuts_of("70b") == ((1, {"tensor_parallel_size": 8}), (2, {"tensor_parallel_size": 4}))
    assert dict(where.ladders) == {
        "max_num_seqs": (128, 256, 512, 1024, 2048),
        "max_num_batched_tokens": (4096, 8192, 16384, 32768),
    }
    assert where.rest[0] == {"attention_backend": "FLASH_ATTN"}
    assert {name for change in where.rest for name in change} == {
        "attention_backend", "max_cudagraph_capture_size", "block_size", "enforce_eager",
    }  # fmt: skip


def test_a_node_with_four_gb200_takes_one_device_a_replica_for_fp4() -> None:
    where = space(GB200, LLAMA_70B_FP4, rows=4096)
    assert (where.start.replicas, where.start.get("tensor_parallel_size")) == (4, 1)
    assert where.cuts_of("70b-fp4") == ((2, {"tensor_parallel_size": 2}), (4, {"tensor_parallel_size": 1}))
    assert where.rest[0] == {"attention_backend": "FLASHINFER"}
    assert space(replace(GB200, gpu_memory_bytes=150 * GB), LLAMA_70B, rows=4096).start.get("tensor_parallel_size") == 2


def test_a_smaller_precision_may_run_on_fewer_devices() -> None:
    where = space(H100, LLAMA_70B, LLAMA_70B_FP4, rows=4096)
    assert where.cuts_of("70b-fp4") == ((4, {"tensor_parallel_size": 2}), (8, {"tensor_parallel_size": 1}))

    def speed(setting: Setting) -> float:
        return {"70b": 1.0, "70b-fp4": 2.0}[setting.model] * setting.replicas

    step, _ = search(where, speed)
    assert (step.best.model, step.best.replicas, step.best.get("tensor_parallel_size")) == ("70b-fp4", 8, 1)


def test_a_trial_runs_on_as_many_devices_as_its_setting_says() -> None:
    where = space(H100, replace(LLAMA_70B_FP8, weights_bytes=66 * GB), rows=4096, tokens_per_row=64)
    narrow = where.start.but(replicas=8, tensor_parallel_size=1)  # a run would take two of them
    plan = plan_of(narrow, load_profile("auto", H100), H100, replace(LLAMA_70B_FP8, weights_bytes=66 * GB), {})
    assert (plan.replicas, plan.environment_of(1)["CUDA_VISIBLE_DEVICES"]) == (8, "1")


def test_amds_gpus_are_tried_with_backends_of_their_own() -> None:
    mi300x = Machine(cores=96, memory_bytes=1850 * GB, num_gpus=8, gpu_name="AMD Instinct MI300X VF", gpu_memory_bytes=205 * GB)
    tried = [change["attention_backend"] for change in space(mi300x, LLAMA_70B).rest if "attention_backend" in change]
    assert tried == ["ROCM_ATTN", "ROCM_AITER_FA", "TRITON_ATTN"]


def test_every_replica_of_a_gpu_setting_gets_its_devices() -> None:
    where = space(H100, LLAMA_70B, rows=4096)
    plan = plan_of(where.start, load_profile("auto", H100), H100, LLAMA_70B, {})
    assert [plan.environment_of(index)["CUDA_VISIBLE_DEVICES"] for index in range(plan.replicas)] == ["0,1,2,3", "4,5,6,7"]


def test_cache_types_that_lose_precision_are_tried_only_when_allowed() -> None:
    assert all("kv_cache_dtype" not in change for change in space(H100, LLAMA_70B).rest)
    assert {"kv_cache_dtype": "fp8"} in space(H100, LLAMA_70B, kv_cache_dtypes=("fp8",)).rest


def test_the_prefix_cache_is_tried_where_prompts_share_their_beginnings() -> None:
    assert {"enable_prefix_caching": True} not in space(shared_share=0.01).rest
    assert space(shared_share=0.5).rest[0] == {"enable_prefix_caching": True}


def test_the_shared_share_counts_whole_blocks_that_came_before() -> None:
    assert shared_share([[1, 2, 3, 4], [1, 2, 3, 5], [9, 9, 9, 9]], block=2) == pytest.approx(2 / 12)
    assert shared_share([[1, 2, 3, 4]] * 3, block=2) == pytest.approx(8 / 12)
    assert shared_share([[1]], block=2) == 0.0
    assert shared_share([], block=2) == 0.0


def test_agreement_is_the_share_of_rows_that_begin_alike() -> None:
    assert agreement({1: [5, 6], 2: [7], 3: [8]}, {1: [5, 9], 2: [1], 9: [4]}) == 0.5
    assert agreement({1: [5]}, {2: [5]}) == 1.0
