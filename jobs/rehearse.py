"""`tokenmill rehearse`: a rack of simulated engines under the real driver, scheduler, workers and storage, and what those cost.

Engines run `slow_down` times slower than the record's, so that this machine's cores carry the workers' real work. Whatever is no
engine's is charged in the real seconds that it took against unscaled engine seconds. Unit sizes are the planner's own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import rehearsed
from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from jobs.api import make_cluster
from jobs.cluster.cluster import MOST_UNITS_AT_ONCE
from jobs.cluster.cluster import Cluster
from jobs.driver import Driver
from jobs.driver import Progress
from jobs.finish import finish
from jobs.progress import SpeedMeter
from jobs.progress import progress_line
from jobs.rack import NODE_ENGINES
from jobs.rack import length_scale
from jobs.rack import node_speeds
from jobs.rehearsal_node import NodeConfig
from jobs.rehearsal_node import Reading
from jobs.rehearsal_node import count_requests
from jobs.rehearsal_node import read_meter
from jobs.rehearsal_table import write_table
from jobs.rehearsed import Moment
from jobs.rehearsed import Seen
from jobs.runs import RunLog
from jobs.status import write_status
from pipeline import credentials
from pipeline import storage
from pipeline.hardware import find_profile
from pipeline.model import Model
from pipeline.supervisor import exit_words
from pipeline.worker import ENVIRONMENT
from pipeline.worker import WorkerConfig
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.rehearsal import Rehearsal
from schemas.rehearsal import RehearsalSpec

_UP_LIMIT_S = 600.0
_SAMPLE_S = 0.5
_STATUS_EVERY_S = 5.0
"""As in `tokenmill run`."""
_SAY_EVERY_S = 60.0
_LOG_LINES = 15
_SCHEDULER = """
import sys, threading
from jobs.cli import main
from pipeline.worker import end_with_parent
threading.Thread(target=end_with_parent, daemon=True).start()
main(sys.argv[1:])
"""
"""`tokenmill scheduler`, but that it ends with this process, however that ends."""
_METER_S = 1.5
"""After which a node's meter has said what there was."""
_PREFILL_TOKENS_PER_S = 1e12
"""The published rate is of output tokens with prefill in it, so here prefill takes no time of its own."""


def rehearse(spec: RehearsalSpec, say: Callable[[str], None]) -> Rehearsal:
    """Raises JobError for what cannot be rehearsed, EngineStartError where a process does not come up or goes."""
    node = find_profile(spec.profile).node
    if node is None:
        raise JobError(f"--profile: {spec.profile} does not say what its node has; give one of a VM size")
    with tempfile.TemporaryDirectory(prefix="tokenmill-rehearse-") as folder, contextlib.ExitStack() as stack:
        base = (
            storage.join(storage.absolute(spec.store), f"rehearsal-{os.getpid()}-{int(time.time())}") if spec.store else f"{folder}/store"
        )
        requests = count_requests()
        size_bytes = write_table(storage.join(base, "in"), spec.rows)
        say(f"{spec.rows:,} prompts ({size_bytes / 1e6:,.0f} MB) in {storage.join(base, 'in')}")
        began_cpu = time.process_time()
        accepted = store(accept(job_of(spec, base, f"{folder}/place")))
        plan_cpu_s = time.process_time() - began_cpu
        rows_per_unit = accepted.plan.num_rows / len(accepted.plan.units)
        say(f"{len(accepted.plan.units):,} units of {rows_per_unit:,.0f} rows in the mean, as the planner cuts them")
        say(f"{spec.nodes} nodes of {spec.engines_per_node} engines, a process each; engines {spec.slow_down:g} times slower than real")
        children = _start(spec, accepted.model, Path(folder), stack)
        cluster = make_cluster(accepted)
        stack.callback(cluster.close)
        began = time.monotonic()
        _wait_until_up(spec, cluster, children)
        up_s = time.monotonic() - began
        say(f"{spec.nodes * spec.engines_per_node} replicas joined after {up_s:.0f} s")
        seen = Seen(before=_meters(Path(folder), spec), requests_before=requests())
        _drive(accepted, cluster, children, seen, say)
        seen.requests_after = requests()
        time.sleep(_METER_S)
        seen.after = _meters(Path(folder), spec)
        began, began_cpu = time.monotonic(), time.process_time()
        reports = finish(accepted)
        finish_s, finish_cpu_s = time.monotonic() - began, time.process_time() - began_cpu
        written = sum(size for name, size in storage.list_names(accepted.out_uri).items() if name.startswith("part-"))
        return rehearsed.describe(
            spec,
            seen,
            accepted=accepted,
            reports=reports,
            node_cores=node.cores.value,
            bytes_in=size_bytes,
            bytes_out=written,
            counted=storage.scheme_of(base) in ("az", "abfs", "abfss"),
            up_s=up_s,
            finish_s=finish_s,
            plan_cpu_s=plan_cpu_s,
            finish_cpu_s=finish_cpu_s,
        )


