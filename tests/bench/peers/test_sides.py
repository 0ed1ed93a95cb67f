from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.peers.sides import DRIVERS
from tests.bench.peers.sides import PEERS
from tests.bench.peers.sides import Task
from tests.bench.peers.sides import environment
from tests.bench.peers.sides import flags
from tests.bench.peers.sides import our_command
from tests.bench.peers.sides import our_environment

_CALLER = {
    "HOME": "/root",
    "PATH": "/usr/bin",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "LD_PRELOAD": "mine.so",
    "MALLOC_X": "1",
}
_TUNED = {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "libtcmalloc.so", "MALLOC_TOP_PAD_": "9"}
_OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 128, "enforce_eager": True, "enable_prefix_caching": False}


def _task(options: dict[str, Any]) -> Task:
    return Task(
        python=Path("/venv/bin/python"),
        input_folder=Path("/w/in"),
        batch_file=Path("/w/in.jsonl"),
        output=Path("/w/out"),
        model="/m",
        max_tokens=128,
        options=options,
    )


def test_a_peer_with_defaults_gets_nothing_that_tunes_an_engine() -> None:
    made = environment("defaults", _CALLER, tuned=_TUNED, python=Path("/venv/bin/python"))
    assert made == {
        "HOME": "/root",
        "PATH": "/venv/bin:/usr/bin",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",
    }


def test_a_peer_with_the_same_engine_gets_all_of_our_replicas_environment() -> None:
    made = environment("same-engine", _CALLER, tuned=_TUNED, python=Path("/venv/bin/python"))
    assert made.items() >= _TUNED.items()
    assert "VLLM_CPU_KVCACHE_SPACE" not in made  # it would win over kv_cache_memory_bytes
    assert made["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_our_command_gets_nothing_of_the_callers_tuning() -> None:
    assert our_environment({**_CALLER, "TOKENMILL_CACHE": "/c"}).keys() == {
        "HOME", "PATH", "TOKENMILL_CACHE", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED",
    }  # fmt: skip


def test_our_command_with_defaults_is_what_a_user_types() -> None:
    assert our_command("defaults", _task({})) == [
        "/venv/bin/tokenmill", "run", "--model", "/m", "--input", "/w/in/*.parquet", "--prompt", "question", "--output", "/w/out",
        "--max-tokens", "128", "--temperature", "0",
    ]  # fmt: skip


def test_our_command_with_the_same_engine_spells_every_setting_out() -> None:
    settings = our_command("same-engine", _task(_OPTIONS))[len(our_command("defaults", _task({}))) :]
    assert settings == [
        "--profile", "local-cpu", "--replicas", "1", "--set", "engine.ordering='off'", "--set", 'engine.options.dtype="float32"',
        "--set", "engine.options.max_num_seqs=128", "--set", "engine.options.enforce_eager=true",
        "--set", "engine.options.enable_prefix_caching=false",
    ]  # fmt: skip


def test_run_batch_takes_engine_arguments_as_flags() -> None:
    assert flags(_OPTIONS) == ["--dtype", "float32", "--max-num-seqs", "128", "--enforce-eager", "--no-enable-prefix-caching"]


@pytest.mark.parametrize("name", [name for name in PEERS if name != "run-batch"])
def test_every_driver_is_there_and_is_told_the_same(name: str) -> None:
    python, script, *arguments = PEERS[name].command(_task(_OPTIONS))
    assert python == "/venv/bin/python"
    assert Path(script).parent == DRIVERS
    assert Path(script).is_file()
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert json.loads(given.pop("--engine")) == _OPTIONS
    assert given == {"--input": "/w/in", "--output": "/w/out", "--model": "/m", "--max-tokens": "128"}
