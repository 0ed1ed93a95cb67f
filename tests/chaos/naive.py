"""What many people write first: `open("wb")` over the part's name, and a marker file for resuming. The checker's negative control.

`python -m tests.chaos.naive MODE IN OUT` does the units that have no marker and ends with 0 once all have one.

  marker_last    a part is named by its attempt, its marker is written after it
  marker_first   the marker is written before the part ("nobody else takes this unit now")
  overwrite      a part is named by its unit, and whoever comes last has written it
"""

from __future__ import annotations

import io
import sys
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MODES = ("marker_last", "marker_first", "overwrite")
UNIT_ROWS = 8
_STEP_S = 0.01
"""Between one step and the next, as a store that answers over a network takes."""


def main(mode: str, input_path: str, out: str) -> int:
    folder, attempt = Path(out), uuid.uuid4().hex[:8]
    (folder / "markers").mkdir(parents=True, exist_ok=True)
    table = pq.read_table(input_path)
    for unit in range(-(-table.num_rows // UNIT_ROWS)):
        marker = folder / "markers" / f"{unit:04d}"
        if marker.exists():
            continue
        rows = table.slice(unit * UNIT_ROWS, UNIT_ROWS)
        if mode == "marker_first":
            marker.touch()
            time.sleep(_STEP_S)
        name = f"part-{unit:04d}-{attempt}.parquet" if mode == "marker_last" else f"part-{unit:04d}.parquet"
        _write(folder / name, _answered(rows, attempt))
        if mode != "marker_first":
            time.sleep(_STEP_S)
            marker.touch()
    return 0


def _answered(rows: pa.Table, attempt: str) -> pa.Table:
    """Two attempts never say quite the same, as with a model's text."""
    count = rows.num_rows
    return (
        rows.append_column("completion", pa.array([f"as {attempt} sees it" for _ in range(count)]))
        .append_column("error", pa.nulls(count, pa.struct([("kind", pa.string()), ("message", pa.string())])))
        .append_column("completion_tokens", pa.array([5] * count, pa.int32()))
    )


def _write(path: Path, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    with path.open("wb") as file:
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            file.write(half)
            file.flush()
            time.sleep(_STEP_S)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
