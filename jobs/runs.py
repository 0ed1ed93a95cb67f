"""Runs: the accounts of a job's runs, in storage. Each is created once when its run ends.

A run that does not live to do so leaves its last word in status.json, which the next run puts beside the others before it
overwrites it. Nothing here is needed to go on with a job.
"""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from collections.abc import Iterable
from datetime import UTC
from datetime import datetime

from pydantic import ValidationError

from jobs.accept import Accepted
from jobs.caps import Earlier
from jobs.cluster.cluster import node_of
from jobs.driver import Driver
from jobs.driver import Progress
from jobs.status import STALE_AFTER_S
from pipeline import storage
from pipeline.versions import versions
from schemas import layout
from schemas.errors import describe_validation
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount

_SUFFIX, _LAST_WORD_SUFFIX = ".json", ".last.json"
_RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}")


class RunLog:
    """The account of a run that is under way. Used by its driver's thread alone."""

    def __init__(self, accepted: Accepted, *, profile: str, began: float) -> None:
        """A run that began at this moment (monotonic seconds)."""
        self._accepted, self._profile, self._began = accepted, profile, began
        self._began_at = time.time() - (time.monotonic() - began)
        self._run = f"{datetime.fromtimestamp(self._began_at, UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"

    def so_far(self, driver: Driver) -> RunAccount:
        """Of a run that goes on, and what it would come to if it ended now."""
        ended = {replica.name: replica.seconds for replica in driver.accounts(over=True)}
        replicas = driver.accounts(over=False)
        marked = [replica.model_copy(update={"seconds_if_over": ended.get(replica.name)}) for replica in replicas]
        return self._account(driver.progress, marked, whole=False)

    def at_end(self, driver: Driver) -> RunAccount:
        """Of a run whose driver is done; engine seconds end here."""
        return self._account(driver.progress, driver.accounts(over=True), whole=False)

    def store(self, account: RunAccount) -> RunAccount:
        """The same with the time since, as it lies in storage now. Raises OSError."""
        whole = account.model_copy(update={"whole": True, "ended_at": time.time(), "elapsed_s": self._elapsed_s()})
        uri = storage.join(self._accepted.out_uri, layout.RUNS, f"{whole.run}{_SUFFIX}")
        storage.create_once(uri, whole.model_dump_json(indent=1).encode())
        return whole

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _account(self, progress: Progress, replicas: Iterable[ReplicaAccount], *, whole: bool) -> RunAccount:
        totals = progress.totals
        return RunAccount(
            run=self._run,
            fingerprint=self._accepted.record.fingerprint,
            state=progress.state,
            host=socket.gethostname(),
            whole=whole,
            began_at=self._began_at,
            ended_at=time.time(),
            elapsed_s=self._elapsed_s(),
            node_s=round(progress.node_s, 3),
            units=totals.units,
            rows=totals.rows,
            error_rows=totals.error_rows,
            prompt_tokens=totals.prompt_tokens,
            output_tokens=totals.completion_tokens - totals.reused_tokens,
            copied_tokens=totals.copied_tokens,
            cached_prompt_tokens=totals.cached_prompt_tokens,
            reused_tokens=totals.reused_tokens,
            retries=progress.retries,
            doubled=progress.doubled,
            profile=self._profile,
            usd_per_hour=self._accepted.usd_per_hour,
            engine=progress.engine,
            versions=versions(),
            replicas=tuple(replicas),
        )


def keep_last_word(out_uri: str, fingerprint: str) -> None:
    """If the last run died, store what it said last; to be called before its status is overwritten. Raises OSError."""
    account = last_word(out_uri, fingerprint)
    if account is None:
        return
    names = _names(out_uri)
    name = f"{account.run}{_LAST_WORD_SUFFIX}"
    if not names & {f"{account.run}{_SUFFIX}", name}:
        try:
            storage.create_once(storage.join(out_uri, layout.RUNS, name), account.model_dump_json(indent=1).encode())
        except FileExistsError:
            return  # another driver had the same thought


def last_word(out_uri: str, fingerprint: str, *, now: float | None = None) -> RunAccount | None:
    """What the driver that spoke last had to account for; None where nothing can be understood.

    As if its run had ended with that; given `now` (Unix seconds), so only where it should have spoken again since.
    """
    try:
        said = json.loads(storage.read_bytes(storage.join(out_uri, layout.STATUS)))
        account = RunAccount.model_validate_json(json.dumps(said["account"]))
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if account.fingerprint != fingerprint or not _RUN.fullmatch(account.run):
        return None
    goes_on = now is not None and account.state in ("starting", "running", "draining") and now - account.ended_at < STALE_AFTER_S
    return account.model_copy(update={"whole": False, "replicas": tuple(_ended(replica, goes_on) for replica in account.replicas)})


def _ended(replica: ReplicaAccount, goes_on: bool) -> ReplicaAccount:
    seconds = replica.seconds if goes_on else replica.seconds_if_over or replica.seconds
    return replica.model_copy(update={"seconds": seconds, "seconds_if_over": None})


def read_runs(out_uri: str, fingerprint: str) -> tuple[list[RunAccount], list[str]]:
    """A job's accounts in the order in which its runs began, and a sentence about each file that is none of them. Raises OSError."""
    names, accounts, problems = _names(out_uri), {}, []
    for name in sorted(names):
        if name.endswith(_LAST_WORD_SUFFIX) and name.removesuffix(_LAST_WORD_SUFFIX) + _SUFFIX in names:
            continue  # it lived after all
        run = name.removesuffix(_LAST_WORD_SUFFIX).removesuffix(_SUFFIX)
        where = f"{layout.RUNS}/{name}"
        try:
            account = RunAccount.model_validate_json(storage.read_bytes(storage.join(out_uri, layout.RUNS, name)))
        except ValidationError as error:
            why = describe_validation(error, show_found=False).splitlines()[0]
            problems.append(f"{where} is no account of a run and is left out: {why}")
            continue
        if account.fingerprint != fingerprint:
            problems.append(f"{where} is of job {account.fingerprint[:8]}, not {fingerprint[:8]}, and is left out")
        elif account.run != run:
            problems.append(f"{where} says that it is of run {account.run[:40]}, and is left out")
        else:
            accounts[run] = account
    last = last_word(out_uri, fingerprint, now=time.time())
    if last is not None and last.run not in accounts:
        accounts[last.run] = last
    return sorted(accounts.values(), key=lambda account: (account.began_at, account.run)), problems


def earlier_of(out_uri: str, fingerprint: str, *, since: float, until: float) -> Earlier:
    """What a command took from its first driver's begin to that of this one (Unix seconds). Raises OSError.

    Nodes stay while a driver is away: those of the last run before it cost all that time.
    """
    runs = [run for run in read_runs(out_uri, fingerprint)[0] if run.began_at >= since]
    begins = [*(run.began_at for run in runs[1:]), until]
    away_s = sum(
        max(0.0, begin - run.ended_at) * len({node_of(replica.name) for replica in run.replicas})
        for run, begin in zip(runs, begins, strict=False)
    )
    return Earlier(seconds=max(0.0, until - since), node_s=away_s + sum(run.node_s or 0.0 for run in runs))


def _names(out_uri: str) -> set[str]:
    return {name for name in storage.list_names(storage.join(out_uri, layout.RUNS)) if not name.startswith(".")}
