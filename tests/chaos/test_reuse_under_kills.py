"""Reuse when the run is killed: between index and units, and in the middle of units."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.api import load_job
from jobs.api import run
from jobs.verify import verify
from schemas import layout
from schemas.errors import EXIT_DRAINED
from tests.commands import Command
from tests.conftest import read_output

pytestmark = pytest.mark.chaos

_ROWS = 320
_EDITED = range(0, _ROWS, 20)
_QUICK = {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "lengths": "max"}
_SLOW = {"decode_tokens_per_s": 60, "prefill_tokens_per_s": 1e6, "max_num_seqs": 5, "lengths": "max"}
"""Half the edited rows, of 8 tokens each, are about a second of a replica."""


class Site:
    """A finished job, and one beside it whose table has edited rows."""

    def __init__(self, folder: Path, model: Path, write_table: Callable[..., Path]) -> None:
        self.folder, self._model = folder, model
        self._write_table = write_table
        self.write("old", (), engine=_QUICK)
        assert run(load_job(self.job("old")), stream=io.StringIO()).exit_code == 0

    def job(self, name: str) -> Path:
        return self.folder / f"{name}.yaml"

    def out(self, name: str) -> Path:
        return self.folder / f"out-{name}"

    def write(self, name: str, edited: range | tuple[int, ...], *, engine: dict[str, Any], **sections: Any) -> None:
        rows = [{"id": row, "prompt": f"question {row}" + (", please" if row in edited else "")} for row in range(_ROWS)]
        inputs = self.folder / f"in-{name}" / "rows.parquet"
        if not inputs.exists():
            self._write_table(rows, f"in-{name}/rows.parquet")
        data = {
            "model": str(self._model),
            "input": {"uri": str(inputs), "prompt": "prompt"},
            "output": {"uri": str(self.out(name))},
            "sampling": {"max_tokens": 8},
            "engine": {"kind": "simulated", "options": engine},
            "cluster": {"kind": "inline"},
            **sections,
        }
        self.job(name).write_text(yaml.safe_dump(data))

    def index(self) -> list[Path]:
        folder = self.out("new") / layout.REUSE
        return sorted(folder.glob("*.parquet")) if folder.exists() else []

    def parts(self) -> int:
        return len(list(self.out("new").glob("part-*.parquet")))

    def run_until(self, what: str, condition: Callable[[], bool]) -> None:
        """The new job as a command, which is killed then."""
        started = Command(self.folder, "run", self.job("new").name)
        try:
            started.wait_for(what, condition)
        finally:
            started.kill()

    def finish(self) -> tuple[int, int, str]:
        """The same job again, quick: rows and reused rows of this run, and what it said."""
        self.write("new", _EDITED, engine=_QUICK, reuse=[str(self.out("old"))])
        said = io.StringIO()
        result = run(load_job(self.job("new")), stream=said)
        assert result.exit_code == 0
        verdict = verify(str(self.out("new")))
        assert verdict.complete, verdict.problems
        return result.this_run.rows, result.this_run.reused_rows, said.getvalue()


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path, write_table: Callable[..., Path]) -> Site:
    """See Site."""
    return Site(tmp_path, tiny_model, write_table)


def test_a_run_killed_between_index_and_units_goes_on_with_the_index(site: Site) -> None:
    site.write("new", _EDITED, engine={**_SLOW, "start_s": 60.0}, reuse=[str(site.out("old"))])
    site.run_until("the index", lambda: bool(site.index()))
    assert site.parts() == 0
    rows, reused, said = site.finish()
    assert "indexed by an earlier run" in said
    assert (rows, reused) == (_ROWS, _ROWS - len(_EDITED))


def test_a_run_killed_among_its_units_generates_no_row_that_was_answered(site: Site) -> None:
    site.write("new", _EDITED, engine=_SLOW, reuse=[str(site.out("old"))])
    site.run_until("three parts", lambda: site.parts() >= 3)
    there = {row["id"] for row in read_output(site.out("new")).to_pylist()}
    rows, reused, _ = site.finish()
    assert rows == _ROWS - len(there)
    assert rows - reused == len(set(_EDITED) - there)
    assert len(site.index()) == 1


def test_an_index_cut_short_by_a_kill_is_made_anew(site: Site) -> None:
    """Local files appear whole; a store that publishes what it has got would leave this."""
    site.write("new", _EDITED, engine={**_SLOW, "start_s": 60.0}, reuse=[str(site.out("old"))])
    site.run_until("the index", lambda: bool(site.index()))
    (index,) = site.index()
    index.write_bytes(index.read_bytes()[:200])
    rows, reused, said = site.finish()
    assert "indexed in" in said
    assert (rows, reused) == (_ROWS, _ROWS - len(_EDITED))


def test_units_that_a_machine_hands_back_take_their_rows_over_again(site: Site) -> None:
    """On SIGTERM, units in flight save what they have generated; what was taken over is counted once, and as that."""
    engine = {**_SLOW, "decode_tokens_per_s": 12}
    site.write("new", _EDITED, engine=engine, reuse=[str(site.out("old"))], cluster={"kind": "local", "replicas": 1})
    started = Command(site.folder, "run", site.job("new").name)
    try:
        started.wait_for("a part", lambda: site.parts() >= 1)
        started.send(signal.SIGTERM)
        assert started.end() == EXIT_DRAINED, started.log
    finally:
        started.kill()
    assert site.parts() < 32
    site.finish()
    manifest = pq.read_table(site.out("new") / layout.MANIFEST).to_pylist()
    assert sum(unit["reused_rows"] for unit in manifest) == _ROWS - len(_EDITED)
    assert sum(unit["resumed_rows"] for unit in manifest) <= len(_EDITED)
