"""Profiles and the cutting of machines into replicas. Values in, values out: no machine is looked at but in one test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.model import Model
from pipeline.profile import Machine
from pipeline.profile import ReplicaPlan
from pipeline.profile import load_profile
from pipeline.profile import plan_replicas
from pipeline.profile import this_machine
from schemas.errors import JobError
from schemas.profile import Profile

FOLDER = Path(__file__).resolve().parents[2] / "pipeline" / "profiles"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GB = 10**9

CPU = Profile(
    name="cpu",
    description="d",
    device="cpu",
    cores_per_replica=2,
    kv_cache_bytes=2 * GB,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    options={"enforce_eager": True},
    environment={"A": "1"},
    dtype_by_cpu_flag={"amx_bf16": "bfloat16", "avx512_fp16": "float16"},
    dtype="float32",
)
GPU = Profile(
    name="gpu", description="d", device="gpu", max_num_seqs=1024, max_num_batched_tokens=8192, options={"o": 1}, environment={"A": "1"}
)
MODEL = Model(
    path="/m",
    weights_digest="w",
    tokenizer_digest="t",
    template_digest="",
    weights_bytes=GB,
    max_position_embeddings=2048,
    vocab_size=32_000,
    kv_values_per_token=10_000,
)


def machine(cores: int, gigabytes: float = 64, **values: Any) -> Machine:
    return Machine(cores=cores, memory_bytes=int(gigabytes * GB), **values)


def plan(profile: Profile, where: Machine, model: Model = MODEL, *, replicas: int | None = None, **options: Any) -> ReplicaPlan:
    return plan_replicas(profile, where, model, replicas=replicas, options=options)


@pytest.mark.parametrize(("cores", "replicas", "threads"), [(1, 1, "1"), (2, 1, "2"), (3, 1, "3"), (4, 2, "2"), (16, 8, "2")])
def test_cores_are_cut_into_replicas_and_none_is_left_over(cores: int, replicas: int, threads: str) -> None:
    made = plan(CPU, machine(cores))
    assert (made.replicas, made.environment["OMP_NUM_THREADS"]) == (replicas, threads)


def test_a_whole_plan_of_a_cpu() -> None:
    assert plan(CPU, machine(2)) == ReplicaPlan(
        profile="cpu",
        replicas=1,
        options={
            "max_num_seqs": 64,
            "max_num_batched_tokens": 2048,
            "max_model_len": 2048,
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2 * GB,
        },
        environment={"A": "1", "OMP_NUM_THREADS": "2"},
    )


def test_memory_bounds_the_replicas_and_the_others_get_their_cores() -> None:
    one = 1.2 * GB + 2 * GB + (2 << 30)
    made = plan(CPU, machine(16, 2.5 * one / GB / 0.8))
    assert (made.replicas, made.environment["OMP_NUM_THREADS"]) == (2, "8")


def test_a_profiles_own_number_of_replicas_gives_way_to_memory_and_the_users_does_not() -> None:
    """It may have been found with shorter rows, whose caches are smaller."""
    tuned = CPU.model_copy(update={"replicas": 4})
    one = 1.2 * GB + 2 * GB + (2 << 30)
    where = machine(4, 2.5 * one / GB / 0.8)
    assert plan(tuned, machine(4)).replicas == 4
    assert (plan(tuned, where).replicas, plan(tuned, where).environment["OMP_NUM_THREADS"]) == (2, "2")
    with pytest.raises(JobError, match=r"cluster\.replicas: 4 do not fit"):
        plan(tuned, where, replicas=4)


def test_a_machine_too_small_for_one_replica_is_refused_with_the_numbers() -> None:
    expected = r"one replica needs about 5.3 GB \(1.0 GB of weights, 2.0 GB of KV cache\), and 3.2 GB of this machine's memory may be used"
    with pytest.raises(JobError, match=expected):
        plan(CPU, machine(2, 4))


def test_a_shorter_limit_makes_a_model_fit() -> None:
    long = replace(MODEL, max_position_embeddings=131_072)
    with pytest.raises(JobError, match=r"set engine\.options\.max_model_len lower"):
        plan(CPU, machine(2, 8), long)
    assert plan(CPU, machine(2, 8), long, max_model_len=2048).replicas == 1


def test_the_cache_has_room_for_one_longest_row_at_least() -> None:
    long = replace(MODEL, max_position_embeddings=131_072)
    assert plan(CPU, machine(2), long).options["kv_cache_memory_bytes"] == int(1.05 * 131_072 * 10_000 * 4)


def test_the_cache_is_no_larger_than_a_full_batch_can_use() -> None:
    assert plan(CPU, machine(2), replace(MODEL, max_position_embeddings=128)).options["kv_cache_memory_bytes"] == 64 * 128 * 10_000 * 4
    assert (
        plan(CPU, machine(2), replace(MODEL, max_position_embeddings=128), max_num_seqs=4).options["kv_cache_memory_bytes"]
        == 4 * 128 * 40_000
    )


@pytest.mark.parametrize(
    ("row_tokens", "options", "expected"),
    [
        (None, {"max_num_seqs": 16}, 16 * 2048),
        (800, {"max_num_seqs": 16}, 16 * (800 + 192)),
        (100, {"max_num_seqs": 16}, 16 * 512),
        (5000, {"max_num_seqs": 16}, 16 * 2048),
        (100, {"max_num_seqs": 2}, 2048 + 2 * 128),
        (100, {"max_num_seqs": 16, "kv_cache_memory_bytes": 10**8 * 4}, 10_000),
    ],
    ids=["nobody knows", "long rows", "short rows", "longer than the model takes", "room for one longest row", "as the user says"],
)
def test_the_cache_is_no_larger_than_a_batch_of_the_jobs_rows_fills(
    row_tokens: int | None, options: dict[str, Any], expected: float
) -> None:
    made = plan_replicas(CPU, machine(2), MODEL, replicas=None, options=options, row_tokens=row_tokens)
    assert made.options["kv_cache_memory_bytes"] == int(expected * 40_000)


def test_a_flag_of_the_cpu_adds_options_that_the_profiles_own_and_the_users_win_over() -> None:
    by_flag = {"amx_bf16": {"block_size": 32, "enforce_eager": False}, "avx2": {"block_size": 16, "max_num_partial_prefills": 2}}
    profile = CPU.model_copy(update={"options_by_cpu_flag": by_flag})

    def made(*flags: str, **options: Any) -> dict[str, Any]:
        found = plan(profile, machine(2, cpu_flags=frozenset(flags)), **options).options
        return {name: found[name] for name in ("block_size", "max_num_partial_prefills", "enforce_eager") if name in found}

    assert made() == {"enforce_eager": True}
    assert made("amx_bf16") == {"block_size": 32, "enforce_eager": True}
    assert made("avx2", "amx_bf16") == {"block_size": 32, "max_num_partial_prefills": 2, "enforce_eager": True}
    assert made("amx_bf16", block_size=64) == {"block_size": 64, "enforce_eager": True}


def test_more_rows_than_the_profile_has_room_for_get_no_larger_cache() -> None:
    made = plan_replicas(CPU, machine(2), MODEL, replicas=None, options={}, row_tokens=1500)
    assert made.options["kv_cache_memory_bytes"] == 2 * GB


def test_half_width_halves_the_cache() -> None:
    small = replace(MODEL, max_position_embeddings=128)
    assert plan(CPU, machine(2), small, dtype="float16").options["kv_cache_memory_bytes"] == 64 * 128 * 10_000 * 2


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ((), "float32"),
        (("avx2",), "float32"),
        (("avx512_fp16",), "float16"),
        (("amx_bf16",), "bfloat16"),
        (("avx512_fp16", "amx_bf16"), "bfloat16"),
    ],
)
def test_the_cpus_flags_choose_the_dtype(flags: tuple[str, ...], dtype: str) -> None:
    assert plan(CPU, machine(2, cpu_flags=frozenset(flags))).options["dtype"] == dtype


def test_the_users_options_win() -> None:
    made = plan(
        CPU,
        machine(2, cpu_flags=frozenset({"amx_bf16"})),
        dtype="float32",
        max_num_seqs=3,
        max_model_len=100,
        enforce_eager=False,
        kv_cache_memory_bytes=12345,
    )
    assert made.options == {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 2048,
        "max_model_len": 100,
        "dtype": "float32",
        "enforce_eager": False,
        "kv_cache_memory_bytes": 12345,
    }


def test_the_user_says_how_many_replicas() -> None:
    made = plan(CPU, machine(2), replicas=2)
    assert (made.replicas, made.environment["OMP_NUM_THREADS"]) == (2, "1")
    assert plan(CPU, machine(1), replicas=3).environment["OMP_NUM_THREADS"] == "1"


def test_a_profile_may_bound_the_models_length() -> None:
    bounded = CPU.model_copy(update={"max_model_len": 512})
    assert plan(bounded, machine(2)).options["max_model_len"] == 512
    assert plan(bounded, machine(2), replace(MODEL, max_position_embeddings=256)).options["max_model_len"] == 256


def test_a_profile_names_what_is_preloaded_and_what_a_machine_lacks_is_left_out() -> None:
    both = machine(2, libraries={"tcmalloc": "/t.so", "iomp": "/i.so"})
    assert plan(CPU.model_copy(update={"preload": ("iomp", "tcmalloc", "mimalloc")}), both).environment["LD_PRELOAD"] == "/i.so:/t.so"
    assert "LD_PRELOAD" not in plan(CPU.model_copy(update={"preload": ()}), both).environment


def test_a_found_allocator_is_preloaded() -> None:
    assert plan(CPU, machine(2, libraries={"tcmalloc": "libtcmalloc_minimal.so.4"})).environment["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    assert "LD_PRELOAD" not in plan(CPU, machine(2)).environment


def test_pinned_replicas_have_cores_of_their_own_and_none_is_left_over() -> None:
    made = plan(CPU.model_copy(update={"pin_cores": True, "replicas": 2}), machine(5, core_ids=(1, 3, 5, 7, 9)))
    assert [made.environment_of(index)["VLLM_CPU_OMP_THREADS_BIND"] for index in range(2)] == ["1,3", "5,7,9"]
    assert made.environment_of(0)["OMP_PLACES"] == "{1},{3}"
    assert (made.environment_of(1)["A"], made.environment_of(1)["OMP_PROC_BIND"]) == ("1", "close")


def test_each_gpu_gets_one_replica() -> None:
    made = plan(GPU, machine(96, num_gpus=4))
    assert made.replicas == 4
    assert [made.environment_of(index) for index in range(4)] == [{"A": "1", "CUDA_VISIBLE_DEVICES": str(index)} for index in range(4)]
    assert made.options == {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 2048, "dtype": "auto", "o": 1}


def test_tensor_parallel_replicas_get_their_gpus_together() -> None:
    made = plan(GPU, machine(96, num_gpus=8), tensor_parallel_size=4)
    assert [made.environment_of(index)["CUDA_VISIBLE_DEVICES"] for index in range(made.replicas)] == ["0,1,2,3", "4,5,6,7"]
    assert made.options["tensor_parallel_size"] == 4


def test_fewer_replicas_than_gpus_are_taken_when_asked_for() -> None:
    made = plan(GPU, machine(96, num_gpus=8), replicas=2)
    assert [made.environment_of(index)["CUDA_VISIBLE_DEVICES"] for index in range(made.replicas)] == ["0", "1"]


LARGE = replace(MODEL, weights_bytes=70 * GB, max_position_embeddings=131_072, kv_values_per_token=100_000)
"""Of one GPU of 100 GB it leaves 16 GB to keys and values: for 76,190 tokens and a twentieth, of 200 kB each."""


def test_a_context_that_the_cache_of_a_gpu_does_not_hold_is_cut_to_what_it_does() -> None:
    made = plan(GPU, machine(96, num_gpus=8, gpu_memory_bytes=100 * GB), LARGE)
    assert (made.replicas, made.options["max_model_len"], made.shortened) == (8, 76_032, True)
    assert made.found.startswith(
        "prompt and completion may have 76,032 tokens of the model's 131,072: the KV cache of a replica on one GPU"
    )


def test_a_context_that_a_user_names_stays() -> None:
    made = plan(GPU, machine(96, num_gpus=8, gpu_memory_bytes=100 * GB), LARGE, max_model_len=131_072)
    assert (made.options["max_model_len"], made.shortened, made.found) == (131_072, False, "")


def test_a_wider_replica_keeps_the_models_context() -> None:
    made = plan(GPU, machine(96, num_gpus=8, gpu_memory_bytes=100 * GB), LARGE, tensor_parallel_size=2)
    assert (made.options["max_model_len"], made.shortened) == (131_072, False)


def test_a_plan_knows_what_its_node_costs() -> None:
    size = load_profile("nd96isr-h100-v5", machine(96))
    assert size.node is not None
    assert size.node.price is not None
    dear = size.node.model_copy(update={"price": size.node.price.model_copy(update={"usd_per_hour": 7.0})})
    assert plan(size.model_copy(update={"node": dear}), machine(96, num_gpus=8)).usd_per_hour == 7.0
    assert plan(size.model_copy(update={"node": dear.model_copy(update={"price": None})}), machine(96, num_gpus=8)).usd_per_hour is None
    assert plan(GPU, machine(96, num_gpus=8)).usd_per_hour is None


def test_what_is_described_of_a_gpu_bounds_what_is_planned_with() -> None:
    size = load_profile("nd96isr-h100-v5", machine(96))
    sizes = [plan(size, machine(96, num_gpus=8, gpu_memory_bytes=memory * GB), LARGE) for memory in (0, 80, 85)]
    assert sizes[0] == sizes[1] == sizes[2]  # as `tokenmill plan` sees it, which has no such GPU
    small = plan(size, machine(96, num_gpus=8, gpu_memory_bytes=45 * GB), LARGE)
    assert (sizes[0].options["tensor_parallel_size"], small.options["tensor_parallel_size"]) == (2, 4)


def test_replicas_of_a_cpu_all_have_one_environment() -> None:
    made = plan(CPU, machine(16))
    assert made.environment_of(0) == made.environment_of(7) == made.environment


def test_a_plan_changes_neither_profile_nor_options() -> None:
    before, options = CPU.model_copy(deep=True), {"dtype": "float32"}
    plan_replicas(CPU, machine(2), MODEL, replicas=None, options=options)
    assert (CPU, options) == (before, {"dtype": "float32"})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_profile_loads_and_plans(name: str) -> None:
    profile = load_profile(name, machine(4))
    assert profile.name == name
    made = plan(profile, machine(4, num_gpus=profile.node.devices if profile.node else 1))
    assert made.replicas >= 1
    assert all(isinstance(value, str) for value in made.environment.values())


def test_the_shipped_profiles_are_found() -> None:
    assert {"local-cpu", "local-gpu"} <= set(SHIPPED)


def test_auto_looks_for_gpus() -> None:
    assert load_profile("auto", machine(4)).name == "local-cpu"
    assert load_profile("auto", machine(4, num_gpus=1)).name == "local-gpu"


@pytest.mark.parametrize("name", ["local", "../profile", ""])
def test_an_unknown_profile_is_refused_naming_the_known(name: str) -> None:
    with pytest.raises(JobError, match=f"engine.profile: found '{name}'; allowed are auto, {', '.join(SHIPPED)}, a VM size, or a path"):
        load_profile(name, machine(4))


def test_this_machine_has_cores_and_memory() -> None:
    here = this_machine()
    assert here.cores >= 1
    assert here.memory_bytes > 1 << 28
    assert here.cpu_flags
