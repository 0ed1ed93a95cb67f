"""Faults at two borders: every call of pipeline.storage that touches a store, and every message that a unit is sent or answered with.

Both are counted by what they are about, and fail where they are told to. A call is named by function, object and how often
that function was called for that object before; so the same fault point means the same call in every run, whatever the threads
do. "before": it fails and nothing happened. "after": it took effect, and fails all the same, as where an acknowledgement is
lost. "within": a file opens, and its first read fails.

On the inline cluster a message is a call: it is lost before the unit ran ("before"), its answer after it ran ("after"), or it
arrives twice ("twice"). Over Dask it is what a client sends and what it hears: a submission that cannot be sent ("before"), that
is sent all the same ("after") or that is sent twice ("twice"), and an answer that does not arrive after the unit has committed
("before") or that arrives twice ("twice").
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from typing import Literal

import pytest
from distributed import Client
from distributed import Future

from jobs.cluster.dask_units import DaskUnits
from jobs.cluster.inline import InlineCluster
from pipeline import storage
from pipeline.worker import run_unit_task
from schemas.errors import ReplicaLost
from schemas.unit import WorkUnit

When = Literal["before", "after", "within", "twice"]
Done = Callable[[Any], None]

MESSAGE = "message"
SUBMISSION, ANSWER = "submission", "answer"
"""Over Dask."""
DASK_MESSAGES: tuple[tuple[str, When], ...] = (
    (SUBMISSION, "before"), (SUBMISSION, "after"), (SUBMISSION, "twice"), (ANSWER, "before"), (ANSWER, "twice"),
)  # fmt: skip
_SETTLE_S = 60.0

PURE = frozenset({"absolute", "check_can_create", "commit_as", "join", "scheme_of", "web_address"})
"""Public functions of storage that touch no store."""
COMPOSITE = frozenset({"exists", "probe"})
"""Made of the others, whose calls are counted."""
_UNIQUE = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}|[0-9a-f]{32}")  # runs; segments


class Injected(OSError):
    """The fault."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Point:
    """One call of one function, and when in it."""

    function: str
    name: str
    """The object's URI without what is unique to a run."""
    number: int
    """Of a run's calls of that function for that object, from 1."""
    when: When


def store_calls() -> dict[str, Callable[..., Any]]:
    """Public functions of pipeline.storage that ask a store, by name."""
    functions = {
        name: value
        for name, value in vars(storage).items()
        if inspect.isfunction(value) and value.__module__ == storage.__name__ and not name.startswith("_")
    }
    return {name: value for name, value in functions.items() if name not in PURE | COMPOSITE}


