"""What the command line, scheduled jobs and notebooks call: run, plan, verify, status, cancel."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import Self
from typing import TextIO

import yaml

from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from jobs.canary_rows import canary_of
from jobs.canary_rows import some_of
from jobs.canary_rows import where
from jobs.caps import caps_of
from jobs.cluster.cluster import Cluster
from jobs.driver import LIGHTEST
from jobs.driver import Driver
from jobs.driver import Progress
from jobs.driver import units_at_once
from jobs.finish import finish
from jobs.finish import read_reports
from jobs.metrics import RunMetrics
from jobs.metrics import addresses
from jobs.metrics import served
from jobs.metrics import snapshot
from jobs.plan import Taken
from jobs.plan import canary_rows
from jobs.plan import canary_units
from jobs.progress import Display
from jobs.progress import LiveDisplay
from jobs.progress import Speed
from jobs.progress import SpeedMeter
from jobs.progress import make_display
from jobs.runs import RunLog
from jobs.runs import earlier_of
from jobs.runs import keep_last_word
from jobs.status import cancel as cancel
from jobs.status import read_status as status
from jobs.status import write_status
from jobs.summary import RunResult
from jobs.verify import verify as verify
from pipeline import storage
from pipeline.engine.continuous import window_rows
from pipeline.eviction import watch_evictions
from pipeline.profile import cut_machine
from schemas.errors import EXIT_COMPLETE
from schemas.errors import EXIT_DRAINED
from schemas.errors import EXIT_LIMIT_REACHED
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.ledger import RunAccount
from schemas.manifest import Totals
from schemas.manifest import UnitReport

if TYPE_CHECKING:
    from jobs.reuse import Earlier

__all__ = ["PlanReport", "RunResult", "StoppedAtOnce", "cancel", "load_job", "plan", "run", "status", "verify"]

_STATUS_EVERY_S = 5.0
_YAML_CHARACTERS = 500
_CANARY_CHARACTERS = 300
_EXIT_CODES = {"complete": EXIT_COMPLETE, "failed": EXIT_UNITS_FAILED, "limit": EXIT_LIMIT_REACHED, "drained": EXIT_DRAINED}


class StoppedAtOnce(KeyboardInterrupt):
    """A second Ctrl-C: nothing was waited for; what was committed stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """What a run would do."""

    accepted: Accepted
    replicas: int | None
    """None where the nodes of a cluster decide."""
    profile: str
    earlier: tuple[Earlier, ...] = ()
    """Outputs whose answers may be taken over."""


def load_job_data(path: str | Path) -> dict[str, Any]:
    """A job file's mapping, not yet checked. Raises JobError."""
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}; give a job file, or --model, --input, --prompt and --output") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date, number or character that is none
        raise JobError(f"{path} is not YAML: {' '.join(str(error).split())[:_YAML_CHARACTERS]}") from None
    except RecursionError:
        raise JobError(f"{path} is nested too deeply for a job file") from None
    if not isinstance(data, dict):
        raise JobError(f"{path} holds {type(data).__name__}, expected a mapping with model, input and output")
    return data


def load_job(path: str | Path) -> JobSpec:
    """Read a job file. Raises JobError."""
    try:
        return parse_job(load_job_data(path))
    except JobError as error:
        raise JobError(f"{path}:\n{error}") from None


def plan(job: JobSpec) -> PlanReport:
    """Check a job and say what a run would do; writes nothing, starts nothing. Raises JobError."""
    from jobs.reuse import find_earlier  # loads the tokenizer's library

    accepted = accept(job)
    earlier = find_earlier(accepted)
    if job.cluster.kind in ("address", "azure-batch"):
        return PlanReport(accepted=accepted, replicas=None, profile="each node's own", earlier=earlier)
    cut = accepted.cut or cut_machine(job.engine, accepted.model, replicas=job.cluster.replicas)
    return PlanReport(accepted=accepted, replicas=cut.replicas, profile=cut.profile, earlier=earlier)


