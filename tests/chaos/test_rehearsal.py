"""A small rehearsal with real processes: a scheduler, two nodes of two engines, a real table, and what is said of them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.commands import PATIENCE_S
from tests.commands import TOKENMILL
from tests.commands import Command

pytestmark = [pytest.mark.chaos, pytest.mark.long]


def rehearse(model: Path, store: Path | str, *more: str, environment: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    arguments = ["rehearse", "--model", str(model), "--nodes", "2", "--engines", "2", "--max-tokens", "32", "--store", str(store), *more]
    return subprocess.run([TOKENMILL, *arguments], capture_output=True, text=True, check=False, timeout=240, env=environment)


def test_a_small_rehearsal_runs_through_and_accounts_for_every_row(tiny_model: Path, tmp_path: Path) -> None:
    done = rehearse(tiny_model, tmp_path / "store", "--rows", "640", "--slow-down", "8", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert sum(node["rows"] for node in found["nodes"]) == 640
    assert [node["name"] for node in found["nodes"]] == ["node-00", "node-01"]
    assert found["units"] * found["rows_per_unit"] == pytest.approx(640)
    assert 0 < found["tokens_per_row"] <= 32
    worker = found["worker"]["by_kind"]
    assert set(worker) == {"read", "render", "decode", "write", "commit", "feed", "other"}
    assert all(seconds > 0 for kind, seconds in worker.items() if kind != "other")
    assert found["worker_s_per_row"] == pytest.approx(sum(worker.values()))
    assert found["scheduler"]["total_s"] > 0
    assert found["driver"]["total_s"] > 0
    assert found["storage"]["requests_per_unit"] is None
    assert {"a worker's process", "a node's CPU", "storage egress", "storage ingress"} <= {one["name"] for one in found["bottlenecks"]}
    (out,) = (tmp_path / "store").glob("rehearsal-*/out")
    assert subprocess.run([TOKENMILL, "verify", str(out)], check=False, capture_output=True).returncode == 0
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(process.info["cmdline"] or [])]


def test_a_killed_rehearsal_leaves_no_process(tiny_model: Path, tmp_path: Path) -> None:
    store, tag = ["--store", str(tmp_path / "store")], {"TMPDIR": str(tmp_path)}
    command = Command(tmp_path, "rehearse", "--model", str(tiny_model), "--nodes", "1", "--rows", "100000", *store, environment=tag)
    try:
        command.wait_for("replicas joined")
        family = command.family()
        assert len(family) == 3
        family[0].kill()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
        assert alive == []
    finally:
        command.kill()


def test_a_rehearsal_that_cannot_be_is_refused_before_anything_starts(tiny_model: Path, tmp_path: Path) -> None:
    done = rehearse(tiny_model, tmp_path / "store", "--rows", "10", "--profile", "local-cpu")
    assert done.returncode == 2
    assert "--profile: local-cpu does not say what its node has" in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.azurite
def test_the_whole_rack_reaches_storage_by_the_recipe_that_the_command_has(tiny_model: Path, azurite: Azurite) -> None:
    environment = {**{name: value for name, value in os.environ.items() if name != CONNECTION_STRING}, "MILL": azurite.connection_string}
    recipe = ["--storage", "credential.kind=connection_string", "--storage", "credential.env=MILL"]
    container = azurite.new_container()
    more = ["--rows", "200", "--slow-down", "1", "--json", *recipe]
    done = rehearse(tiny_model, f"az://{container}", *more, environment=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert sum(node["rows"] for node in found["nodes"]) == 200
    assert found["storage"]["requests_per_unit"] > 0
    assert any(name.endswith("/out/_SUCCESS") for name in azurite.names(container))
