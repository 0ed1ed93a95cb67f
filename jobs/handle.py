"""Job: a handle on what writes to one output, from storage alone; what notebooks hold. Any machine, any time, any kind of cluster."""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import Any
from typing import Self

import pyarrow as pa

from jobs.canary_rows import canary_of
from jobs.canary_rows import some_of
from jobs.canary_rows import where
from jobs.drain import ask_to_drain
from jobs.live import Live
from jobs.live import View
from jobs.live import view_of
from jobs.outputs import Committed
from jobs.outputs import committed
from jobs.outputs import shown_columns
from jobs.report import Report
from jobs.report import report as read_job_report
from jobs.started import Started
from jobs.started import as_of
from jobs.started import not_planned
from jobs.started import spoken_since
from jobs.status import GOES_ON
from jobs.status import Status
from jobs.status import StatusReader
from jobs.status import read_status
from jobs.verify import Verdict
from jobs.verify import verify as verify_output
from pipeline import credentials
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.errors import TokenmillError

if TYPE_CHECKING:
    import pandas
    import polars

_LOOK_EVERY_S = 2.0
_PLAN_EVERY_S = 0.2
_PLAN_WITHIN_S = 60.0
"""So long rows are waited for of a process that has not stored its plan."""
_ENDED = ("complete", "failed", "limit", "drained", "interrupted")
_CELL_CHARACTERS = 300


