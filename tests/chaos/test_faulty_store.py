"""Whole jobs on a blob service behind a faulty proxy. After the faults, the same job again ends with every row once.

The input lies in the same container as the output, so that planning and reading meet the faults, too. What came out is
judged by tests/chaos/checker.py, which shares no code with the pipeline and asks the service itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from azure.core.exceptions import ResourceExistsError

from jobs import api
from jobs.summary import RunResult
from jobs.verify import verify
from pipeline import storage
from pipeline.commit import PartWriter
from pipeline.commit import commit
from pipeline.commit import read_report
from schemas.errors import ForeignOutput
from schemas.errors import JobError
from schemas.errors import TokenmillError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.manifest import UnitReport
from schemas.storage import StorageSpec
from tests.azurite import Azurite
from tests.chaos.checker import History
from tests.chaos.checker import check
from tests.chaos.proxy import ALL_FAULTS
from tests.chaos.proxy import Fault
from tests.chaos.proxy import FaultyProxy
from tests.chaos.proxy import before

pytestmark = [pytest.mark.chaos, pytest.mark.azurite, pytest.mark.long]

_SEEDS = [int(seed) for seed in os.environ.get("TOKENMILL_STORE_SEEDS", "1 2 3").split()]
_LOCAL_SEEDS = _SEEDS[:1]
_ROWS = 200
_FIRST_WAIT_S = 0.05
"""In place of half a second, in this process: as many tries, sooner. Workers, processes of their own, wait as always."""
_PATIENCE_S = 90.0
"""When a test gives up waiting for something to happen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A container, a proxy before it, and jobs that reach it through the proxy alone."""

    service: Azurite
    proxy: FaultyProxy
    bucket: str
    model: Path

    @property
    def out_uri(self) -> str:
        return f"az://{self.bucket}/out"

    @property
    def input_uri(self) -> str:
        return f"az://{self.bucket}/in/*.parquet"

    def put_input(self, rows: int = _ROWS) -> None:
        """Two objects, straight to the service."""
        with self.service.client() as client:
            for number in range(2):
                sink = pa.BufferOutputStream()
                ids = list(range(number * rows // 2, (number + 1) * rows // 2))
                pq.write_table(pa.table({"id": ids, "prompt": [f"prompt {index}" for index in ids]}), sink)
                client.get_blob_client(self.bucket, f"in/{number}.parquet").upload_blob(sink.getvalue().to_pybytes())

    def job(self, *, storage_: StorageSpec | None = None, **sections: Any) -> JobSpec:
        data: dict[str, Any] = {
            "model": str(self.model),
            "input": {"uri": self.input_uri, "prompt": "prompt"},
            "output": {"uri": self.out_uri},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7}},
            "cluster": {"kind": "inline"},
            "storage": (storage_ or self.through_proxy).model_dump(exclude_none=True),
            **sections,
        }
        return parse_job(data)

    @property
    def through_proxy(self) -> StorageSpec:
        return StorageSpec.model_validate({"credential": {"kind": "connection_string", "env": "THROUGH_THE_PROXY"}})

    def prove(self) -> None:
        """By the service itself: every row once, none changed."""
        storage.use(None)
        found = check(self.input_uri, self.out_uri)
        assert found.fine, found.describe()
        assert found.rows_out == found.rows_in > 0
        storage.use(self.through_proxy)
        verdict = verify(self.out_uri)
        assert verdict.complete, verdict.problems


@pytest.fixture
def site(azurite: Azurite, container: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """With its input; nothing fails yet."""
    with before(azurite) as proxy:
        monkeypatch.setattr("pipeline.azure_blob._FIRST_WAIT_S", _FIRST_WAIT_S)
        monkeypatch.setenv("THROUGH_THE_PROXY", proxy.service.connection_string)
        made = Site(service=azurite, proxy=proxy, bucket=container, model=tiny_model)
        made.put_input()
        yield made
        storage.use(None)


@dataclass(slots=True)
class Attempt:
    """How one call of run ended."""

    result: RunResult | None = None
    error: BaseException | None = None
    said: str = ""

    @property
    def complete(self) -> bool:
        return self.result is not None and self.result.exit_code == 0


def attempt(job: JobSpec) -> Attempt:
    """Run once. Whatever the store does, it ends with a result or with an error of ours."""
    said = io.StringIO()
    try:
        return Attempt(result=api.run(job, stream=said), said=said.getvalue())
    except (TokenmillError, OSError) as error:
        return Attempt(error=error, said=said.getvalue())


def until_complete(job: JobSpec, proxy: FaultyProxy, tries: int) -> list[Attempt]:
    """The same command again and again, at last with a store that is well."""
    attempts = []
    for number in range(tries + 1):
        if number == tries:
            proxy.heal()
        attempts.append(attempt(job))
        if attempts[-1].complete:
            break
    proxy.heal()
    return attempts


@pytest.mark.parametrize("seed", _SEEDS)
def test_a_store_that_fails_at_random_loses_and_doubles_no_row(site: Site, seed: int) -> None:
    history = History(site.out_uri)
    site.proxy.harass(seed, 0.15)
    with history.watch(0.1):
        attempts = until_complete(site.job(), site.proxy, tries=3)
    print(f"\nseed {seed}: {len(attempts)} runs, {site.proxy.requests.total()} requests, faults {dict(site.proxy.faults)}")
    assert attempts[-1].complete, attempts[-1].error
    assert site.proxy.faults.total() > 10
    assert history.fine, history.describe()
    assert history.parts > 5
    site.prove()


@pytest.mark.parametrize("seed", _LOCAL_SEEDS)
def test_workers_on_a_store_that_fails_at_random_lose_and_double_no_row(site: Site, seed: int) -> None:
    history = History(site.out_uri)
    site.proxy.harass(seed, 0.15)
    with history.watch(0.1):
        attempts = until_complete(site.job(cluster={"kind": "local", "replicas": 2}), site.proxy, tries=2)
    print(f"\nseed {seed}: {len(attempts)} runs, {site.proxy.requests.total()} requests, faults {dict(site.proxy.faults)}")
    assert attempts[-1].complete, attempts[-1].error
    assert site.proxy.faults.total() > 10
    assert history.fine, history.describe()
    site.prove()


@pytest.mark.parametrize("fault", ALL_FAULTS)
def test_each_kind_of_fault_alone_is_outlived_within_one_run(site: Site, fault: Fault) -> None:
    """The SDK tries again; no unit has to."""
    site.proxy.harass(7, 0.1, kinds=[fault])
    tried = attempt(site.job())
    site.proxy.heal()
    print(f"\n{fault}: {site.proxy.requests.total()} requests, faults {dict(site.proxy.faults)}")
    assert tried.complete, (tried.error, tried.said)
    assert site.proxy.faults[fault] > 5
    site.prove()


def test_a_store_that_fails_all_the_time_is_an_error_and_no_hang(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.proxy.harass(1, 1.0, kinds=["busy", "error_before", "reset_before"])
    monkeypatch.setattr("pipeline.azure_blob._LONGEST_WAIT_S", 0.05)
    tried = attempt(site.job())
    assert isinstance(tried.error, JobError)
    assert "output.uri: cannot read az://" in str(tried.error)
    site.proxy.heal()
    assert attempt(site.job()).complete
    site.prove()


# The commit: our own success, told from a lost race.

_SCHEMA = pa.schema([pa.field("x", pa.int64())])


def part(attempt_id: str, **changes: Any) -> tuple[bytes, UnitReport]:
    values: dict[str, Any] = {
        "unit": 3, "fingerprint": "a" * 64, "attempt": attempt_id, "worker": "w", "rows": 2, "error_rows": 0,
        "prompt_tokens": 5, "completion_tokens": 6, "started_at": 1.0, "finished_at": 2.0,
    }  # fmt: skip
    report = UnitReport(**{**values, **changes})
    writer = PartWriter(_SCHEMA, "zstd")
    writer.write(pa.RecordBatch.from_arrays([pa.array([1, 2])], schema=_SCHEMA))
    return bytes(writer.finish(report, {"attempt": attempt_id})), report


@pytest.fixture
def part_uri(site: Site) -> str:
    storage.use(site.through_proxy)
    return f"az://{site.bucket}/out/part-00000003-aaaaaaaa.parquet"


@pytest.mark.parametrize(
    ("faults", "puts", "outcome"),
    [
        ((), 1, "created"),
        (("slow",), 1, "created"),
        (("reset_before",), 2, "created"),
        (("error_before", "busy", "reset_before"), 4, "created"),
        (("reset_after",), 2, "acknowledgement_lost"),
        (("error_after",), 2, "acknowledgement_lost"),
        (("truncated",), 2, "acknowledgement_lost"),
        (("reset_before", "reset_after", "busy"), 4, "acknowledgement_lost"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_a_lost_acknowledgement_is_told_from_a_lost_race(
    site: Site, part_uri: str, faults: tuple[Fault, ...], puts: int, outcome: str
) -> None:
    """The SDK asks again after its own success, and is answered that the name exists; the footer says whose it is."""
    data, report = part("mine")
    site.proxy.strike("Put Blob", *faults)
    assert commit(part_uri, data, report) == outcome
    assert site.proxy.requests["Put Blob"] == puts
    assert read_report(part_uri).attempt == "mine"
    late, later = part("theirs")
    for fault in (None, "reset_after", "error_before", "busy"):
        if fault is not None:
            site.proxy.strike("Put Blob", fault)
        assert commit(part_uri, late, later) == "race_lost"
    assert storage.read_bytes(part_uri) == data


def test_a_name_that_another_job_took_is_foreign_even_through_faults(site: Site, part_uri: str) -> None:
    data, report = part("theirs", fingerprint="b" * 64)
    assert commit(part_uri, data, report) == "created"
    site.proxy.strike("Put Blob", "error_before", "reset_before")
    site.proxy.strike("Get Blob", "truncated", "reset_before")
    with pytest.raises(ForeignOutput, match="belongs to unit 3 of job bbbbbbbb"):
        commit(part_uri, *part("mine"))
    assert storage.read_bytes(part_uri) == data


def test_a_read_that_is_cut_short_is_read_again(site: Site, part_uri: str) -> None:
    data = os.urandom(3 << 20)
    storage.create_once(part_uri, data)
    site.proxy.strike("Get Blob", "truncated", "truncated", "reset_after")
    assert storage.read_bytes(part_uri) == data
    site.proxy.strike("Get Blob", "truncated", "error_before", "slow")
    with storage.open_read(part_uri) as file:
        assert file.read() == data
    assert Counter(site.proxy.faults) == {"truncated": 3, "reset_after": 1, "error_before": 1, "slow": 1}


def test_a_listing_that_is_cut_short_is_no_shorter_listing(site: Site, part_uri: str) -> None:
    names = [f"{number:03d}.parquet" for number in range(50)]
    for name in names:
        storage.create_once(storage.join(site.out_uri, name), b"x")
    for fault in ALL_FAULTS:
        site.proxy.strike("List Blobs", fault)
        assert sorted(storage.list_names(site.out_uri)) == names
        site.proxy.strike("List Blobs", fault)
        assert len(storage.list_objects(site.out_uri)) == 50
    assert site.proxy.faults.total() == 2 * len(ALL_FAULTS)


def test_a_busy_store_is_left_alone_for_as_long_as_it_asks(site: Site, part_uri: str) -> None:
    site.proxy.strike("Put Blob", "busy")
    began = time.monotonic()
    storage.create_once(part_uri, b"x")
    assert time.monotonic() - began >= 1.0  # Retry-After: 1, where its own first wait is shorter


# Things taken away in mid-run.


class InBackground:
    """`attempt` in a thread."""

    def __init__(self, job: JobSpec) -> None:
        self.ended: Attempt | None = None
        self._crashed: str | None = None

        def run() -> None:
            try:
                self.ended = attempt(job)
            except BaseException:  # the thread's outermost; the test's own thread tells
                self._crashed = traceback.format_exc()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Fails where the run ends before."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert self.running, self.ended
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def join(self) -> Attempt:
        self._thread.join(_PATIENCE_S)
        assert not self.running, "it hangs"
        assert self._crashed is None, self._crashed
        assert self.ended is not None
        return self.ended


def slow_engine(rows_per_s: float) -> dict[str, Any]:
    """Of 4 tokens each."""
    options = {"decode_tokens_per_s": 4 * rows_per_s, "prefill_tokens_per_s": 1e7, "lengths": "max", "max_num_seqs": 16}
    return {"kind": "simulated", "options": options}


def parts_of(site: Site) -> list[str]:
    return [name for name in site.service.names(site.bucket) if name.startswith("out/part-")]


def rows_of(site: Site) -> int:
    """Committed now, as the service itself says."""
    return check(site.input_uri, site.out_uri).rows_out


def test_a_container_that_goes_in_mid_run_is_named_and_nothing_hangs(site: Site) -> None:
    run = InBackground(site.job(engine=slow_engine(20)))
    run.wait_for(lambda: len(parts_of(site)) >= 2)
    rows = rows_of(site)
    site.service.delete_container(site.bucket)
    gone_at = time.monotonic()
    ended = run.join()
    told_s = time.monotonic() - gone_at
    assert isinstance(ended.error, JobError), ended
    assert f"there is no container '{site.bucket}'; create it" in str(ended.error)
    assert f"there is no container '{site.bucket}'" in ended.said  # for the units, too
    with site.service.client() as client:
        for _ in range(100):
            with contextlib.suppress(ResourceExistsError):  # still being deleted
                client.create_container(site.bucket).close()
                break
            time.sleep(0.1)
    site.put_input()
    assert attempt(site.job()).complete
    site.prove()
    print(f"\ncontainer deleted with {rows} rows in it: the run ended with the error {told_s:.1f} s later; {rows_of(site)} after the rerun")


def sas_recipe(site: Site, **place: str) -> StorageSpec:
    service = site.proxy.service
    fields = {"account_name": service.account, "endpoint": service.endpoint, "credential": {"kind": "sas", **place}}
    return StorageSpec.model_validate(fields)


def test_a_sas_that_ends_in_mid_run_says_so_and_a_new_one_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    lifetime_s = 10
    expires_at = time.monotonic() + lifetime_s
    monkeypatch.setenv("THE_SAS", site.service.sas(site.bucket, lifetime_s=lifetime_s))
    job = site.job(storage_=sas_recipe(site, env="THE_SAS"), engine=slow_engine(12))  # 17 s of work
    run = InBackground(job)
    run.wait_for(lambda: len(parts_of(site)) >= 1)
    ended = run.join()
    told_s, rows = time.monotonic() - expires_at, rows_of(site)
    text = f"{ended.error}\n{ended.said}"
    assert not ended.complete
    assert "the store refused the credential (sas)" in text
    assert "is the SAS expired, or does it lack a right (read, create, write, delete, list)? put one that is valid into THE_SAS" in text
    assert "sig=" not in text
    kept = parts_of(site)
    assert kept
    monkeypatch.setenv("THE_SAS", site.service.sas(site.bucket))
    assert attempt(job).complete
    assert set(kept) < set(parts_of(site))
    site.prove()
    print(f"\nSAS expired: the run ended with the error {told_s:.1f} s later, with {rows} rows committed; {rows_of(site)} after the rerun")


def test_with_a_rotated_sas_file_the_same_run_goes_on(site: Site, tmp_path: Path) -> None:
    secret = tmp_path / "token.sas"
    lifetime_s = 10
    began = time.monotonic()
    secret.write_text(site.service.sas(site.bucket, lifetime_s=lifetime_s))
    run = InBackground(site.job(storage_=sas_recipe(site, file=str(secret)), engine=slow_engine(12)))
    run.wait_for(lambda: len(parts_of(site)) >= 1)
    fresh = tmp_path / "fresh.sas"  # written in place, it would be empty for a moment
    fresh.write_text(site.service.sas(site.bucket))
    fresh.replace(secret)
    ended = run.join()
    ran_s = time.monotonic() - began
    assert ran_s > lifetime_s  # else the first one would have lasted
    assert ended.complete, (ended.error, ended.said)
    assert ended.result is not None
    assert ended.result.retries == 0
    site.prove()
    print(f"\nSAS of {lifetime_s} s rotated in its file: the run went on to its end after {ran_s:.1f} s, {rows_of(site)} rows, no retry")
