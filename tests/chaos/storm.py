"""The storm: many short jobs through the real command, their processes killed, stopped and terminated at random moments.

    python -m tests.chaos.storm --faults 300 --seed 1
    python -m tests.chaos.storm --faults 300 --seed 1 --store azurite --json storm.json
    python -m tests.chaos.storm --faults 100 --seed 1 --store azurite --cluster address
    python -m tests.chaos.storm --faults 20 --seed 1 --engine vllm --kinds SIGKILL
    python -m tests.chaos.storm --faults 20 --seed 1 --store azurite --engine vllm --engine-process

With `--cluster address` the scheduler and the nodes are processes of their own, over TLS, that serve one job after the other; a
blow may hit them, too, and they are started again as a service manager would.

Each job is a `tokenmill run`, started again until it says that it is complete. Then the independent checker reads every row,
`tokenmill verify` proves the output, and the history of its parts shows whether one changed or went after it was seen. Prints
what was done and what was found; ends with 1 where a row was lost, doubled, foreign or changed, or a process hung.

Overtaken units are those that a replica came to, or came to commit, when another one's part was there: zombies that woke late, and
drivers beside each other. They are counted as far as drivers lived to say so in status.json.
With `--engine-process` vLLM's engine core has a process of its own, as on GPUs, which a blow may hit as well.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from pipeline import storage
from pipeline.flight import Flight
from pipeline.flight import read_flight
from pipeline.hardware import profile_text
from schemas import layout
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.chaos.nemesis import KINDS
from tests.chaos.nemesis import TARGETS
from tests.chaos.nemesis import Fault
from tests.chaos.nemesis import Kind
from tests.chaos.nemesis import Nemesis
from tests.chaos.nemesis import Target
from tests.chaos.nodes import Site
from tests.chaos.test_processes import Running
from tests.conftest import build_tiny_model

_BAD_EVERY = 41
"""Every so many rows, one without a prompt: an error row that is known beforehand, among which an undeserved one shows."""
_ORPHANS_PATIENCE_S = 40.0
_LOOK_EVERY_S = 0.2
_STATUS_EVERY_S = 0.5
_MAX_STARTS = 40
_EARLY, _EARLY_S = 0.2, 6.0
"""How often a start is struck before its first commit, and in which time."""
_DONE_AT_START = re.compile(r"begun by an earlier run: (\d+) of")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a job is and how close the blows come; ranges that the seed chooses from."""

    rows: tuple[int, int]
    max_tokens: int
    replicas: tuple[int, int]
    faults_per_job: tuple[int, int]
    gap_s: tuple[float, float]
    """From a commit, or from the last blow, to the next blow."""
    silence_s: float
    """Without a blow, a start or a commit: hung."""


PACES = {
    "simulated": Pace(rows=(400, 800), max_tokens=4, replicas=(1, 3), faults_per_job=(4, 9), gap_s=(0.1, 4.0), silence_s=180.0),
    "vllm": Pace(rows=(320, 480), max_tokens=160, replicas=(1, 2), faults_per_job=(2, 4), gap_s=(1.0, 12.0), silence_s=400.0),
}