def run(
    job: JobSpec,
    *,
    stream: TextIO | None = None,
    taken: Taken = frozenset(),
    cluster_of: Callable[[Accepted], Cluster] | None = None,
    since: float | None = None,
) -> RunResult:
    """Run a job to its end, or on from where an earlier run stopped.

    A new plan leaves out what is `taken`. `cluster_of`: who makes the cluster, by default make_cluster. `since`: when the first driver of
    the same command began, in Unix seconds, where this one goes on for it; the job's limits count from there. Ctrl-C drains, a second
    one stops at once (StoppedAtOnce). Raises JobError before anything starts, EngineStartError where no engine comes up,
    ForeignOutput where the output is not this job's.
    """
    if job.cluster.kind == "azure-batch" and cluster_of is None:
        raise JobError("cluster.kind: azure-batch is run by `tokenmill submit`, or by `tokenmill driver` on a machine that its nodes reach")
    from jobs.reuse import find_earlier  # loads the tokenizer's library
    from jobs.reuse import index_earlier

    began = time.monotonic()
    display = make_display(stream or sys.stderr)
    try:
        with _Interrupts() as interrupts, served(job) as metrics:
            accepted = accept(job, taken=taken)
            at = time.time() - (time.monotonic() - began)
            before = earlier_of(accepted.out_uri, accepted.record.fingerprint, since=since, until=at) if since is not None else None
            now = datetime.fromtimestamp(at, UTC)
            caps = caps_of(job.limits, profile_usd_per_hour=accepted.usd_per_hour, now=now, earlier=before)
            earlier = find_earlier(accepted)
            accepted = store(accepted)
            _say_beginning(accepted, display)
            if not accepted.todo:
                return _result(accepted, finish(accepted), None, None, None, began)
            accepted = index_earlier(accepted, earlier, display.say)
            with _spoken("what the last run said of itself", display):
                keep_last_word(accepted.out_uri, accepted.record.fingerprint)
            log = RunLog(accepted, profile=_profile(accepted), began=began)
            cluster = (cluster_of or make_cluster)(accepted)
            driver = Driver(accepted, cluster, began=began, caps=caps)
            try:
                _drive(accepted, driver, log, display, interrupts, cluster, metrics)
            except BaseException:
                try:
                    account = log.at_end(driver)
                finally:
                    cluster.close(at_once=True)
                with _spoken("the run's account", display):
                    log.store(account)
                raise
            progress, account = driver.progress, log.at_end(driver)
            cluster.close(at_once=progress.state != "complete")
            try:
                reports = finish(accepted) if progress.state == "complete" else [report for report, _, _ in read_reports(accepted)]
            finally:
                with _spoken("the run's account", display):
                    account = log.store(account)
            return _result(accepted, reports, progress, cluster, account, began)
    finally:
        display.close()


def make_cluster(accepted: Accepted) -> Cluster:
    """The cluster that the job asks for; replicas come up in the background. Raises JobError."""
    job = accepted.job
    if job.cluster.kind == "address":
        from jobs.cluster.address import AddressCluster

        return AddressCluster(spec=job.cluster, out_uri=accepted.out_uri, model=accepted.model, kind=job.engine.kind)
    cut = accepted.cut
    assert cut is not None  # there is something left to do, and this machine does it
    if job.cluster.kind == "inline":
        from jobs.cluster.inline import InlineCluster

        return InlineCluster(model=accepted.model, kind=job.engine.kind, options=cut.options)
    from jobs.cluster.local import LocalCluster

    window = window_rows(cut.options["max_num_seqs"], wide=job.lengths_vary)
    at_once = units_at_once(accepted.plan, window * (LIGHTEST if accepted.index else 1))
    return LocalCluster(
        plan=cut,
        model=accepted.model,
        kind=job.engine.kind,
        units_at_once=at_once,
        silence_s=job.limits.engine_silence_s,
        spec=job.cluster,
    )


class _Interrupts:
    """SIGINT and SIGTERM while a job runs. The first drains: after Ctrl-C units in flight are finished, after SIGTERM, which is
    how a spot machine goes, they only save what is finished. A second one, or one before there is anything to drain, stops at once.

    Does nothing outside the main thread, which alone hears signals.
    """

    def __init__(self) -> None:
        self.driver: Driver | None = None
        self.cluster: Cluster | None = None
        self._heard = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def evict(self, why: str) -> None:
        """Hand back what is in flight: this machine is about to go."""
        if self.driver is not None and self.cluster is not None:
            self.driver.drain()
            self.cluster.evict()
            in_flight = self.driver.progress.units_in_flight
            self.driver.progress.notes.append(f"draining: {why}; {in_flight} units in flight save their finished rows")

    def _on_signal(self, number: int, _: object) -> None:
        self._heard += 1
        if self.driver is None or self.cluster is None or self._heard > 1:
            raise StoppedAtOnce
        if number == signal.SIGTERM:
            self.evict("SIGTERM")
            return
        self.driver.drain()
        in_flight = self.driver.progress.units_in_flight
        self.driver.progress.notes.append(
            f"draining: {in_flight} units in flight will be finished and committed; Ctrl-C again stops at once"
        )


@contextmanager
def _spoken(what: str, display: Display) -> Iterator[None]:
    """It is for people; that it cannot be stored stops nothing."""
    try:
        yield
    except Exception as error:  # whatever the store's SDK raises
        display.say(f"{what} cannot be stored: {type(error).__name__}: {error}")


def _profile(accepted: Accepted) -> str:
    return accepted.cut.profile if accepted.cut else "each node's own"