class Faults:
    """Stands before pipeline.storage, for everything below one place, and behind the driver; `arm` names what fails, each once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._armed: set[Point] = set()
        self._unheard: list[Future] = []
        self.fired: list[Point] = []
        self.seen: set[Point] = set()
        for name, function in store_calls().items():
            monkeypatch.setattr(storage, name, self._guard(name, function))
        monkeypatch.setattr(InlineCluster, "submit", self._guard_messages(InlineCluster.submit))

    def stand_before_dask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on, also between this process's clients and their schedulers."""
        monkeypatch.setattr(Client, "submit", self._guard_submissions(Client.submit))
        monkeypatch.setattr(DaskUnits, "_report", self._guard_answers(DaskUnits._report))

    def arm(self, points: Iterable[Point] = ()) -> None:
        """Fail at these points from now on."""
        with self._lock:
            self._armed, self.fired, self.seen = set(points), [], set()

    def begin_run(self) -> None:
        """Calls are counted from here: a run's first call of a name is its first, whatever runs were before."""
        with self._lock:
            self._counts.clear()

    def settle(self) -> None:
        """Until the units have run whose submission nobody here knows of."""
        with self._lock:
            unheard, self._unheard = self._unheard, []
        for future in unheard:
            with contextlib.suppress(Exception):  # however it went
                future.result(timeout=_SETTLE_S)

    @property
    def waiting(self) -> int:
        """Armed points that nothing came to yet."""
        with self._lock:
            return len(self._armed)

    @property
    def num_calls(self) -> int:
        """Of this run."""
        with self._lock:
            return sum(self._counts.values())

    def _guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(uri: str, *args: Any, **kwargs: Any) -> Any:
            if not uri.startswith(self._root):
                return function(uri, *args, **kwargs)
            about = _UNIQUE.sub("*", uri)
            with self._lock:
                self._counts[name, about] += 1
                number = self._counts[name, about]
            if self._fails(name, about, number, "before"):
                raise self._error(name, about, "before it did anything")
            result = function(uri, *args, **kwargs)
            if self._fails(name, about, number, "after"):
                if name == "open_read":
                    result.close()
                raise self._error(name, about, "after it took effect")
            if name == "open_read" and self._fails(name, about, number, "within"):
                result = _Broken(result, self._error(name, about, "within"))
            return result

        return guarded

    def _guard_messages(self, submit: Callable[..., None]) -> Callable[..., None]:
        def guarded(cluster: Any, out_uri: str, fingerprint: str, unit: WorkUnit, attempt: int, done: Done, *where: Any) -> None:
            about = f"unit {unit.index}"
            with self._lock:
                self._counts[MESSAGE, about] += 1
                number = self._counts[MESSAGE, about]
            if self._fails(MESSAGE, about, number, "before"):
                done(ReplicaLost("injected: the message was lost"))
                return
            lost = self._fails(MESSAGE, about, number, "after")
            if self._fails(MESSAGE, about, number, "twice"):
                submit(cluster, out_uri, fingerprint, unit, attempt, lambda _: None, *where)
            answer = (lambda _: done(ReplicaLost("injected: the answer was lost"))) if lost else done
            submit(cluster, out_uri, fingerprint, unit, attempt, answer, *where)

        return guarded

    def _guard_submissions(self, submit: Callable[..., Future]) -> Callable[..., Future]:
        @functools.wraps(submit)
        def guarded(client: Client, function: Any, *args: Any, key: str | None = None, **kwargs: Any) -> Future:
            if function is not run_unit_task or not args[0].startswith(self._root):
                return submit(client, function, *args, key=key, **kwargs)
            about = f"unit {args[2]['index']}"
            number = self._count(SUBMISSION, about)
            if self._fails(SUBMISSION, about, number, "before"):
                raise self._error(SUBMISSION, about, "before it was sent")
            if self._fails(SUBMISSION, about, number, "twice"):
                self._keep(submit(client, function, *args, key=f"{key}-again", **kwargs))
            future = submit(client, function, *args, key=key, **kwargs)
            if self._fails(SUBMISSION, about, number, "after"):
                self._keep(future)  # or Dask would take it back
                raise self._error(SUBMISSION, about, "after it was sent")
            return future

        return guarded

    def _guard_answers(self, report: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(report)
        def guarded(units: DaskUnits, future: Future) -> None:
            about = f"unit {int(future.key.split('-')[2])}"
            number = self._count(ANSWER, about)
            lost = self._fails(ANSWER, about, number, "before")
            report(units, _Unanswered(future, self._error(ANSWER, about, "on its way")) if lost else future)
            if self._fails(ANSWER, about, number, "twice"):
                report(units, future)

        return guarded

    def _count(self, function: str, about: str) -> int:
        with self._lock:
            self._counts[function, about] += 1
            return self._counts[function, about]

    def _keep(self, future: Future) -> None:
        with self._lock:
            self._unheard.append(future)

    def _fails(self, function: str, name: str, number: int, when: When) -> bool:
        point = Point(function=function, name=name, number=number, when=when)
        with self._lock:
            self.seen.add(point)
            if point not in self._armed:
                return False
            self._armed.discard(point)
            self.fired.append(point)
            return True

    def _error(self, function: str, name: str, when: str) -> Injected:
        return Injected(errno.EIO, f"injected: {function} failed {when}", name)  # with a number, as storage promises


class _Broken:
    """A file whose next read fails, once."""

    def __init__(self, file: Any, error: OSError) -> None:
        self._file, self._error = file, error

    def read(self, *args: Any) -> bytes:
        if self._error is not None:
            error, self._error = self._error, None  # type: ignore[assignment]
            raise error
        data: bytes = self._file.read(*args)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Broken:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Unanswered:
    """A future whose result does not come, however well its task went."""

    def __init__(self, future: Future, error: OSError) -> None:
        self._future, self._error = future, error

    def result(self, timeout: float) -> Any:
        raise self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)
