"""Work that needs torch or an engine, in a process of its own: an order in, an answer out, progress by the line.

The process gets the environment that it needs from its first moment, gives its memory back with its end, and ends with whoever started
it. Knows nothing of what is asked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.supervisor import exit_words
from pipeline.worker import end_with_parent
from schemas.errors import JobError
from schemas.errors import TokenmillError

Say = Callable[[str], None]

_LOG_LINES = 15
_NO_SPACE = ("No space left on device", "Disk quota exceeded")


def run_child(
    module: str, order: dict[str, Any], *, environment: Mapping[str, str], say: Say, limit_s: float | None = None
) -> dict[str, Any]:
    """What `module`, whose main is `serve`, answers. Raises JobError with its reason, or with the end of its log where it just died.

    After `limit_s` it is ended, whatever it is at.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmill-child-") as name:
        folder = Path(name)
        (folder / "order.json").write_text(json.dumps(order))
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                stdin=subprocess.PIPE,  # its end tells the process that this one is gone
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C reaches this process only
            )
        late = threading.Event()
        timer = None if limit_s is None else threading.Timer(limit_s, _end_late, (process, late))
        try:
            assert process.stdout is not None
            if timer is not None:
                timer.start()
            for line in process.stdout:
                say(line.rstrip("\n"))
            code = process.wait()
        finally:
            if timer is not None:
                timer.cancel()
            _end(process)
        answer = folder / "answer.json"
        if answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text())
            if "failed" in found:
                raise JobError(found["failed"])
            return found
        tail = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-_LOG_LINES:])
        if late.is_set():
            raise JobError(f"{module} gave no answer within {limit_s:.0f} s and was ended. The end of its log:\n{tail}")
        hint = "; if the system ended it, this machine's memory was not enough" if code == -signal.SIGKILL else ""
        raise JobError(f"{module} ended with {exit_words(code)}{hint}. The end of its log:\n{tail}")


def _end_late(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    """With whatever it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(work: Callable[[dict[str, Any], Say], dict[str, Any]]) -> None:
    """The process's side: do what is ordered, answer, end. What libraries print goes to the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    folder = Path(sys.argv[1])
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        answer = work(json.loads((folder / "order.json").read_text()), lambda line: print(line, file=lines))
    except Exception as error:  # the process's outermost: whatever it was, its parent must hear of it
        traceback.print_exc()
        answer = {"failed": _reason(error)}
    partial = folder / "answer.partial"
    partial.write_text(json.dumps(answer))
    partial.rename(folder / "answer.json")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine's threads may not end by themselves


def _reason(error: Exception) -> str:
    if any(words in str(error) for words in _NO_SPACE) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"the disk is full: {error}; make room, then run the same command again"
    return str(error) if isinstance(error, TokenmillError) else f"{type(error).__name__}: {error}"