@dataclass(slots=True)
class Figures:
    """What was done and what was found, over all jobs."""

    faults: list[Fault] = field(default_factory=list)
    jobs: int = 0
    starts: int = 0
    rows: int = 0
    error_rows: int = 0
    undeserved_errors: int = 0
    rows_generated: int = 0
    """Rows that engines finished, as their flight records say."""
    rows_cut: int = 0
    """Rows that were inside engines when those ended."""
    overtaken_units: int = 0
    """race_lost or already: see above."""
    damage: Counter[str] = field(default_factory=Counter)
    recovery_s: list[float] = field(default_factory=list)
    """From a fault to the next commit of its job."""
    exit_codes: Counter[int] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    """What should not be and is no damage to rows: tracebacks, orphans."""
    wall_s: float = 0.0

    @property
    def fine(self) -> bool:
        return not self.damage and not self.troubles and self.undeserved_errors == 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "faults": len(self.faults),
            "faults_by_kind_and_target": {f"{kind} {target}": count for (kind, target), count in sorted(self._by_kind().items())},
            "jobs": self.jobs,
            "starts": self.starts,
            "rows": self.rows,
            "error_rows": self.error_rows,
            "undeserved_error_rows": self.undeserved_errors,
            **{name: self.damage.get(name, 0) for name in ("lost", "doubled", "foreign", "changed", "misplaced", "changed_after_commit")},
            "other_damage": {name: count for name, count in self.damage.items() if name not in _NAMED_DAMAGE},
            "recovery_s": {"p50": _percentile(self.recovery_s, 0.5), "p99": _percentile(self.recovery_s, 0.99), "of": len(self.recovery_s)},
            "overtaken_units": self.overtaken_units,
            "rows_generated": self.rows_generated,
            "rows_cut_off": self.rows_cut,
            "share_repeated": round(self._repeated / max(1, self.rows - self.error_rows), 4),
            "exit_codes": {str(code): count for code, count in sorted(self.exit_codes.items())},
            "troubles": self.troubles,
            "loss_per_fault_at_most": _rule_of_three(len(self.faults)) if not self.damage else None,
            "wall_s": round(self.wall_s, 1),
        }

    @property
    def _repeated(self) -> int:
        """Rows generated beyond those in the outputs, and those that were cut off, as if each had been nearly done."""
        return max(0, self.rows_generated - (self.rows - self.error_rows)) + self.rows_cut

    def _by_kind(self) -> Counter[tuple[str, str]]:
        return Counter((fault.kind, fault.target) for fault in self.faults)


_NAMED_DAMAGE = ("lost", "doubled", "foreign", "changed", "misplaced", "changed_after_commit")


def _percentile(values: list[float], share: float) -> float | None:
    """The nearest rank."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def _rule_of_three(trials: int) -> float:
    """With no failure in so many independent trials, the failure rate is below this with 95 % confidence."""
    return round(3 / max(1, trials), 5)


def overtaken_units(said: dict[str, Any], *, done_at_start: int) -> int:
    """Out of a driver's status.json: units done that were not when its run began, and that are not of its own making."""
    return int(said["units_done"]) - int(said["account"]["units"]) - done_at_start


