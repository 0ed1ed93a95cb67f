"""The live display in a real kernel, with ipywidgets and without."""

from __future__ import annotations

from pathlib import Path

import pytest

_LOOKS = """
import sys
sys.modules.update({without!r})
from jobs.live import Live, View
live = Live()
for done in (4, 10):
    live.update(View(name="j", state="running", rows=10, rows_done=done, units=2, units_done=1))
live.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_widgets", [True, False], ids=["ipywidgets", "display"])
def test_a_notebook_keeps_one_display_with_the_last_view(with_widgets: bool, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    pytest.importorskip("ipywidgets")
    source = _LOOKS.format(without={} if with_widgets else {"ipywidgets": None})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = notebook.cells[0].outputs
    if with_widgets:
        assert "application/vnd.jupyter.widget-view+json" in output.data
        states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
        (shown,) = [each.state.value for each in states if each.model_name == "HTMLModel"]
    else:
        shown = output.data["text/html"]
    assert "10 of 10 (100%)" in shown
    assert "4 of 10" not in shown
