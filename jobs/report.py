"""Report: where the seconds of a job's engines went and how near it came to the raw engine. From storage alone.

Run accounts (schemas/ledger.py) and the list of parts in; sums, statistics and shares out. Prints nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.accept import committed_units
from jobs.accept import load_job_of
from jobs.accounts import summed
from jobs.runs import read_runs
from jobs.spread import spread
from pipeline import storage
from schemas.errors import JobError
from schemas.ledger import KINDS
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What is known of all runs of a job."""

    name: str
    fingerprint: str
    out_uri: str
    runs: tuple[RunAccount, ...]
    replicas: tuple[ReplicaAccount, ...]
    """Over all runs, by name."""
    raw_tokens_per_s: float | None
    """Given from outside, or None."""
    unknown: tuple[str, ...]
    """What is not known, a sentence each."""
    left_out: tuple[str, ...]
    """Files that are no accounts of this job, a sentence each."""

    @property
    def elapsed_s(self) -> float:
        """Of all runs together, from each one's command to its end."""
        return sum(run.elapsed_s for run in self.runs)

    @property
    def num_requests(self) -> int:
        return sum(run.rows for run in self.runs)

    @property
    def output_tokens(self) -> int:
        return sum(run.output_tokens for run in self.runs)

    @property
    def prompt_tokens(self) -> int:
        return sum(run.prompt_tokens for run in self.runs)

    @property
    def output_tokens_per_s(self) -> float:
        return per_second(self.output_tokens, self.elapsed_s)

    @property
    def total_tokens_per_s(self) -> float:
        return per_second(self.output_tokens + self.prompt_tokens, self.elapsed_s)

    @property
    def share_of_raw_engine(self) -> float | None:
        """Output tokens/s over the whole wall as a share of the raw engines'; see share_of_raw."""
        if self.raw_tokens_per_s is not None:
            return self.output_tokens_per_s / self.raw_tokens_per_s
        return share_of_raw(*self.runs)

    def to_dict(self) -> dict[str, Any]:
        """For --json: plain data."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "output": self.out_uri,
            "share_of_raw_engine": rounded(self.share_of_raw_engine, 4),
            "share_of_raw_engine_once_up": rounded(share_of_raw(*self.runs, once_up=True), 4),
            "raw_tokens_per_s": rounded(self.raw_tokens_per_s, 2),
            "output_tokens_per_s": round(self.output_tokens_per_s, 2),
            "total_tokens_per_s": round(self.total_tokens_per_s, 2),
            "elapsed_s": round(self.elapsed_s, 3),
            "num_requests": self.num_requests,
            "output_tokens": self.output_tokens,
            "prompt_tokens": self.prompt_tokens,
            "copied_tokens": sum(run.copied_tokens for run in self.runs),
            "cached_prompt_tokens": sum(run.cached_prompt_tokens for run in self.runs),
            "reused_tokens": sum(run.reused_tokens for run in self.runs),
            "retries": sum(run.retries for run in self.runs),
            "seconds": {kind: round(sum(replica.seconds.get(kind, 0.0) for replica in self.replicas), 3) for kind in KINDS},
            "replicas": [described(replica) for replica in self.replicas],
            "statistics": statistics_of(self.replicas),
            "runs": [run_described(run) for run in self.runs],
            "unknown": list(self.unknown),
            "left_out": list(self.left_out),
        }


def report(out_uri: str, *, raw: str | None = None) -> Report:
    """All that storage says of the engine seconds of the job that writes there; `raw` is a result of `tokenmill bench engine`.

    Raises JobError where there is no job, no account of any run, or no such result.
    """
    out_uri = storage.absolute(out_uri)
    record, plan = load_job_of(out_uri)
    done = committed_units(out_uri, record.fingerprint)
    runs, left_out = read_runs(out_uri, record.fingerprint)
    if not runs:
        more = f" ({'; '.join(left_out)})" if left_out else ""
        if done:
            raise JobError(
                f"{out_uri} has {len(done)} of {len(plan.units)} units and no account of the runs that made them, as older versions of "
                f"Tokenmill left it (this job was begun by {record.tool_version}){more}; `tokenmill status` and `verify` can read it"
            )
        raise JobError(f"{out_uri} holds a job of which no run has ended or said anything yet{more}; `tokenmill run` it first")
    return Report(
        name=record.spec.name,
        fingerprint=record.fingerprint,
        out_uri=out_uri,
        runs=tuple(runs),
        replicas=over_runs(runs),
        raw_tokens_per_s=None if raw is None else read_raw(raw),
        unknown=unknown_of(runs, num_done=len(done)),
        left_out=tuple(left_out),
    )


def read_raw(path: str) -> float:
    """Output tokens/s out of a result of `tokenmill bench engine --json`. Raises JobError."""
    try:
        said = json.loads(Path(path).read_bytes())
        value = said["output_tokens_per_s"]
    except OSError as error:
        raise JobError(f"--raw: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        what = "has no output_tokens_per_s at its top level; give what `tokenmill bench engine --json` printed"
        raise JobError(f"--raw: {path} {what}") from None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise JobError(f"--raw: {path}: output_tokens_per_s is {value!r}, expected a number above 0")
    return float(value)


def share_of_raw(*runs: RunAccount, once_up: bool = False) -> float | None:
    """Output tokens of these runs as a share of what their replicas would have made at the raw rate, all the time.

    A replica's raw rate is what it generates in a second while its batch is at least half full; one that never was gets the mean
    of the others'. "All the time" is each run's wall, from its command to its end; once_up, the replicas' own seconds without
    their starts. None where no batch was ever half full. Tokens that were copied, or that earlier runs had saved, are output too.
    """
    rates = [rate for run in runs for replica in run.replicas if (rate := per_second(replica.busy_tokens, replica.busy_s))]
    if not rates:
        return None
    usual, possible = statistics.mean(rates), 0.0
    for run in runs:
        for replica in run.replicas:
            rate = per_second(replica.busy_tokens, replica.busy_s) or usual
            possible += rate * (replica.lifetime_s - replica.seconds.get("start", 0.0) if once_up else run.elapsed_s)
    return per_second(sum(run.output_tokens for run in runs), possible)


def over_runs(runs: Iterable[RunAccount]) -> tuple[ReplicaAccount, ...]:
    """One account a replica over all runs, by name."""
    by_name: defaultdict[str, list[ReplicaAccount]] = defaultdict(list)
    for run in runs:
        for replica in run.replicas:
            by_name[replica.name].append(replica)
    return tuple(summed(name, accounts) for name, accounts in sorted(by_name.items()))


def unknown_of(runs: Sequence[RunAccount], *, num_done: int) -> tuple[str, ...]:
    """Where the accounts end, in sentences."""
    sentences = []
    for number, run in enumerate(runs):
        if run.whole:
            continue
        what = "goes on, or ended" if number + 1 == len(runs) and run.state in ("starting", "running", "draining") else "ended"
        sentences.append(
            f"run {run.run} {what} without an account of its own: what it said last is counted, {run.elapsed_s:.0f} s after it began; "
            "what its replicas did after that is not known"
        )
    missing = num_done - sum(run.units for run in runs)
    if missing > 0:
        sentences.append(f"{missing} of {num_done} committed units are in no account: runs that died committed them after their last word")
    return tuple(sentences)


def described(replica: ReplicaAccount) -> dict[str, Any]:
    """One replica as plain data."""
    lifetime_s = replica.lifetime_s
    return {
        "name": replica.name,
        "processes": replica.processes,
        "lifetime_s": round(lifetime_s, 3),
        "seconds": {kind: round(replica.seconds.get(kind, 0.0), 3) for kind in KINDS},
        "rows": replica.rows,
        "prompt_tokens": replica.prompt_tokens,
        "generated_tokens": replica.generated_tokens,
        "output_tokens": replica.output_tokens,
        "output_tokens_per_s": round(per_second(replica.output_tokens, lifetime_s), 2),
        "raw_tokens_per_s": rounded(per_second(replica.busy_tokens, replica.busy_s) or None, 2),
    }


def run_described(run: RunAccount) -> dict[str, Any]:
    """One run as plain data."""
    values = run.model_dump(mode="json", exclude={"replicas", "fingerprint"})
    tokens = run.output_tokens + run.prompt_tokens
    return {
        **values,
        "share_of_raw_engine": rounded(share_of_raw(run), 4),
        "output_tokens_per_s": round(per_second(run.output_tokens, run.elapsed_s), 2),
        "total_tokens_per_s": round(per_second(tokens, run.elapsed_s), 2),
        "replicas": [described(replica) for replica in run.replicas],
    }


def statistics_of(replicas: Sequence[ReplicaAccount]) -> dict[str, dict[str, float]]:
    """Of every column, over replicas; see jobs.spread."""
    return spread(
        {
            "lifetime_s": [replica.lifetime_s for replica in replicas],
            **{kind: [replica.seconds.get(kind, 0.0) for replica in replicas] for kind in KINDS},
            "output_tokens": [replica.output_tokens for replica in replicas],
            "output_tokens_per_s": [per_second(replica.output_tokens, replica.lifetime_s) for replica in replicas],
        }
    )


def per_second(number: float, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