def _drive(
    accepted: Accepted,
    driver: Driver,
    log: RunLog,
    display: Display,
    interrupts: _Interrupts,
    cluster: Cluster,
    metrics: RunMetrics,
) -> None:
    meter = SpeedMeter()
    progress, next_status, status_failed = driver.progress, 0.0, False
    canary_shown = False

    def tell_storage(speed: Speed) -> None:
        """The status is for people; that it cannot be written stops nothing."""
        nonlocal status_failed
        try:
            over = progress.state not in ("starting", "running", "draining")
            account = log.at_end(driver) if over else log.so_far(driver)
            metrics.tell(snapshot(progress, account))
            served_at = addresses(accepted.job.cluster, [replica.name for replica in progress.replicas])
            write_status(accepted.out_uri, progress, speed, account, metrics=served_at)
        except Exception as error:  # whatever the store's SDK raises
            if not status_failed:
                display.say(f"the status cannot be written: {type(error).__name__}: {error}")
            status_failed = True

    def say_notes() -> None:
        while progress.notes:
            display.say(progress.notes.pop(0))

    def on_tick(_: Progress) -> None:
        nonlocal next_status, canary_shown
        say_notes()
        if progress.canary in ("done", "stopped") and not canary_shown:
            canary_shown, next_status = True, 0.0  # who looks from elsewhere hears of it now
            with _spoken("the canary's rows", display):
                _show_canary(accepted, display)
        speed = meter.measure(progress)
        display.update(progress, speed)
        if time.monotonic() >= next_status:
            next_status = time.monotonic() + _STATUS_EVERY_S
            tell_storage(speed)

    if cluster.dashboard:
        display.say(f"Dask dashboard: {cluster.dashboard}")
    interrupts.driver, interrupts.cluster = driver, cluster
    watch = watch_evictions(lambda: interrupts.evict("Azure takes this machine away"))
    try:
        driver.run(on_tick)
    except KeyboardInterrupt:
        progress.state = "interrupted"
        raise
    except BaseException:
        progress.state = "failed"
        raise
    finally:
        if watch is not None:
            watch.close()
        say_notes()  # of a run that failed they say why
        tell_storage(Speed())


def _show_canary(accepted: Accepted, display: Display) -> None:
    """A few of its rows to whoever sits at this terminal; where what we print may be kept, only where they lie."""
    canary = canary_of(accepted.out_uri)
    if not canary.units:
        return  # the run ended before its first one
    if not isinstance(display, LiveDisplay):
        display.say(f"{where(canary)}; a few are shown on a terminal and in notebooks only")
        return
    display.say(f"{where(canary)}; some of them:")
    for row in some_of(canary):
        words = [f"{name}: {str(value)[:_CANARY_CHARACTERS]}" for name, value in row.items() if value is not None]
        display.say("  " + "\n    ".join(words))


def _say_no_canary(accepted: Accepted, display: Display) -> None:
    """Where one is asked for that the units of an output, cut by the run that began it, do not have."""
    plan_, canary = accepted.plan, accepted.job.canary
    if accepted.todo and canary_rows(plan_.num_rows, canary) and not canary_units(plan_, canary):
        display.say(
            f"canary: no {canary:,} rows go first, since {accepted.out_uri} was begun without this canary and its units stay as they are; "
            "limits.quality judges them all the same. For a canary, give another output, and reuse: this one"
        )


def _say_beginning(accepted: Accepted, display: Display) -> None:
    plan_ = accepted.plan
    short = accepted.record.fingerprint[:8]
    display.say(f"job {accepted.job.name} ({short}): {plan_.num_rows:,} rows in {len(plan_.units)} units to {accepted.out_uri}")
    if accepted.begun:
        display.say(f"begun by an earlier run: {len(accepted.done)} of {len(plan_.units)} units are done and stay as they are")
        _say_no_canary(accepted, display)
    if accepted.cut is not None and accepted.cut.found:
        display.say(accepted.cut.found)
    if accepted.todo and accepted.job.lengths_vary:
        display.say(f"longest rows first, as {accepted.job.input.sampling!r} says how long they may become (engine.ordering)")
    if storage.check_can_create(accepted.out_uri) == "overwrite":
        display.say("output.commit is overwrite: of two writers of one part at the same moment the last one wins")
    for uri in accepted.changed_objects[:5]:
        display.say(f"changed or gone since the plan was made: {uri}; its units will fail until the planned object is back")
    for uri, reason in plan_.skipped[:5]:
        display.say(f"left out: {uri}: {reason}")


def _result(
    accepted: Accepted,
    reports: list[UnitReport],
    progress: Progress | None,
    cluster: Cluster | None,
    account: RunAccount | None,
    began: float,
) -> RunResult:
    totals = Totals()
    for report in reports:
        totals.add(report)
    state = progress.state if progress else "complete"
    return RunResult(
        state=state,
        exit_code=_EXIT_CODES[state],
        out_uri=accepted.out_uri,
        fingerprint=accepted.record.fingerprint,
        units=len(accepted.plan.units),
        rows=accepted.plan.num_rows,
        totals=totals,
        this_run=progress.totals if progress else Totals(),
        wall_s=time.monotonic() - began,
        start_s=cluster.start_seconds() if cluster else {},
        account=account,
        failed=progress.failed if progress else {},
        retries=progress.retries if progress else 0,
        new_objects=accepted.new_objects,
        skipped=accepted.plan.skipped,
    )