class Storm:
    """One store, one engine, one seed."""

    def __init__(
        self,
        root: str,
        folder: Path,
        *,
        engine: str,
        seed: int,
        out: Console,
        kinds: Sequence[Kind] = KINDS,
        targets: Sequence[Target] = TARGETS,
        profile: Path | None = None,
    ) -> None:
        """`profile`: the engines' own, where it is not the one that this machine gets."""
        self._root, self._folder, self._engine, self._out = root, folder, engine, out
        self._blows = (kinds, targets)
        self._profile = {} if profile is None else {"profile": str(profile)}
        self._moments = random.Random(seed)
        self._pace = PACES[engine]
        self._model = build_tiny_model(folder / "model")
        self._scratch = folder / "scratch"  # where clusters keep their logs, and what engines record
        self._scratch.mkdir()
        self._site: Site | None = None
        self.figures = Figures()

    def open_site(self, num_nodes: int) -> None:
        """From now on jobs use a cluster of nodes instead of processes of their own."""
        sections = {"model": str(self._model), "engine": {"kind": self._engine, "options": self._options(), **self._profile}}
        with _environment(TMPDIR=str(self._scratch)):
            self._site = Site(self._folder, f"{self._root}/rendezvous", sections, num_nodes)

    def close(self) -> None:
        """The site, which must end by itself once nobody keeps it."""
        if self._site is not None:
            self._site.close()
            self.figures.troubles += self._site.troubles

    def run(self, num_faults: int) -> Figures:
        """Until so many faults were done."""
        began = time.monotonic()
        while len(self.figures.faults) < num_faults:
            left = num_faults - len(self.figures.faults)
            self._one_job(min(left, self._moments.randint(*self._pace.faults_per_job)))
            self.figures.wall_s = time.monotonic() - began
        return self.figures

    def _one_job(self, num_faults: int) -> None:
        number = self.figures.jobs = self.figures.jobs + 1
        folder = self._folder / f"job-{number:03d}"
        folder.mkdir()
        input_uri, out_uri = f"{self._root}/job-{number:03d}/in", f"{self._root}/job-{number:03d}/out"
        rows = self._moments.randint(*self._pace.rows)
        bad = self._write_input(input_uri, rows)
        self._write_job(folder, input_uri, out_uri)
        chase = _Chase(folder, out_uri, self._scratch, self._site, self._pace, self._moments, num_faults, self._blows)
        try:
            with History(out_uri).watch(_LOOK_EVERY_S) as history:
                chase.run(history)
        finally:
            chase.close()
        self._judge(number, rows, bad, input_uri, out_uri, history, chase)

    def _write_input(self, uri: str, rows: int) -> int:
        """Two objects; returns how many rows have no prompt."""
        prompts = [None if row % _BAD_EVERY == 0 else f"question {row}: {self._moments.randint(0, 10**6)}" for row in range(rows)]
        table = pa.table({"id": pa.array(range(rows), pa.int64()), "prompt": pa.array(prompts, pa.string())})
        border = self._moments.randint(1, rows - 1)
        for name, part in (("a", table.slice(0, border)), ("b", table.slice(border))):
            with fsspec.open(f"{uri}/{name}.parquet", "wb") as file:
                pq.write_table(part, file)
        return sum(prompt is None for prompt in prompts)

    def _write_job(self, folder: Path, input_uri: str, out_uri: str) -> None:
        job = {
            "model": str(self._model),
            "input": {"uri": input_uri, "prompt": "prompt"},
            "output": {"uri": out_uri},
            "sampling": {"max_tokens": self._pace.max_tokens, "ignore_eos": True},
            "engine": {"kind": self._engine, "options": self._options(), **self._profile},
            "cluster": self._site.cluster if self._site else {"kind": "local", "replicas": self._moments.randint(*self._pace.replicas)},
        }
        (folder / "job.yaml").write_text(yaml.safe_dump(job))

    def _options(self) -> dict[str, Any]:
        if self._engine == "vllm":
            return {"max_model_len": 512, "max_num_seqs": 16}  # few rows at a time, so that commits come all along
        rate = self._moments.choice([100, 150, 300])
        return {"decode_tokens_per_s": rate, "prefill_tokens_per_s": 1e6, "max_num_seqs": self._moments.choice([3, 5, 16])}

    def _judge(self, number: int, rows: int, bad: int, input_uri: str, out_uri: str, history: History, chase: _Chase) -> None:
        figures, found = self.figures, check(input_uri, out_uri)
        figures.faults += chase.nemesis.faults
        figures.starts += chase.starts
        figures.rows += rows
        figures.error_rows += found.error_rows
        figures.undeserved_errors += max(0, found.error_rows - bad)
        figures.rows_generated += chase.rows_generated
        figures.rows_cut += chase.rows_cut
        figures.overtaken_units += chase.overtaken_units
        figures.damage.update(found.damage)
        figures.damage.update({"changed_after_commit": len(history.changed) + len(history.vanished)} if not history.fine else {})
        figures.exit_codes.update(chase.exit_codes)
        figures.troubles += [f"job {number}: {trouble}" for trouble in chase.troubles]
        figures.troubles += [f"job {number}: process {orphan.pid} is left behind" for orphan in chase.orphans]
        for fault in chase.nemesis.faults:
            later = [at - fault.at for at in history.seen_at.values() if at > fault.at]
            if later:
                figures.recovery_s.append(min(later))
        verify = Running(chase.folder, "verify", out_uri)
        if verify.end() != 0:
            figures.damage["not_verified"] += 1
            self._out.print(verify.stdout + verify.stderr, markup=False)
        if not found.fine or not history.fine:
            self._out.print(f"job {number} ({out_uri}):\n{found.describe()}\n{history.describe()}", markup=False)
        hits = ", ".join(f"{fault.kind} {fault.target}" for fault in chase.nemesis.faults)
        self._out.print(f"job {number}: {rows} rows, {chase.starts} starts, {hits}: {'fine' if found.fine else found.damage}", markup=False)


