"""The account of engine seconds, from storage alone: of runs that ended, that died, that go on, and where nothing is known."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.api import run
from jobs.cli import main
from jobs.report import over_runs
from jobs.report import read_raw
from jobs.report import report
from jobs.report import share_of_raw
from jobs.report import statistics_of
from jobs.report import unknown_of
from jobs.runs import earlier_of
from jobs.runs import keep_last_word
from jobs.runs import read_runs
from jobs.spread import STATISTICS
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.ledger import KINDS
from schemas.ledger import ReplicaAccount
from schemas.ledger import RunAccount

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]
FINGERPRINT = "f" * 64


def replica(name: str = "local-0", **values: Any) -> ReplicaAccount:
    """10 s of start, 80 busy at 50 tokens/s, 10 of other kinds."""
    seconds = {"start": 10.0, "busy": 80.0, "starved": 4.0, "commit_blocked": 1.0, "tail": 3.0, "lost": 2.0}
    counts = {"rows": 40, "prompt_tokens": 400, "generated_tokens": 4200, "output_tokens": 4100, "busy_tokens": 4000}
    return ReplicaAccount(**{"name": name, "processes": 1, "seconds": seconds, "busy_s": 80.0, **counts, **values})


def run_of(*replicas: ReplicaAccount, **values: Any) -> RunAccount:
    """100 s for 40 rows and 4,000 tokens."""
    return RunAccount(
        **{
            "run": "20261125T170000Z-00000001", "fingerprint": FINGERPRINT, "state": "complete", "host": "h", "whole": True,
            "began_at": 1000.0, "ended_at": 1100.0, "elapsed_s": 100.0, "units": 4, "rows": 40, "error_rows": 0, "prompt_tokens": 400,
            "output_tokens": 4000, "retries": 0, "profile": "simulated", "engine": {"kind": "simulated"}, "versions": {"tokenmill": "1"},
            "replicas": replicas or (replica(),), **values,
        }
    )  # fmt: skip


@pytest.fixture
def ran(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> Path:
    """The output of a whole inline run of 40 rows of eight tokens at most."""
    write_table([{"id": index, "prompt": f"question {index}"} for index in range(40)])
    result = run(job(make_job), stream=io.StringIO())
    assert result.state == "complete"
    return tmp_path / "out"


def job(make_job: MakeJob, **sections: Any) -> JobSpec:
    options = {"decode_tokens_per_s": 5_000.0, "prefill_tokens_per_s": 1e7, "max_num_seqs": 4, "lengths": "max"}
    return make_job(name="tickets", engine={"options": options}, **sections)


def status(out: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((out / layout.STATUS).read_text())
    return said


def run_files(out: Path) -> list[Path]:
    return sorted((out / layout.RUNS).iterdir())


def test_a_run_leaves_its_account_beside_the_job(ran: Path) -> None:
    (path,) = run_files(ran)
    account = RunAccount.model_validate_json(path.read_bytes())
    assert path.name == f"{account.run}.json"
    assert (account.state, account.whole, account.rows, account.error_rows, account.retries) == ("complete", True, 40, 0, 0)
    assert account.output_tokens == 40 * 8
    assert account.profile == "simulated"
    assert account.engine["kind"] == "simulated"
    assert account.engine["options"]["max_num_seqs"] == 4
    assert account.versions["tokenmill"]
    (only,) = account.replicas
    assert (only.name, only.processes, only.rows, only.generated_tokens, only.output_tokens) == ("inline-0", 1, 40, 320, 320)
    assert only.seconds["busy"] > 0
    assert only.seconds["lost"] == 0
    assert only.seconds_if_over is None
    assert only.lifetime_s <= account.elapsed_s


def test_a_report_needs_neither_inputs_nor_model_nor_status(ran: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "in")
    (ran / layout.STATUS).unlink()
    found = report(str(ran))
    assert (found.name, found.num_requests, found.output_tokens, found.unknown, found.left_out) == ("tickets", 40, 320, (), ())
    share = found.share_of_raw_engine
    assert share is not None
    assert 0 < share < 1


def test_json_has_what_benchmarks_compare_at_its_top_level(ran: Path) -> None:
    done = CliRunner().invoke(main, ["report", str(ran), "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.output)
    assert {"share_of_raw_engine", "output_tokens_per_s", "total_tokens_per_s", "elapsed_s", "num_requests"} <= set(values)
    assert values["num_requests"] == 40
    assert [item["name"] for item in values["replicas"]] == ["inline-0"]
    assert [item["state"] for item in values["runs"]] == ["complete"]
    assert sum(values["replicas"][0]["seconds"].values()) == pytest.approx(values["replicas"][0]["lifetime_s"], abs=0.01)
    assert set(values["statistics"]["output_tokens_per_s"]) == set(STATISTICS)


def test_the_table_names_every_kind_and_statistic(ran: Path) -> None:
    done = CliRunner().invoke(main, ["report", str(ran)])
    assert done.exit_code == 0, done.output
    words = done.output.split()
    assert {kind.replace("_", "-") for kind in KINDS} <= set(words)
    assert {*STATISTICS, "inline-0"} <= set(words)
    assert "raw engine" in done.output
    assert "without the starts" in done.output


def test_the_raw_rate_may_be_given(ran: Path, tmp_path: Path) -> None:
    raw = tmp_path / "engine.json"
    raw.write_text(json.dumps({"output_tokens_per_s": 12_345.0}))
    found = report(str(ran), raw=str(raw))
    assert found.share_of_raw_engine == found.output_tokens_per_s / 12_345.0
    done = CliRunner().invoke(main, ["report", str(ran), "--raw", str(raw)])
    assert "the rate given" in done.output


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"output_tokens_per_s": "fast"}', '{"output_tokens_per_s": 0}', '{"output_tokens_per_s": NaN}']
)
def test_a_raw_rate_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    raw = tmp_path / "engine.json"
    raw.write_text(content)
    with pytest.raises(JobError, match=r"--raw: .*engine\.json"):
        read_raw(str(raw))


def test_a_raw_rate_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot read"):
        read_raw(str(tmp_path / "none.json"))


def test_the_share_is_output_over_what_the_raw_rate_makes_in_the_whole_wall() -> None:
    """Two replicas of 50 tokens/s and 100 s: 10,000 possible."""
    two = run_of(replica("a"), replica("b"), output_tokens=7_500)
    assert share_of_raw(two) == 0.75


def test_without_the_starts_the_share_is_over_the_replicas_own_seconds() -> None:
    """90 s each: 9,000 possible."""
    assert share_of_raw(run_of(replica("a"), replica("b"), output_tokens=7_200), once_up=True) == 0.8


def test_a_replica_whose_batch_was_never_half_full_counts_with_the_others_rate() -> None:
    late = replica("b", busy_s=0.0, busy_tokens=0)
    assert share_of_raw(run_of(replica("a"), late, output_tokens=5_000)) == 0.5
    assert share_of_raw(run_of(late)) is None


def test_runs_are_summed() -> None:
    runs = [run_of(replica("a"), output_tokens=2_500), run_of(replica("a"), replica("b"), output_tokens=5_000)]
    assert share_of_raw(*runs) == 0.5
    a, b = over_runs(runs)
    assert (a.name, a.processes, a.seconds["busy"], a.rows, a.lifetime_s) == ("a", 2, 160.0, 80, 200.0)
    assert b == replica("b")


def test_statistics_are_over_replicas() -> None:
    columns = statistics_of([replica("a", output_tokens=1000), replica("b", output_tokens=2000), replica("c", output_tokens=6000)])
    assert columns["output_tokens_per_s"] == {"min": 10.0, "max": 60.0, "mean": 30.0, "median": 20.0, "sum": 90.0}
    assert columns["busy"] == {"min": 80.0, "max": 80.0, "mean": 80.0, "median": 80.0, "sum": 240.0}


def test_what_is_not_known_is_said() -> None:
    whole, dead = run_of(), run_of(run="20261125T160000Z-00000002", whole=False, state="running", elapsed_s=33.0)
    assert unknown_of([whole], num_done=4) == ()
    (last_word,) = unknown_of([dead, whole], num_done=8)
    assert "20261125T160000Z-00000002 ended without an account" in last_word
    assert "33 s after it began" in last_word
    (goes_on,) = unknown_of([whole, dead], num_done=8)
    assert "goes on, or ended" in goes_on
    (missing,) = unknown_of([whole], num_done=6)
    assert missing.startswith("2 of 6 committed units are in no account")


@pytest.fixture
def died(ran: Path) -> Path:
    """An output whose only run was killed after its last word."""
    for path in run_files(ran):
        path.unlink()
    said = status(ran)
    account = said["account"]
    for item in account["replicas"]:
        item["seconds_if_over"] = {**item["seconds"], "lost": item["seconds"]["busy"], "busy": 0.0}
    (ran / layout.STATUS).write_text(json.dumps(said | {"state": "running"}))
    return ran


def test_a_run_that_died_is_reported_by_its_last_word(died: Path) -> None:
    found = report(str(died))
    (account,) = found.runs
    assert not account.whole
    (only,) = account.replicas
    assert (only.seconds["busy"], only.seconds_if_over) == (0.0, None)  # as if it had ended with that
    assert only.seconds["lost"] > 0
    assert len(found.unknown) == 1


@pytest.mark.parametrize(("state", "age_s", "as_if_over"), [("running", 5.0, False), ("running", 90.0, True), ("complete", 5.0, True)])
def test_a_run_that_goes_on_is_not_reported_as_if_it_had_ended(died: Path, state: str, age_s: float, as_if_over: bool) -> None:
    said = status(died)
    said["account"] |= {"state": state, "ended_at": time.time() - age_s}
    (died / layout.STATUS).write_text(json.dumps(said))
    (only,) = report(str(died)).runs[0].replicas
    assert (only.seconds["lost"] > 0) is as_if_over


def test_the_next_run_keeps_the_last_word_of_one_that_died(died: Path, make_job: MakeJob) -> None:
    first = report(str(died)).runs[0]
    sorted(died.glob("part-*.parquet"))[0].unlink()
    assert run(job(make_job), stream=io.StringIO()).state == "complete"
    assert sorted(path.name.split(".", 1)[1] for path in run_files(died)) == ["json", "last.json"]
    found = report(str(died))
    assert [account.whole for account in found.runs] == [False, True]
    assert found.runs[0] == first
    assert found.num_requests == sum(account.rows for account in found.runs)


def test_a_last_word_is_kept_once_and_not_of_a_run_that_ended(ran: Path) -> None:
    fingerprint = status(ran)["account"]["fingerprint"]
    before = run_files(ran)
    keep_last_word(str(ran), fingerprint)
    assert run_files(ran) == before
    before[0].unlink()
    keep_last_word(str(ran), fingerprint)
    keep_last_word(str(ran), fingerprint)
    assert len(run_files(ran)) == 1


def test_an_account_that_came_after_all_counts_instead_of_the_last_word(ran: Path) -> None:
    (path,) = run_files(ran)
    path.with_name(path.name.replace(".json", ".last.json")).write_bytes(path.read_bytes())
    assert [account.whole for account in report(str(ran)).runs] == [True]


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[1]", b'{"run": 1}'])
def test_a_damaged_account_is_named_and_left_out(ran: Path, content: bytes) -> None:
    (ran / layout.RUNS / "20261125T170000Z-00000001.json").write_bytes(content)
    found = report(str(ran))
    assert len(found.runs) == 1
    (sentence,) = found.left_out
    assert sentence.startswith(f"{layout.RUNS}/20261125T170000Z-00000001.json is no account of a run")
    assert sentence in CliRunner().invoke(main, ["report", str(ran)]).output


def test_an_account_of_another_job_or_under_another_name_is_left_out(ran: Path) -> None:
    foreign = run_of()
    (ran / layout.RUNS / f"{foreign.run}.json").write_text(foreign.model_dump_json())
    (path,) = [path for path in run_files(ran) if foreign.run not in path.name]
    (ran / layout.RUNS / "copy.json").write_bytes(path.read_bytes())
    found = report(str(ran))
    assert len(found.runs) == 1
    assert sorted(found.left_out) == sorted(
        [
            f"{layout.RUNS}/{foreign.run}.json is of job ffffffff, not {found.fingerprint[:8]}, and is left out",
            f"{layout.RUNS}/copy.json says that it is of run {found.runs[0].run}, and is left out",
        ]
    )


@pytest.mark.parametrize("said", ["", "{}", '{"account": 3}', '{"account": {"run": "x"}}', "[" * 5000])
def test_a_damaged_last_word_is_none(ran: Path, said: str) -> None:
    (ran / layout.STATUS).write_text(said)
    assert len(report(str(ran)).runs) == 1
    keep_last_word(str(ran), report(str(ran)).fingerprint)


def test_a_last_word_that_would_name_a_file_elsewhere_is_none(ran: Path) -> None:
    said = status(ran)
    said["account"]["run"] = "../../part-00000000-x"
    (ran / layout.STATUS).write_text(json.dumps(said))
    keep_last_word(str(ran), said["account"]["fingerprint"])
    assert len(run_files(ran)) == 1


def test_an_output_of_a_version_without_accounts_says_so(ran: Path) -> None:
    shutil.rmtree(ran / layout.RUNS)
    said = status(ran)
    del said["account"]
    (ran / layout.STATUS).write_text(json.dumps(said))
    with pytest.raises(JobError, match="no account of the runs that made them, as older versions"):
        report(str(ran))
    done = CliRunner().invoke(main, ["report", str(ran)])
    assert done.exit_code == 2
    assert "tokenmill verify" in done.output or "`verify`" in done.output


def test_a_job_that_never_ran_has_nothing_to_report(ran: Path) -> None:
    shutil.rmtree(ran / layout.RUNS)
    (ran / layout.STATUS).unlink()
    for path in ran.glob("part-*"):
        path.unlink()
    with pytest.raises(JobError, match="no run has ended or said anything yet"):
        report(str(ran))


@pytest.mark.parametrize("name", ["nowhere", "in"])
def test_a_folder_without_a_job_is_refused(ran: Path, tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(main, ["report", str(tmp_path / name)])
    assert done.exit_code == 2
    assert "holds no job" in done.output


def test_two_runs_of_one_job_are_listed_in_their_order(ran: Path, make_job: MakeJob) -> None:
    sorted(ran.glob("part-*.parquet"))[1].unlink()
    run(job(make_job), stream=io.StringIO())
    runs, left_out = read_runs(str(ran), report(str(ran)).fingerprint)
    assert [account.rows for account in runs] == [40, runs[1].rows]
    assert 0 < runs[1].rows < 40
    assert (left_out, runs[0].began_at < runs[1].began_at) == ([], True)


def test_what_a_commands_earlier_drivers_took_is_theirs_alone_since_it_began(ran: Path, make_job: MakeJob) -> None:
    fingerprint = report(str(ran)).fingerprint
    (first,), _ = read_runs(str(ran), fingerprint)
    took = earlier_of(str(ran), fingerprint, since=first.began_at, until=first.ended_at + 60)
    assert first.node_s is not None
    assert took.node_s == pytest.approx(first.node_s + 60)  # its one node stayed
    assert took.seconds == pytest.approx(first.elapsed_s + 60, abs=0.5)
    assert earlier_of(str(ran), fingerprint, since=first.ended_at, until=first.ended_at + 60).node_s == 0  # another command
    sorted(ran.glob("part-*.parquet"))[1].unlink()
    late = run(job(make_job, limits={"deadline": "1h"}), stream=io.StringIO(), since=time.time() - 3601)
    assert (late.state, late.exit_code) == ("limit", 3)


def test_each_run_says_what_its_nodes_cost_and_the_command_what_those_did_that_did_not_know(
    ran: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    """The job that lies in the output is the first run's, which named no price."""
    sorted(ran.glob("part-*.parquet"))[1].unlink()
    run(job(make_job, limits={"usd_per_hour": 3.0}), stream=io.StringIO())
    assert [account.usd_per_hour for account in report(str(ran)).runs] == [None, 3.0]
    page = tmp_path / "r.md"
    asked = ["report", str(ran), "--json", "--markdown", str(page)]
    assert CliRunner().invoke(main, asked).exit_code == 0
    assert "Not known: nobody has said what a node of profile simulated costs." in page.read_text()
    assert CliRunner().invoke(main, [*asked, "--usd-per-hour", "2.5"]).exit_code == 0
    assert "2.50 USD per node and hour" in page.read_text()
    assert CliRunner().invoke(main, [*asked, "--usd-per-hour", "0"]).exit_code == 2


def test_a_run_with_nothing_to_do_leaves_no_account(ran: Path, make_job: MakeJob) -> None:
    run(job(make_job), stream=io.StringIO())
    assert len(run_files(ran)) == 1


def test_a_job_in_memory_has_its_account_too(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table([{"prompt": f"question {index}"} for index in range(10)])
    out = f"memory://{tmp_path.name}-report"
    assert run(job(make_job, output={"uri": out}), stream=io.StringIO()).state == "complete"
    assert report(out).num_requests == 10
