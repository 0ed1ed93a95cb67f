"""Every notebook from top to bottom, as a user would: a kernel, an empty folder, the real engine on small tables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "notebooks"
_NOTEBOOKS = sorted(_FOLDER.glob("*.ipynb"))

_USERS_CACHE = os.environ.get("TOKENMILL_CACHE", "")
"""Taken before the tests' own: the demo model is made once."""


def test_there_are_five() -> None:
    assert [path.stem[3:] for path in _NOTEBOOKS] == [
        "quick_start", "structured_extraction", "classification", "nightly_job", "reading_with_duckdb",
    ]  # fmt: skip


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_the_real_engine(path: Path) -> None:
    assert "simulated" not in path.read_text()


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    monkeypatch.delenv("TOKENMILL_CACHE", raising=False)
    if _USERS_CACHE:
        monkeypatch.setenv("TOKENMILL_CACHE", _USERS_CACHE)
    notebook = nbformat.read(path, as_version=4)
    client(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    shown = str([cell.outputs for cell in code])
    assert "text/html" in shown or "text/plain" in shown
    assert "Traceback" not in shown
