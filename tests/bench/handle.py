"""What a notebook waits for: attaching to a large job, its rows in input order, and what the live display costs.

    .venv/bin/python -m tests.bench.handle --rows 1000000 --units 10000

Asked of a job of a million rows: attach under 3 s, to_arrow under 10 s on local disk, refreshes under 1 % of a core; these of a job of
`--units` units, too, of 16 rows each. A refresh is all that one round of `wait` does, while 72 replicas run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
from jobs.handle import _LOOK_EVERY_S
from jobs.live import in_html
from tests.bench.report import build

_ROWS_PER_UNIT = 2048
_FEW_ROWS = 16
_LOOKS = 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=10_000)
    options = parser.parse_args(arguments)
    units = -(-options.rows // _ROWS_PER_UNIT)
    with tempfile.TemporaryDirectory(prefix="tokenmill-handle-") as folder:
        print(f"building {units:,} units of {_ROWS_PER_UNIT:,} rows, eight of them not committed yet", file=sys.stderr)
        out = str(build(Path(folder), units=units, rows=_ROWS_PER_UNIT, replicas=72, done=max(1, units - 8)))
        job, attach_s = _timed(lambda: jobs.attach(out))
        table, arrow_s = _timed(job.to_arrow)
        assert table.column("id").to_pylist() == list(range(table.num_rows))
        few, column_s = _timed(lambda: job.to_arrow(["completion"]))
        _, sample_s = _timed(lambda: job.sample(5))
        refresh_s = _refresh_s(out)
    with tempfile.TemporaryDirectory(prefix="tokenmill-handle-") as folder:
        print(f"building {options.units:,} units of {_FEW_ROWS} rows, eight of them not committed yet", file=sys.stderr)
        many = build(Path(folder), units=options.units, rows=_FEW_ROWS, replicas=72, done=max(1, options.units - 8))
        refresh_of_many_s = _refresh_s(str(many))
    figures: dict[str, Any] = {
        "rows": table.num_rows,
        "units": units,
        "attach_s": round(attach_s, 3),
        "to_arrow_s": round(arrow_s, 3),
        "to_arrow_of_one_column_s": round(column_s, 3),
        "sample_s": round(sample_s, 3),
        "refresh_cpu_s": round(refresh_s, 4),
        "refresh_share_of_a_core": round(refresh_s / _LOOK_EVERY_S, 4),
        f"refresh_cpu_s_of_{options.units}_units": round(refresh_of_many_s, 4),
        f"refresh_share_of_a_core_of_{options.units}_units": round(refresh_of_many_s / _LOOK_EVERY_S, 4),
    }
    assert few.num_rows == table.num_rows
    print(json.dumps(figures, indent=1))
    return 0


def _refresh_s(out: str) -> float:
    """CPU seconds of a round of `wait`, the first one left out."""
    job = jobs.attach(out)
    for number in range(_LOOKS + 1):
        if number == 1:
            began = time.process_time()
        assert not job._over()
        view = job._view()
        assert view is not None
        in_html(view)
    return (time.process_time() - began) / _LOOKS


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    made = call()
    return made, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
