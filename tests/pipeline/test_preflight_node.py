"""One node's part: what it says of itself, and what its measuring processes are told and what becomes of their answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import preflight
from pipeline.shape import read_shape
from schemas.errors import JobError
from schemas.preflight import NodeFacts
from schemas.preflight import Order
from schemas.preflight import World

_AS_A_REPLICA = """
import json, os
from pipeline.preflight import node_task
os.environ["CUDA_VISIBLE_DEVICES"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
print(json.dumps(node_task("facts", {"model": None})))
"""


class Children:
    """Stands for pipeline.child.run_child: notes what it was asked and answers with one figure, or fails for a device."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.asked: list[tuple[str, dict[str, Any], Mapping[str, str]]] = []

    def __call__(self, module: str, data: dict[str, Any], *, environment: Mapping[str, str], say: object, limit_s: float) -> dict[str, Any]:
        self.asked.append((module, data, environment))
        if data["device"] == self.failing:
            raise JobError(f"CUDA error on {data['device']}")
        figure = {"pillar": "memory", "group": "memory", "name": f"of rank {data.get('rank')}", "device": data["label"], "value": 1.0}
        return {"measurements": [{**figure, "unit": "GB/s"}], "left_out": ["the same on all"]}


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    made = Children()
    monkeypatch.setattr(preflight, "run_child", made)
    return made


def test_a_node_says_its_cores_its_gpus_and_the_shape_of_its_model(tiny_model: Path) -> None:
    found = preflight.facts(str(tiny_model), {"CUDA_VISIBLE_DEVICES": "2,GPU-5a"}, (0, 3))
    assert (found.gpus, found.core_ids, found.num_cores) == (("2", "GPU-5a"), (0, 3), 2)
    assert found.shape is not None
    assert found.shape["hidden"] == read_shape(tiny_model).hidden
    assert NodeFacts.model_validate(found.model_dump(mode="json")) == found
    assert 1024 < found.free_port < 65536


def test_a_model_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot read"):
        preflight.facts(str(tmp_path), {}, (0,))


def test_inside_a_replica_the_nodes_own_cores_and_gpus_count() -> None:
    """The replica sees one GPU and one core; the command that started it saw all of them."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    script = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    done = subprocess.run([sys.executable, "-c", script, _AS_A_REPLICA], env=environment, capture_output=True, text=True, check=True)
    found = NodeFacts.model_validate_json(done.stdout)
    assert found.gpus == ("0", "1", "2", "3")
    assert found.core_ids == tuple(sorted(os.sched_getaffinity(0)))


def test_every_gpu_has_a_process_that_sees_it_alone(children: Children) -> None:
    answer = preflight.measure(Order(pillar="memory", seconds=1, devices=("0", "3"), core_ids=(0, 1)))
    assert {module for module, _, _ in children.asked} == {"pipeline.preflight_memory"}
    assert sorted(environment["CUDA_VISIBLE_DEVICES"] for _, _, environment in children.asked) == ["0", "3"]
    assert {environment["OMP_NUM_THREADS"] for _, _, environment in children.asked} == {"2"}
    assert [measurement.device for measurement in answer.measurements] == ["gpu 0", "gpu 3"]
    assert answer.left_out == ("the same on all",)


def test_a_cpu_is_shown_no_gpu_and_is_bound_to_no_replicas_core(children: Children) -> None:
    preflight.measure(Order(pillar="compute", seconds=1, devices=("cpu",), core_ids=(0, 1, 2)))
    ((module, data, environment),) = children.asked
    assert (module, data["label"]) == ("pipeline.preflight_compute", "cpu")
    assert environment == {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "false"}


def test_a_device_that_fails_fails_the_pillar_with_its_reason(children: Children) -> None:
    children.failing = "3"
    with pytest.raises(JobError, match=r"^CUDA error on 3$"):
        preflight.measure(Order(pillar="memory", seconds=1, devices=("0", "3")))


def test_ranks_are_counted_on_from_the_nodes_first(children: Children) -> None:
    world = World(address="10.0.0.4", port=1, places=(0, 0, 1, 1), first_rank=2, own_address="10.0.0.5")
    answer = preflight.measure(Order(pillar="network", seconds=1, devices=("0", "1"), world=world))
    assert sorted((data["rank"], data["device"]) for _, data, _ in children.asked) == [(2, "0"), (3, "1")]
    assert len(answer.measurements) == 2


def test_a_single_node_without_gpus_talks_to_itself_and_says_it_once(children: Children) -> None:
    world = World(address="127.0.0.1", port=1, places=(0, 0), first_rank=0, own_address="127.0.0.1")
    answer = preflight.measure(Order(pillar="network", seconds=1, devices=("cpu",), world=world))
    assert sorted(data["rank"] for _, data, _ in children.asked) == [0, 1]
    assert [measurement.name for measurement in answer.measurements] == ["of rank 0"]