class JobFailed(TokenmillError):
    """A job's process ended without doing all of it; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A few rows to look at: a table in notebooks, text elsewhere."""

    rows: tuple[dict[str, Any], ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        lines = ["\n".join(f"{name}: {_shown(value)}" for name, value in row.items() if value is not None) for row in self.rows]
        return "\n\n".join([*lines, self.note] if self.note else lines)

    def _repr_html_(self) -> str:
        names = list(self.rows[0]) if self.rows else []
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        style = "text-align:left;vertical-align:top;white-space:pre-wrap"
        cells = "".join(
            "<tr>" + "".join(f'<td style="{style}">{html.escape(_shown(row[name]))}</td>' for name in names) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table><p>{html.escape(self.note)}</p>"


class Job:
    """What writes to one output. Everything but `wait`'s end is read from storage, so `attach` gives as good a handle as `run`."""

    def __init__(self, output: str, started: Started | None = None) -> None:
        self.output = output
        """The folder or URI that the job writes to."""
        self._started = started
        self._reader = StatusReader(output)

    def status(self) -> Status:
        """How it stands. Raises JobError where there is no job, JobFailed where its process ended before it began."""
        return self._status(lambda: read_status(self.output))

    def wait(self, timeout_s: float | None = None, *, show: bool = True) -> Self:
        """Until it ends, or so many seconds, with a live display. An interrupt ends the waiting, not the job.

        Raises JobFailed where it was refused, units failed or its process was killed. Drained or at a limit it is over, too: see `status`.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        live = Live() if show else None
        try:
            while not self._over():
                if live is not None and (view := self._view()) is not None:
                    live.update(view)
                    self._show_canary(live, view)
                if until is not None and time.monotonic() >= until:
                    return self
                time.sleep(_LOOK_EVERY_S if until is None else max(0.0, min(_LOOK_EVERY_S, until - time.monotonic())))
            if live is not None and (view := self._view()) is not None:
                live.update(view)
                self._show_canary(live, view)
        except KeyboardInterrupt:
            print("the job goes on; .wait() waits again, .cancel() drains it", file=sys.stderr)
            return self
        finally:
            if live is not None:
                live.close()
        if self._started is not None and self._started.failed:
            raise JobFailed(self._started.why())
        return self

    def cancel(self) -> str:
        """Ask it to drain: what is in flight is finished and committed. Returns the state it was in."""
        state = self.status().state
        if state in GOES_ON:
            ask_to_drain(self.output)  # also before it has spoken: what is asked since it was started counts
        return state

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All committed rows in input order; while it runs, those so far, which is said on standard error."""
        return self._committed().read(columns)

    def to_pandas(self, columns: Sequence[str] | None = None) -> pandas.DataFrame:
        """As to_arrow. Raises JobError where pandas is not installed."""
        _need("pandas")
        return self.to_arrow(columns).to_pandas()

    def to_polars(self, columns: Sequence[str] | None = None) -> polars.DataFrame:
        """As to_arrow. Raises JobError where polars is not installed."""
        _need("polars")
        import polars

        frame = polars.from_arrow(self.to_arrow(columns))
        assert isinstance(frame, polars.DataFrame)
        return frame

    def errors(self) -> pa.Table:
        """The committed rows that came out as errors, with all columns."""
        return self._committed().errors()

    def sample(self, count: int = 5) -> Rows:
        """Rows from all over what is committed: what was asked and what came."""
        found = self._committed(say=False)
        rows = found.spread(count, shown_columns(found))
        return Rows(tuple(rows), "" if found.whole else _so_far(found))

    def report(self) -> Report:
        """Where the seconds of its engines went, over all its runs."""
        self._await_plan()
        return read_job_report(self.output)

    def page(self) -> str:
        """Write the report as one HTML page beside the output, of what is known so far; where it lies."""
        from jobs.reporting.write import write_report

        self._await_plan()
        (page,) = write_report(self.output)
        return page

    def verify(self) -> Verdict:
        """Proof that every input row is there once, in order, with its columns."""
        self._await_plan()
        return verify_output(self.output)

    def log(self, lines: int = 20) -> str:
        """The last lines of what its process said; empty for a job that was attached to."""
        return "\n".join(self._started.log_lines(lines)) if self._started is not None else ""

    def __repr__(self) -> str:
        try:
            status = self.status()
        except JobFailed:
            return f"Job({self.output!r}): ended before it began; .wait() says why"
        except JobError:
            return f"Job({self.output!r}): not begun yet"
        return f"Job({self.output!r}): {status.state}, {status.rows_done:,} of {status.rows:,} rows"

    def _over(self) -> bool:
        if self._started is not None:
            return self._started.exit_code is not None
        try:
            return self._reader.read().state in _ENDED
        except (JobError, OSError):
            if self._reader.hopeless:
                raise
            return False  # a store that does not answer now says nothing of the job

    def _status(self, read: Callable[[], Status]) -> Status:
        started = self._started
        if started is None:
            return read()
        over = started.exit_code is not None  # before storage is looked at, so that the last word is not missed
        if not over and not self._has_plan():
            return not_planned(started.name, storage.absolute(self.output))
        try:
            found = read()
        except JobError:
            if started.failed:
                raise JobFailed(started.why()) from None
            raise
        if started.failed and not spoken_since(found, started.asked_at):
            raise JobFailed(started.why())
        return as_of(found, asked_at=started.asked_at, over=over)

    def _show_canary(self, live: Live, view: View) -> None:
        """Its rows, once, as soon as they are all there."""
        if not view.canary_over or live.has_shown:
            return
        with contextlib.suppress(TokenmillError, OSError):  # tried again in a moment
            canary = canary_of(self.output)
            if canary.units:
                live.show(Rows(tuple(some_of(canary)), where(canary)), where(canary))

    def _committed(self, *, say: bool = True) -> Committed:
        self._await_plan()
        found = committed(self.output)
        if say and not found.whole:
            print(_so_far(found), file=sys.stderr)
        return found

    def _view(self) -> View | None:
        """None where there is nothing to see yet."""
        try:
            status = self._status(self._reader.read)
        except (TokenmillError, OSError):
            return None
        return view_of(status) if status.units else None

    def _has_plan(self) -> bool:
        try:
            return storage.exists(storage.join(storage.absolute(self.output), layout.PLAN))
        except NotADirectoryError:
            return False  # the output is a file, which its process will refuse

    def _await_plan(self) -> None:
        """Of a process that was just started. Raises JobFailed where it ends without one, JobError where it takes long."""
        until = time.monotonic() + _PLAN_WITHIN_S
        while (started := self._started) is not None:
            over = started.exit_code is not None
            if self._has_plan():
                return
            if over:
                raise JobFailed(started.why())
            if time.monotonic() >= until:
                what = f"no plan for {_PLAN_WITHIN_S:.0f} s, so no rows yet"
                raise JobError(f"{self.output}: {what}; .wait() waits on, .log() has its process's words")
            time.sleep(_PLAN_EVERY_S)


def attach(output: str, *, storage: Mapping[str, Any] | None = None) -> Job:
    """The handle of the job that writes, or wrote, to an output. Raises JobError where there is none.

    `storage` says how Azure is reached, as in a job file; left out, as this process reached it before.
    """
    if storage is not None:
        credentials.use(credentials.parse(storage))
    read_status(output)
    return Job(output)


def _so_far(found: Committed) -> str:
    return f"so far: {found.rows:,} of {found.rows_planned:,} rows are committed"


def _shown(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _CELL_CHARACTERS else text[: _CELL_CHARACTERS - 1] + "…"


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise JobError(f"{package} is not installed: pip install {package}, or take .to_arrow()")