class _Chase:
    """One job, started again until it is complete, and the nemesis after it."""

    def __init__(
        self,
        folder: Path,
        out_uri: str,
        scratch: Path,
        site: Site | None,
        pace: Pace,
        moments: random.Random,
        num_faults: int,
        blows: tuple[Sequence[Kind], Sequence[Target]],
    ) -> None:
        self.folder, self._out_uri, self._scratch, self._site = folder, out_uri, scratch, site
        self._pace, self._moments, self._num_faults = pace, moments, num_faults
        self._drivers: list[Running] = []
        self._flights: dict[Path, Flight] = {}
        self._overtaken: dict[int, int] = {}  # by the driver's process
        self._next_status = 0.0
        self.rows_generated = self.rows_cut = 0
        self._read_flights()  # what was before does not count
        self.nemesis = Nemesis(self._roots, moments, *blows)
        self.starts = self.rows_generated = self.rows_cut = 0
        self.exit_codes: Counter[int] = Counter()
        self.troubles: list[str] = []
        self.orphans: list[psutil.Process] = []

    def run(self, history: History) -> None:
        """Raises TimeoutError where nothing moves any more."""
        self._start()
        next_blow = self._first_blow()
        moved_at, parts = time.monotonic(), 0
        while self._drivers or not self.exit_codes[0]:
            now = time.monotonic()
            self.nemesis.wake()
            if self._site is not None:
                with _environment(TMPDIR=str(self._scratch)):
                    self._site.keep()
            self._read_flights()
            if now >= self._next_status:
                self._next_status = now + _STATUS_EVERY_S
                self._read_status()
            self._take_ended()
            if not self._drivers and not self.exit_codes[0]:
                self._start()
                moved_at, next_blow = now, self._first_blow()
            if history.parts != parts:
                parts, moved_at = history.parts, now
                next_blow = min(next_blow, now + self._moments.uniform(*self._pace.gap_s))
            if len(self.nemesis.faults) < self._num_faults and now >= next_blow:
                fault = self.nemesis.strike()
                next_blow = now + self._moments.uniform(*self._pace.gap_s)
                if fault is not None:
                    moved_at = now
                    self._follow(fault)
            if now - moved_at > self._pace.silence_s:
                raise TimeoutError(self._describe(f"nothing moved for {self._pace.silence_s:.0f} s"))
            time.sleep(0.03)
        self.orphans = self.nemesis.left(_ORPHANS_PATIENCE_S, but=self._site.pids if self._site else [])
        self._read_flights()

    def _follow(self, fault: Fault) -> None:
        """What makes zombies of stopped processes: others take over before they wake."""
        if fault.kind != "SIGSTOP" or self._moments.random() < 0.5:
            return
        if fault.target == "driver":
            self._start()  # somebody takes the silent one for dead
        elif fault.target in ("worker", "engine") and self._site is None:
            self.nemesis.strike(("SIGKILL", "driver"))  # the next one's workers get the units that the stopped one has

    def _first_blow(self) -> float:
        """Mostly once there is work in flight, which the next commit shows; now and then while things come up."""
        early = self._moments.random() < _EARLY
        return time.monotonic() + (self._moments.uniform(0.1, _EARLY_S) if early else self._pace.silence_s)

    def close(self) -> None:
        for driver in self._drivers:
            driver.process.kill()
            driver.process.wait()
        self.nemesis.end(but=self._site.pids if self._site else [])

    def _roots(self) -> list[int]:
        return [driver.process.pid for driver in self._drivers] + (self._site.pids if self._site else [])

    def _start(self) -> None:
        if self.starts >= _MAX_STARTS:
            raise TimeoutError(self._describe(f"not complete after {self.starts} starts"))
        self.starts += 1
        self.nemesis.look()
        with _environment(TMPDIR=str(self._scratch)):
            self._drivers.append(Running(self.folder, "run", "job.yaml"))

    def _take_ended(self) -> None:
        ended = [driver for driver in self._drivers if driver.process.poll() is not None]
        if ended:
            self._read_status()  # its last word
        for driver in ended:
            self._drivers.remove(driver)
            self.exit_codes[driver.process.returncode] += 1
            if "Traceback" in driver.stderr:
                self.troubles.append(f"a traceback (exit code {driver.process.returncode}):\n{driver.stderr[-3000:]}")

    @property
    def overtaken_units(self) -> int:
        return sum(self._overtaken.values())

    def _read_status(self) -> None:
        """Of the driver that spoke last."""
        try:
            said = json.loads(storage.read_bytes(storage.join(self._out_uri, layout.STATUS)))
            for driver in self._drivers:
                if driver.process.pid == said["pid"]:
                    begun = _DONE_AT_START.search(driver.stderr)
                    self._overtaken[said["pid"]] = overtaken_units(said, done_at_start=int(begun[1]) if begun else 0)
        except (OSError, ValueError, KeyError):  # nobody has spoken yet, or no account was to be had
            return

    def _read_flights(self) -> None:
        """Rows finished by every engine that ever ran here; a record that starts again is a new engine's."""
        # glob.glob, because pathlib's stumbles over folders that go while it looks
        paths = map(Path, glob.glob(str(self._scratch / "tokenmill-*" / "*.flight")))
        there = {path: flight for path in paths if (flight := read_flight(path)) is not None}
        for path, before in list(self._flights.items()):
            now = there.get(path)
            if now is None or now.steps < before.steps:
                self.rows_cut += before.num_rows
                del self._flights[path]
        for path, flight in there.items():
            before = self._flights.get(path)
            self.rows_generated += flight.rows_finished - (before.rows_finished if before else 0)
            self._flights[path] = flight

    def _describe(self, what: str) -> str:
        said = "\n".join(driver.stderr[-3000:] for driver in self._drivers)
        faults = ", ".join(f"{fault.kind} {fault.target}" for fault in self.nemesis.faults)
        return f"{what} in {self.folder}; exit codes {dict(self.exit_codes)}, {self.nemesis.stopped} stopped, faults {faults}\n{said}"


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def open_store(kind: str, folder: Path) -> Iterator[str]:
    """A place for inputs and outputs: a folder, or a container in Azurite."""
    if kind == "local":
        yield str(folder / "store")
        return
    from tests.azurite import CONNECTION_STRING
    from tests.azurite import running

    with running() as service, _environment(**{CONNECTION_STRING: service.connection_string}):
        yield f"az://{service.new_container('storm')}"


