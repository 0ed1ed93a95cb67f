"""A job's process that outlives whoever started it: `tokenmill run` with its log in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import yaml

from pipeline.model import cache_folder
from schemas.job import JobSpec


class Started:
    """One process. It has a session of its own: neither a kernel's interrupt nor its restart reaches it."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self._process, self.log_path = process, log_path

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

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
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "run", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return Started(process, log_path)
