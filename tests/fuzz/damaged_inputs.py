"""Plan and run over damaged input files, in a process of its own: `python -m tests.fuzz.damaged_inputs MODEL FIRST COUNT`.

Arrow 26 ends the whole process (std::terminate) when it is asked for the column metadata of some damaged footers, which no test
in this process would survive. Prints `seed N` before each, `wrong N what` where anything but the project's errors came out.
"""

from __future__ import annotations

import functools
import io
import sys
import traceback
from pathlib import Path

import jobs.driver
import pipeline.replica
from jobs.api import plan
from jobs.api import run
from schemas.errors import JobError
from tests.fuzz.conftest import KIND_NAMES
from tests.fuzz.conftest import Finished
from tests.fuzz.conftest import damage

_RUN_EVERY = 4
"""A run takes ten times as long as a plan."""


def try_one(finished: Finished, seed: int) -> str:
    """What is wrong with how this damage was taken; empty where nothing is."""
    kind = KIND_NAMES[seed % len(KIND_NAMES)]
    finished.write("in/a.parquet", damage(finished.read("in/a.parquet"), seed, kind))
    unreadable = "skip" if seed // len(KIND_NAMES) % 2 else "refuse"
    job = finished.job(input={"unreadable": unreadable}, output={"uri": f"memory:/{finished.root}/elsewhere"})
    try:
        plan(job)
        if seed % _RUN_EVERY == 0:
            result = run(job, stream=io.StringIO())
            if result.state not in ("complete", "failed"):
                return f"it ended {result.state}"
            # Bytes that Parquet has no check for may come out as other values; they are then the table's.
            strange = [reason for reason in result.failed.values() if not reason.startswith(("UnitError", "InputChanged"))]
            return f"{kind}: {strange}" if strange else ""
    except JobError:
        return ""
    except Exception as error:
        return f"{kind}, unreadable {unreadable}: {error!r} {traceback.format_exc()[-700:]!r}"
    finally:
        finished.restore()
    return ""


def main(model: str, first: str, count: str) -> int:
    pipeline.replica.load_tokenizer = functools.cache(pipeline.replica.load_tokenizer)
    jobs.driver._BACKOFF_S = 0.001
    finished = Finished(Path(model))
    for seed in range(int(first), int(first) + int(count)):
        print(f"seed {seed}", flush=True)
        if wrong := try_one(finished, seed):
            print(f"wrong {seed} {wrong}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
