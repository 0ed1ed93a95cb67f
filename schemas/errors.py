"""What can go wrong, as types. A row that cannot be done is not here: it is data (see `completions.RowError`).

TokenmillError
  JobError            the job is wrong; refused before anything starts
  UnitError           one unit of work cannot be done; retried, then reported
    InputChanged      an input object is not the one that was planned
    ReplicaLost       the replica, or the way to it, went away; says nothing about the unit
  ForeignOutput       the output holds something that is not this job's; everything stops
  EngineError
    EngineStartError  the engine did not come up
    EngineDead        the engine died while rows were in it
      EngineEvicted   the engine was asked to leave
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from pydantic import ValidationError

EXIT_COMPLETE = 0
EXIT_UNITS_FAILED = 1
EXIT_WRONG_JOB = 2
EXIT_LIMIT_REACHED = 3
EXIT_DRAINED = 130


class TokenmillError(Exception):
    """Base of every error that a user of Tokenmill may meet."""

    exit_code = EXIT_UNITS_FAILED
    said: dict[str, Any] | None = None
    """Of the replica on which it happened: its name, and what its ledger said then."""

    def _render_traceback_(self) -> list[str]:
        """For IPython: the message is all that helps."""
        return [f"{type(self).__name__}: {self}"]


class JobError(TokenmillError):
    """The job is wrong. The message says where, what was found, what is allowed."""

    exit_code = EXIT_WRONG_JOB


class UnitError(TokenmillError):
    """One unit of work cannot be done."""


class InputChanged(UnitError):
    """An input object is not the one that was planned."""


class ReplicaLost(UnitError):
    """The replica, or the way to it, went away. Says nothing about the unit, so that it costs the unit no attempt."""


class ForeignOutput(TokenmillError):
    """The output holds an object that is not this job's, under a name that this job needs."""

    exit_code = EXIT_WRONG_JOB


class EngineError(TokenmillError):
    """Something is wrong with the engine."""


class EngineStartError(EngineError):
    """The engine did not come up. The message carries the cause that the engine itself gave."""

    exit_code = EXIT_WRONG_JOB


class EngineDead(EngineError):
    """The engine died while rows were in it."""


class EngineEvicted(EngineDead):
    """The engine was asked to leave, and stopped between two steps."""

    def __init__(self, message: str, begun: dict[int, list[int]] | None = None) -> None:
        super().__init__(message)
        self.begun = begun or {}
        """Token ids that unfinished rows had got so far, by position."""


def root_cause(error: BaseException) -> str:
    """What lies under the words of those who passed an error on, such as a refused certificate under a failed connection."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):  # a cancelled wait is no cause
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def describe_validation(error: ValidationError, *, show_found: bool = True) -> str:
    """One line per problem: the field's path, what is allowed, what was found. Never a secret, nor anything under `storage`."""
    from schemas.storage import looks_secret

    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join("(not shown)" if looks_secret(str(part)) else str(part) for part in problem["loc"]) or "(the whole)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key")
            continue
        value = problem["input"]  # what lies in a container is not ours to show, and may be endless
        found = f"a {type(value).__name__}" if value and isinstance(value, dict | list | tuple | set) else repr(value)
        if not show_found or problem["loc"][:1] == ("storage",) or looks_secret(value if isinstance(value, str) else found):
            found = "a value that is not shown"
        if len(found) > 80:
            found = found[:77] + "..."
        message = problem["msg"].removeprefix("Value error, ")
        # A model's own validator is handed the whole model, and a missing field its parent; the message already says it.
        shown = "" if problem["type"] in ("value_error", "missing") else f" (found {found})"
        lines.append(f"{path}: {message}{shown}")
    return "\n".join(lines)
