"""Who may import whom, what a light import loads, and that a notebook's own files cannot pass for ours."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import jobs

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("schemas", "pipeline", "jobs")
_FILES = sorted(path for package in _PACKAGES for path in (_ROOT / package).rglob("*.py"))

_ALLOWED = {"schemas": {"schemas"}, "pipeline": {"schemas", "pipeline"}, "jobs": {"schemas", "pipeline", "jobs"}}
"""jobs → pipeline → schemas, and never back."""

_BATCH = {"jobs/cluster/azure_batch.py", "jobs/cluster/batch_account.py"}
_DASK_CLUSTERS = {"jobs/cluster/local.py", "jobs/cluster/address.py", "jobs/cluster/dask_units.py", "jobs/cluster/dask_nodes.py"}
_COMMANDS = {str(path.relative_to(_ROOT)) for path in _FILES if path.match("jobs/cli/*.py")}
_PREFLIGHT = {f"pipeline/preflight_{part}.py" for part in ("compute", "device", "memory", "network")}
_OWNERS = {
    "adlfs": {"pipeline/azure_blob.py"},
    "azure": {"pipeline/azure_blob.py", "pipeline/credentials.py", *_BATCH},
    "vllm": {"pipeline/engine/norms.py", "pipeline/engine/vllm.py"},
    "torch": {"pipeline/engine/norms.py", "pipeline/engine/vllm.py", "pipeline/quantise.py", *_PREFLIGHT},
    "click": _COMMANDS,
    "cryptography": {"pipeline/tls.py"},
    "distributed": {
        "pipeline/worker.py",
        "pipeline/membership.py",
        "pipeline/tls.py",
        "jobs/scheduler.py",
        "jobs/bench/raw.py",
        *_DASK_CLUSTERS,
    },
    "dask": {"pipeline/membership.py", "jobs/scheduler.py", *_DASK_CLUSTERS},
    "fsspec": {"pipeline/storage.py"},
    "mlperf_loadgen": {"jobs/bench/loadgen.py"},
    "rouge_score": {"pipeline/quality.py"},
    "compressed_tensors": {"pipeline/quantise.py"},
    "transformers": {"pipeline/render.py", "pipeline/quantise.py"},
    "yaml": {"jobs/api.py", "jobs/started.py", "jobs/backtest.py", "jobs/cli/group.py", "jobs/reporting/origin.py", "pipeline/hardware.py"},
    "matplotlib": {"jobs/reporting/plots.py"},
    "prometheus_client": {"jobs/metrics.py", "pipeline/metrics.py"},
}
"""Heavy or narrow packages live with their owner."""


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    return frozenset(imported(path.read_text()))


def imported(source: str) -> set[str]:
    """Top-level names of every import in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code as a notebook in `folder` would: the folder comes first on sys.path."""
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_there_are_files_to_look_at() -> None:
    assert {str(path.relative_to(_ROOT)) for path in _FILES} > {"schemas/job.py", "pipeline/unit.py", "jobs/cluster/local.py"}


def test_imports_are_seen_wherever_they_stand() -> None:
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g\n    if True:\n        from h import i\nfrom . import j\n"
    assert imported(source) == {"a", "c", "g", "h"}


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_imports_go_from_jobs_to_pipeline_to_schemas_and_never_back(path: Path) -> None:
    package = path.relative_to(_ROOT).parts[0]
    ours = imports_of(path) & {*_PACKAGES, "infra", "tests"}
    assert ours <= _ALLOWED[package]


@pytest.mark.parametrize("package", _OWNERS)
def test_a_heavy_package_is_imported_by_its_owner_alone(package: str) -> None:
    found = {str(path.relative_to(_ROOT)) for path in _FILES if package in imports_of(path)}
    assert found <= _OWNERS[package]


def test_schemas_know_pydantic_and_pyarrow_alone() -> None:
    names = set().union(*(imports_of(path) for path in _FILES if path.relative_to(_ROOT).parts[0] == "schemas"))
    assert names - set(sys.stdlib_module_names) == {"schemas", "pydantic", "pyarrow"}


def test_no_package_uses_relative_imports() -> None:
    relative = [
        str(path.relative_to(_ROOT))
        for path in _FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


_IMPORT_ONE_BY_ONE = """
import importlib, json, sys
loaded = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded[name] = sorted(sys.modules)
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_asking_for_work_loads_no_engine_and_asking_for_help_nearly_nothing(tmp_path: Path) -> None:
    modules = ["jobs.cli", "jobs.plan", "jobs.api", "pipeline.render"]
    done = python(_IMPORT_ONE_BY_ONE, tmp_path, *modules)
    assert done.returncode == 0, done.stderr
    loaded = {name: set(names) for name, names in json.loads(done.stdout).items()}
    assert {name: name in names for name, names in loaded.items()} == dict.fromkeys(modules, True)
    assert {name: names & {"torch", "vllm"} for name, names in loaded.items()} == {name: set() for name in modules}
    assert loaded["jobs.cli"] & {"distributed", "dask", "transformers", "fsspec", "pyarrow"} == set()
    assert loaded["jobs.api"] & {"distributed", "dask", "transformers"} == set()


_PAIRS = [(imports, ours) for imports in _PACKAGES for ours in _PACKAGES if imports != ours]


@pytest.mark.parametrize(("imports", "ours"), _PAIRS)
@pytest.mark.parametrize("shadow", ["{}.py", "{}/__init__.py"])
def test_a_file_that_shadows_a_package_is_named(tmp_path: Path, imports: str, ours: str, shadow: str) -> None:
    path = tmp_path / shadow.format(ours)
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    done = python(f"import {imports}", tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {path} is found as '{ours}'")
    assert str(_ROOT / ours / "__init__.py") in last
    assert "rename" in last


def test_a_folder_of_job_files_that_shadows_a_package_is_named(tmp_path: Path) -> None:
    """A folder jobs/ full of YAML is a package to Python, too."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.yaml").write_text("name: x")
    done = python("import pipeline", tmp_path)
    assert done.returncode == 0 or str(tmp_path / "jobs") in done.stderr.splitlines()[-1]


def test_nothing_is_shadowed_in_an_empty_folder(tmp_path: Path) -> None:
    done = python("import jobs, pipeline, schemas; print('fine')", tmp_path)
    assert (done.returncode, done.stdout) == (0, "fine\n")


def test_public_names_are_there_each_time_they_are_asked_for() -> None:
    """Also after the modules of the same names were loaded."""
    for path in (_ROOT / "jobs").glob("*.py"):
        if path.stem != "__init__":
            importlib.import_module(f"jobs.{path.stem}")
    assert jobs.__all__
    for name in jobs.__all__:
        assert callable(getattr(jobs, name)), name
        assert callable(getattr(jobs, name)), name


def test_public_names_are_there_in_a_fresh_process(tmp_path: Path) -> None:
    done = python("import jobs; print([name for name in jobs.__all__ if not callable(getattr(jobs, name))])", tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'jobs' has no attribute 'nothing'"):
        _ = jobs.nothing
