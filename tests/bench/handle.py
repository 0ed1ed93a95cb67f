"""What a notebook waits for: attaching to a large job, its rows in input order, and what the live display costs.

    .venv/bin/python -m tests.bench.handle --rows 1000000

Asked of a job of a million rows: attach under 3 s, to_arrow under 10 s on local disk, refreshes under 1 % of a core.
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
from jobs.live import look
from tests.bench.report import build

_ROWS_PER_UNIT = 2048
_LOOKS = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
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
        began = time.process_time()
        for _ in range(_LOOKS):
            view = look(out)
            assert view is not None
            in_html(view)
        refresh_s = (time.process_time() - began) / _LOOKS
    figures: dict[str, Any] = {
        "rows": table.num_rows,
        "units": units,
        "attach_s": round(attach_s, 3),
        "to_arrow_s": round(arrow_s, 3),
        "to_arrow_of_one_column_s": round(column_s, 3),
        "sample_s": round(sample_s, 3),
        "refresh_cpu_s": round(refresh_s, 4),
        "refresh_share_of_a_core": round(refresh_s / _LOOK_EVERY_S, 4),
    }
    assert few.num_rows == table.num_rows
    print(json.dumps(figures, indent=1))
    return 0


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    made = call()
    return made, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
