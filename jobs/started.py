"""A job's process that outlives whoever started it: `tokenmill run` with its log in the user's cache; how its job stands meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from jobs.driver import ASKED_AT
from jobs.status import GOES_ON
from jobs.status import Status
from pipeline.model import cache_folder
from schemas.errors import EXIT_COMPLETE
from schemas.errors import EXIT_DRAINED
from schemas.errors import EXIT_LIMIT_REACHED
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import EXIT_WRONG_JOB
from schemas.job import JobSpec

_GOOD_ENDS = (EXIT_COMPLETE, EXIT_LIMIT_REACHED, EXIT_DRAINED)
_SAYS = "tokenmill: "
_LAST_LINES = 8
_LOG_LINES = 200


class Started:
    """One process. It has a session of its own: neither a kernel's interrupt nor its restart reaches it."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, *, name: str, asked_at: float) -> None:
        self._process, self.log_path, self.name = process, log_path, name
        self.asked_at = asked_at
        """Unix seconds; a status of an earlier moment is an earlier run's."""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def failed(self) -> bool:
        """Whether it is over and did not do all that it could; drained, or at a limit, is no failure."""
        return self.exit_code not in (None, *_GOOD_ENDS)

    def why(self) -> str:
        """Of one that failed: what it said last, and what to do."""
        exit_code = self.exit_code
        return why_it_ended(0 if exit_code is None else exit_code, self.log_lines(_LOG_LINES), self.log_path)

    def log_lines(self, count: int) -> list[str]:
        """The last ones."""
        try:
            return self.log_path.read_text(errors="replace").splitlines()[-count:]
        except OSError:
            return []


def start(job: JobSpec) -> Started:
    """`tokenmill run`, with the job file and the log beside each other in the user's cache."""
    folder = cache_folder() / "started" / f"{time.strftime('%Y%m%d-%H%M%S')}-{job.name}-{uuid.uuid4().hex[:6]}"
    folder.mkdir(parents=True)
    file, log_path = folder / "job.yaml", folder / "log"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
    asked_at = time.time()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "run", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", ASKED_AT: repr(asked_at)},
        )
    return Started(process, log_path, name=job.name, asked_at=asked_at)


def spoken_since(found: Status, moment: float) -> bool:
    """Whether the driver's last word is of a run that was asked for then, or later."""
    began_at = found.said.get("began_at", 0.0)
    return isinstance(began_at, int | float) and began_at >= moment


def as_of(found: Status, *, asked_at: float, over: bool) -> Status:
    """What storage says of a run whose process is known: an earlier run's last word is none of its own, and silence is no end of it."""
    if over:
        return replace(found, state="interrupted") if found.state in GOES_ON else found
    if not spoken_since(found, asked_at):
        return replace(found, state="starting", said={}, age_s=None)
    return replace(found, state=found.said["state"]) if found.state == "interrupted" else found


def not_planned(name: str, out_uri: str) -> Status:
    """How a job stands whose process has stored nothing yet."""
    return Status(
        name=name, fingerprint="", out_uri=out_uri, state="starting", units_done=0, units=0, rows_done=0, rows=0, said={}, age_s=None
    )


def why_it_ended(exit_code: int, log: Sequence[str], log_path: Path) -> str:
    """In words, of a process that did not end well: what it said last, and what to do."""
    first = next((index for index, line in enumerate(log) if line.startswith(_SAYS)), None)
    said = list(log[-_LAST_LINES:]) if first is None else [log[first].removeprefix(_SAYS), *log[first + 1 :]]
    lines = [*said, f"its log: {log_path}"]
    if exit_code == EXIT_WRONG_JOB and said:
        return "\n".join(lines)
    return "\n".join([f"{_how_it_ended(exit_code)}; what was committed stays: run the same again, it goes on from there", *lines])


def _how_it_ended(exit_code: int) -> str:
    if exit_code == EXIT_UNITS_FAILED:
        return "not all of the job is done (exit code 1)"
    if exit_code >= 0:
        return f"the job's process ended with exit code {exit_code}"
    if exit_code == -signal.SIGKILL:
        return "the job's process was killed (SIGKILL), as Linux does where memory runs out"
    try:
        return f"the job's process was ended by a signal ({signal.Signals(-exit_code).name})"
    except ValueError:
        return f"the job's process was ended by signal {-exit_code}"