def job_of(spec: RehearsalSpec, base: str, place: str) -> JobSpec:
    """The job that runs, as a user would write it: it reaches storage as this process does."""
    return parse_job(
        {
            "name": "rehearsal",
            "model": spec.model,
            "input": {"uri": storage.join(base, "in"), "prompt": "prompt", "too_long": "truncate_right"},
            "output": {"uri": storage.join(base, "out")},
            "sampling": {"max_tokens": spec.max_tokens, "temperature": 0.0},
            "engine": {"kind": "simulated"},
            "cluster": {"kind": "address", "rendezvous": place, "insecure": True},
            "storage": credentials.current().model_dump(exclude_none=True),
        }
    )


def engine_options(spec: RehearsalSpec, speed_tokens_per_s: float, max_num_seqs: int) -> dict[str, Any]:
    """Of one engine on a node of that speed."""
    return {
        "decode_tokens_per_s": speed_tokens_per_s / NODE_ENGINES / spec.slow_down,
        "prefill_tokens_per_s": _PREFILL_TOKENS_PER_S,
        "max_num_seqs": max_num_seqs,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Child:
    """A process that this one started."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def check(self) -> None:
        """Raises EngineStartError where it has gone."""
        code = self.process.poll()
        if code is not None:
            last = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise EngineStartError(f"{self.name} ended with {exit_words(code)}; the end of its log:\n{last}")


def _start(spec: RehearsalSpec, model: Model, folder: Path, stack: contextlib.ExitStack) -> list[_Child]:
    """The scheduler, then all nodes; they end with the stack."""
    command = ["-c", _SCHEDULER, "scheduler", "--listen", "tcp://127.0.0.1:0", "--insecure", "--rendezvous", f"{folder}/place"]
    children = [stack.enter_context(_process("scheduler", [*command, "--dashboard", "none"], folder / "scheduler.log"))]
    max_num_seqs = find_profile(spec.profile).max_num_seqs
    for index, speed in enumerate(node_speeds(spec.nodes)):
        name, own = node_name(index), folder / node_name(index)
        own.mkdir()
        workers = [
            WorkerConfig(
                name=f"{name}-{engine}",
                model=asdict(model),
                kind="simulated",
                options=engine_options(spec, speed, max_num_seqs),
                num_threads=MOST_UNITS_AT_ONCE,
                folder=str(own),
                rendezvous=f"{folder}/place",
                insecure=True,
                spawned_at=time.monotonic(),
            )
            for engine in range(spec.engines_per_node)
        ]
        config = NodeConfig(
            workers=[asdict(worker) for worker in workers], length_scale=length_scale(spec.max_tokens), meter=str(own / "meter.json")
        )
        config.save(own / "node.json")
        children.append(stack.enter_context(_process(name, ["-m", "jobs.rehearsal_node", str(own / "node.json")], own / "node.log")))
    return children


def node_name(index: int) -> str:
    return f"node-{index:02d}"


@contextmanager
def _process(name: str, arguments: list[str], log_path: Path) -> Iterator[_Child]:
    """Ends with its standard input or on SIGTERM."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # a terminal's Ctrl-C reaches this process only
        )
    try:
        yield _Child(name=name, process=process, log_path=log_path)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(spec: RehearsalSpec, cluster: Cluster, children: Sequence[_Child]) -> None:
    wanted, deadline = spec.nodes * spec.engines_per_node, time.monotonic() + _UP_LIMIT_S
    while len(cluster.replicas()) < wanted:
        for child in children:
            child.check()
        cluster.notes()  # a line for each replica is too many
        if time.monotonic() > deadline:
            raise EngineStartError(f"{len(cluster.replicas())} of {wanted} replicas joined within {_UP_LIMIT_S:.0f} s")
        time.sleep(0.2)
    cluster.notes()