def engine_process_profile(folder: Path) -> Path:
    """The CPU's own profile, but that vLLM's engine core has a process of its own."""
    profile = yaml.safe_load(profile_text("local-cpu"))
    profile["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    path = folder / "engine-process.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


def show(figures: dict[str, Any], out: Console) -> None:
    table = Table(show_header=False)
    for name, value in figures.items():
        shown = ", ".join(f"{key}: {count}" for key, count in value.items()) if isinstance(value, dict) else value
        table.add_row(name.replace("_", " "), str(shown))
    out.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--store", choices=["local", "azurite"], default="local")
    parser.add_argument("--cluster", choices=["local", "address"], default="local")
    parser.add_argument("--nodes", type=int, default=2, help="with --cluster address")
    parser.add_argument("--engine", choices=sorted(PACES), default="simulated")
    parser.add_argument("--engine-process", action="store_true", help="with --engine vllm: its core in a process of its own")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    parser.add_argument("--keep", type=Path, default=None, help="work in this folder, and leave it")
    asked = parser.parse_args(arguments)
    if asked.engine_process and asked.engine != "vllm":
        parser.error("--engine-process: only vllm has an engine core; give --engine vllm")
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    out = Console(soft_wrap=True)
    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="storm-")))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_environment(TOKENMILL_CACHE=str(folder / "cache")))
        root = stack.enter_context(open_store(asked.store, folder))
        profile = engine_process_profile(folder) if asked.engine_process else None
        storm = Storm(root, folder, engine=asked.engine, seed=seed, out=out, kinds=asked.kinds, targets=asked.targets, profile=profile)
        stack.callback(storm.close)
        hung = ""
        try:
            if asked.cluster == "address":
                storm.open_site(asked.nodes)
            storm.run(asked.faults)
        except TimeoutError as error:
            hung = str(error)
            out.print(hung, markup=False)
    figures = {
        "seed": seed,
        "store": asked.store,
        "cluster": asked.cluster,
        "engine": asked.engine,
        **storm.figures.to_dict(),
        "hung": hung,
    }
    show(figures, out)
    if asked.json is not None:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if storm.figures.fine and not hung else 1


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background: nothing may be left running
        signal.signal(number, lambda *_: sys.exit(130))
    sys.exit(main())
