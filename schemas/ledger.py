"""The engine ledger's values: what a replica says of its seconds (Reading), and what a run makes of that (RunAccount)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from typing import Any
from typing import Literal
from typing import get_args

from pydantic import Field

from schemas.sampling import Frozen

Kind = Literal["start", "busy", "starved", "commit_blocked", "tail", "lost"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every second of a replica is of one of these kinds.

start            from its process's spawn until its engine is up
busy             prefill and decode with the batch at least half full
starved          the batch under half full, or empty, and more rows came later
commit_blocked   the same, while some of its units wrote or committed and none read
tail             the batch under half full, or empty, and no row came any more
lost             generating what was thrown away or generated again, and the time that a dead process took with it
"""

_Seconds = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one replica process's ledger says at one moment. start_s, busy_s, the starved and the blocked add up to age_s."""

    engine: str
    """Unique for each process that owned an engine."""
    age_s: float
    """Since the process was spawned."""
    start_s: float
    busy_s: float
    starved_s: float
    blocked_s: float
    pending_starved_s: float
    """Starved if another row comes, tail if none does."""
    pending_blocked_s: float
    working_s: float
    """Of the starved and the blocked: with at least one row in the engine."""
    full: bool
    """Whether the batch is at least half full."""
    rows: int
    """Answered."""
    prompt_tokens: int
    generated_tokens: int
    """Output tokens, also of rows that are not finished, as of the last second or so."""
    busy_tokens: int
    """Those that were generated in busy_s."""
    kept_tokens: int
    """Those that were committed, or saved for a later attempt."""


class ReplicaAccount(Frozen):
    """One replica's part in a run: all its processes, one after the other."""

    name: str
    processes: _Count
    """How often it was started, as far as the driver saw; 0 where it was not ready when the run ended."""
    seconds: dict[Kind, _Seconds]
    """By kind; they add up to the replica's time in the run."""
    seconds_if_over: dict[Kind, _Seconds] | None = None
    """While the run goes on: what they would come to if it ended now."""
    rows: _Count
    prompt_tokens: _Count
    generated_tokens: _Count
    output_tokens: _Count
    """Those that were committed, or saved for a later attempt."""
    busy_s: _Seconds
    """With the batch at least half full, for whatever came of it."""
    busy_tokens: _Count
    """Generated in that time."""

    @property
    def lifetime_s(self) -> float:
        return sum(self.seconds.values())


class RunAccount(Frozen):
    """What one run of a job came to. Lies in _tokenmill/runs/, and while the run goes on in status.json."""

    run: str
    fingerprint: str
    state: str
    host: str
    whole: bool
    """False for a run that did not live to write its account: the last that it said."""
    began_at: float
    """Unix seconds."""
    ended_at: float
    elapsed_s: _Seconds
    node_s: _Seconds | None = None
    """Seconds of all nodes together, from when each came until it went, as the driver saw them; None in earlier versions' accounts."""
    units: _Count
    """Committed by this run, like all that follows."""
    rows: _Count
    error_rows: _Count
    prompt_tokens: _Count
    output_tokens: _Count
    """Also those that were copied, or that earlier runs had saved; not those that were taken over from earlier outputs."""
    copied_tokens: _Count = 0
    """Of rows that asked the same as another."""
    cached_prompt_tokens: _Count = 0
    """That engines had in their prefix caches, of the prompt tokens."""
    reused_tokens: _Count = 0
    """Of rows that an earlier output had answered."""
    retries: _Count
    doubled: _Count = 0
    """Units that were run a second time because they held up the end."""
    profile: str
    usd_per_hour: Annotated[float, Field(gt=0)] | None = None
    """What a node cost, as far as that run knew."""
    engine: dict[str, Any]
    """kind, version, dtype, options: of the replica heard of first."""
    versions: dict[str, str]
    replicas: tuple[ReplicaAccount, ...]