def _meters(folder: Path, spec: RehearsalSpec) -> dict[str, Reading]:
    """Of every node."""
    found = {name: read_meter(folder / name / "meter.json") for name in map(node_name, range(spec.nodes))}
    missing = [name for name, reading in found.items() if reading is None]
    if missing:
        raise EngineStartError(f"{', '.join(missing)} said nothing of the CPU seconds that were spent")
    return {name: reading for name, reading in found.items() if reading is not None}


def _drive(accepted: Accepted, cluster: Cluster, children: Sequence[_Child], seen: Seen, say: Callable[[str], None]) -> None:
    """Run the job to its end as `tokenmill run` does, and look at it twice a second."""
    began = time.monotonic()
    log, driver = RunLog(accepted, profile="each node's own", began=began), Driver(accepted, cluster, began=began)
    meter, scheduler = SpeedMeter(), children[0].process.pid
    next_look, next_status, next_word = 0.0, 0.0, began + _SAY_EVERY_S

    def on_tick(progress: Progress) -> None:
        nonlocal next_look, next_status, next_word
        now, speed = time.monotonic(), meter.measure(progress)
        while progress.notes:
            say(progress.notes.pop(0))
        if now >= next_status:
            next_status = now + _STATUS_EVERY_S
            for child in children:
                child.check()
            write_status(accepted.out_uri, progress, speed, log.so_far(driver))
        if now >= next_word:
            next_word = now + _SAY_EVERY_S
            say(progress_line(progress, speed))
        if now < next_look:
            return
        next_look = now + _SAMPLE_S
        sent = progress.totals.units + progress.units_in_flight
        seen.samples.append(_moment(progress, began, scheduler))
        if seen.full is None and progress.replicas and all(state.ledger is not None and state.ledger.full for state in progress.replicas):
            seen.full = (now - began, {account.name: account for account in driver.accounts(over=False)})
        if seen.all_sent is None and sent + len(progress.failed) >= progress.total_units:
            seen.all_sent = (now - began, {account.name: account for account in driver.accounts(over=False)})

    progress = driver.run(on_tick)
    seen.drive_s = time.monotonic() - began
    seen.samples.append(_moment(progress, began, scheduler))
    if progress.state != "complete":
        raise JobError(f"the rehearsal's job ended {progress.state}: {next(iter(progress.failed.values()), 'nothing was said')}")
    seen.totals = progress.totals
    seen.at_end = {account.name: account for account in driver.accounts(over=True)}
    seen.driver_peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seen.scheduler_peak_mb = peak_mb(scheduler)
    log.store(log.at_end(driver))


def _moment(progress: Progress, began: float, scheduler: int) -> Moment:
    """Of a unit in flight one half is counted."""
    return Moment(
        at=time.monotonic() - began,
        units=progress.totals.units + progress.units_in_flight / 2,
        driver_s=time.process_time(),
        scheduler_s=cpu_seconds(scheduler),
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in the hundredths that /proc counts."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int) -> float:
    """Resident high-water mark."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0
