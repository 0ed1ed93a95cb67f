"""What a job takes, on each size and here, and which way to choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from jobs.api import plan
from jobs.api import run
from jobs.canary import Canary
from jobs.canary import StepCost
from jobs.cli import main
from jobs.estimate import Offer
from jobs.estimate import cheapest
from jobs.estimate import offer_here
from jobs.estimate import offers
from jobs.estimate import quickest
from jobs.estimate import tokens_of
from jobs.forecast import forecast
from jobs.forecast import node_counts
from jobs.forecast import sizes_for
from jobs.lengths import Lengths
from jobs.lengths import Mean
from jobs.lengths import earlier_outputs
from jobs.lengths import mean_of
from jobs.lengths import share_of
from jobs.lengths import unknown_output
from pipeline.hardware import known_sizes
from pipeline.shape import known_shape
from schemas.errors import JobError
from schemas.job import JobSpec

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]

LENGTHS = Lengths(
    rows=1_000_000,
    sampled=512,
    prompt=Mean(value=300, low=290, high=310),
    output=Mean(value=200, low=180, high=220),
    basis="history",
)


def test_a_sample_tells_the_mean_and_where_it_lies() -> None:
    found = mean_of([float(value) for value in range(101)])
    assert found.value == 50
    assert 45 < found.low < 50 < found.high < 55
    assert mean_of([7.0] * 9) == Mean(value=7, low=7, high=7)
    with pytest.raises(ValueError, match="no rows"):
        mean_of([])


def test_the_same_sample_gives_the_same_interval() -> None:
    values = [1.0, 5.0, 2.0, 8.0]
    assert mean_of(values) == mean_of(values)


def test_without_any_knowledge_max_tokens_is_the_top() -> None:
    found = unknown_output(mean_of([128.0, 128.0]))
    assert (found.value, found.low, found.high) == (96, 32, 128)


def test_tokens_are_of_the_whole_table() -> None:
    assert tokens_of(LENGTHS).output == Mean(value=2e8, low=1.8e8, high=2.2e8)


def test_a_share_has_an_interval_also_where_all_or_none_of_a_sample_are() -> None:
    assert share_of(0, 512) == Mean(value=0, low=0, high=pytest.approx(0.0032, abs=1e-4))
    assert share_of(512, 512) == Mean(value=1, low=pytest.approx(0.9968, abs=1e-4), high=1)
    half = share_of(256, 512)
    assert (half.value, half.low, half.high) == (0.5, pytest.approx(0.472, abs=1e-3), pytest.approx(0.528, abs=1e-3))


def test_rows_that_are_copied_cost_no_tokens_and_no_hours() -> None:
    some = replace(LENGTHS, reused=Mean(value=900_000, low=880_000, high=910_000))
    assert some.generated == Mean(value=100_000, low=90_000, high=120_000)
    assert tokens_of(some).output == Mean(value=2e7, low=90_000 * 180, high=120_000 * 220)
    (whole,), (less,) = (offers(lengths, known_shape("llama-3.1-8b"), known_sizes()[:1], nodes=(1,)) for lengths in (LENGTHS, some))
    assert less.output_tokens_per_s == whole.output_tokens_per_s
    work = (whole.hours.value - less.hours.value) * 3600 * whole.output_tokens_per_s
    assert work == pytest.approx(0.9 * 2e8)  # start and tail are the same


def test_a_sample_that_is_answered_whole_leaves_a_row() -> None:
    everything = replace(LENGTHS, reused=Mean(value=1_000_000, low=996_800, high=1_000_000))
    assert everything.generated == Mean(value=1, low=1, high=3_200)
    cost = StepCost(per_step=0.01, per_output_token=0.001, per_prompt_token=0.0001)
    canary = Canary(output_lengths=(200,), cost=cost, replicas=2, max_num_seqs=100, start_s=20, output_tokens_per_s=1)
    here = offer_here(everything, canary, profile="local-cpu", usd_per_hour=None)
    assert 20 < here.hours.value * 3600 < 40


def test_every_size_that_holds_the_model_is_offered_for_every_number_of_nodes() -> None:
    found = offers(LENGTHS, known_shape("llama-3.1-70b"), known_sizes(), nodes=(1, 4))
    assert {offer.nodes for offer in found} == {1, 4}
    assert len({offer.profile for offer in found}) == 7
    assert {offer.precision for offer in found} == {"bf16"}
    one, four = (offer for offer in found if offer.profile == "nd96isr-h100-v5")
    assert four.output_tokens_per_s == pytest.approx(4 * one.output_tokens_per_s)
    assert one.hours.low < one.hours.value < one.hours.high
    assert one.usd is not None
    assert four.usd is not None
    assert four.usd.value > one.usd.value  # the start of four nodes costs four times as much
    assert four.hours.value < one.hours.value


def test_a_model_too_large_for_a_node_is_offered_on_as_many_as_hold_it() -> None:
    found = offers(LENGTHS, known_shape("llama-3.1-405b"), known_sizes(), nodes=(1, 2, 4))
    cuts = {offer.profile: (offer.nodes, offer.replicas, offer.devices_per_replica) for offer in reversed(found)}
    assert cuts["nd96asr-v4"] == (4, 1, 32)  # 810 GB of bf16 in 320 GB a node, 37 GB of each GPU's 40 to be had
    assert cuts["nd96isr-h100-v5"] == (2, 1, 16)  # in 640 GB
    assert cuts["nd128isr-gb300-v6"] == (1, 1, 4)
    assert [offer.nodes for offer in found if offer.profile == "nd96isr-h100-v5"] == [2, 4]


def test_a_replica_on_two_nodes_is_no_quicker_than_two_that_each_hold_half_of_the_model() -> None:
    whole = known_shape("llama-3.1-405b")
    (size,) = [size for size in known_sizes() if size.name == "nd96isr-h100-v5"]
    (both,) = offers(LENGTHS, whole, [size], nodes=(1,))
    (half,) = offers(LENGTHS, replace(whole, layers=whole.layers // 2), [size], nodes=(1,), options={"tensor_parallel_size": 8})
    assert 0.4 * half.output_tokens_per_s < both.output_tokens_per_s <= half.output_tokens_per_s


def offer(nodes: int, hours: float, usd: float | None) -> Offer:
    return Offer(
        profile="p", vm_size="s", nodes=nodes, precision="bf16", replicas=1, devices_per_replica=1, batch=1, output_tokens_per_s=1,
        hours=Mean(value=hours, low=0.9 * hours, high=1.2 * hours),
        usd=None if usd is None else Mean(value=usd, low=usd, high=1.2 * usd),
        basis="roofline",
    )  # fmt: skip


def test_the_cheapest_must_be_done_by_the_deadline_in_the_bad_case_too() -> None:
    slow, middle, fast, free = offer(1, 10, 100), offer(2, 5, 110), offer(4, 2, 150), offer(1, 1, None)
    assert cheapest([slow, middle, fast, free], None) is slow
    assert cheapest([slow, middle, fast, free], 7 * 3600) is middle
    assert cheapest([slow, middle, fast, free], 5.9 * 3600) is fast
    assert cheapest([slow], 1) is None


def test_the_quickest_must_stay_below_the_cost_in_the_bad_case_too() -> None:
    slow, middle, fast = offer(1, 10, 100), offer(2, 5, 110), offer(4, 2, 150)
    assert quickest([slow, middle, fast], None) is fast
    assert quickest([slow, middle, fast], 140) is middle
    assert quickest([slow, middle, fast], 100) is None


def test_here_the_canarys_steps_count() -> None:
    cost = StepCost(per_step=0.01, per_output_token=0.001, per_prompt_token=0.0001)
    canary = Canary(output_lengths=(200,), cost=cost, replicas=2, max_num_seqs=100, start_s=20, output_tokens_per_s=1)
    found = offer_here(LENGTHS, canary, profile="local-cpu", usd_per_hour=2.0)
    work = 500_000 * (200 * 0.001 + 300 * 0.0001) + (500_000 * 200 / 100 + 100) * 0.01
    assert found.hours.value == pytest.approx((20 + work) / 3600)
    assert found.usd is not None
    assert found.usd.value == pytest.approx(2 * found.hours.value)
    assert found.basis == "canary"


@pytest.mark.parametrize(("text", "counts"), [("1", (1,)), ("4,1,4", (1, 4))])
def test_node_counts_are_whole_numbers_in_order(text: str, counts: tuple[int, ...]) -> None:
    assert node_counts(text) == counts


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1"])
def test_other_node_counts_are_refused(text: str) -> None:
    with pytest.raises(JobError, match="--nodes: found"):
        node_counts(text)


def test_a_folder_without_a_job_is_no_history(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no job"):
        earlier_outputs(str(tmp_path))


def test_a_plan_estimates_by_guess_by_canary_and_by_history(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(64)]}))
    job = make_job()
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job.model_dump(mode="json", by_alias=True, exclude_defaults=True)))

    def estimate(*more: str) -> dict[str, object]:
        result = CliRunner().invoke(main, ["plan", str(file), "--json", "--nodes", "1", *more])
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)["estimate"]
        assert isinstance(said, dict)
        return said

    guessed = estimate()
    assert guessed["lengths"]["basis"] == "max_tokens"  # type: ignore[index]
    seen = estimate("--canary", "16")
    assert seen["lengths"]["basis"] == "canary"  # type: ignore[index]
    assert seen["offers"][0]["basis"] == "canary"  # type: ignore[index]
    earlier = make_job(output={"uri": str(tmp_path / "earlier")})
    run(earlier)
    known = estimate("--history", earlier.output.uri)
    assert known["lengths"]["basis"] == "history"  # type: ignore[index]
    for words in (["--canary", "16"], ["--history", earlier.output.uri], ["--deadline", "1h"], ["--max-cost", "100"]):
        result = CliRunner().invoke(main, ["plan", str(file), "--nodes", "1", *words])
        assert result.exit_code == 0, result.output
        assert "What it takes" in result.output


def test_canary_and_history_exclude_each_other(make_job: MakeJob) -> None:
    result = CliRunner().invoke(main, ["plan", "--model", "demo", "--canary", "8", "--history", "out"])
    assert (result.exit_code, "give one of them" in result.output) == (2, True)


def test_profiles_are_listed_and_printed_to_start_from() -> None:
    listed = CliRunner().invoke(main, ["profiles"])
    assert listed.exit_code == 0, listed.output
    assert "nd96isr-h100-v5" in listed.output
    shown = CliRunner().invoke(main, ["profiles", "Standard_ND96isr_H100_v5"])
    assert "source:" in shown.output
    assert CliRunner().invoke(main, ["profiles", "none"]).exit_code == 2


def write_file(job: JobSpec, file: Path) -> str:
    file.write_text(json.dumps(job.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
    return str(file)


def test_an_estimate_is_of_the_units_that_are_not_committed(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    long = ["a long question" * 10, "short"]
    write_table(pa.table({"prompt": [long[row >= 80] for row in range(160)]}))
    job = make_job()
    whole = forecast(plan(job), nodes=(1,))
    run(job)
    for part in sorted((tmp_path / "out").glob("part-*.parquet"))[6:]:
        part.unlink()
    rest = forecast(plan(job), nodes=(1,))
    assert (whole.lengths.rows, rest.lengths.rows) == (160, 64)
    assert rest.lengths.prompt.low == rest.lengths.prompt.high < whole.lengths.prompt.low  # of the short rows, which are left
    assert rest.tokens.output.value == whole.tokens.output.value * 64 / 160


def test_a_node_is_cut_by_what_the_checkpoints_files_hold() -> None:
    shape, size = known_shape("llama-3.1-70b"), [size for size in known_sizes() if size.name == "nd96isr-h100-v5"]
    (whole,), (four_bits,) = (offers(LENGTHS, shape, size, nodes=(1,), weight_bytes=weights) for weights in (None, 40e9))
    assert four_bits.devices_per_replica < whole.devices_per_replica


def test_rows_that_cannot_be_asked_cost_no_tokens(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table([{"prompt": None if row % 4 == 0 else f"question {row}"} for row in range(160)])
    job = make_job()
    found = forecast(plan(job), nodes=(1,))
    assert (found.lengths.sampled, found.lengths.unasked.value, found.lengths.generated.value) == (120, 40, 120)
    assert found.tokens.output.value == found.lengths.output.value * 120
    shown = CliRunner().invoke(main, ["plan", write_file(job, tmp_path / "job.json")])
    assert "of 160 rows about 40 cannot be asked" in shown.output


def test_a_history_of_longer_completions_is_cut_at_what_this_job_allows(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table([{"prompt": f"question {row}"} for row in range(64)])
    earlier = make_job(output={"uri": str(tmp_path / "earlier")}, sampling={"max_tokens": 64})
    run(earlier)
    assert max(earlier_outputs(earlier.output.uri)) > 8
    job = make_job(sampling={"max_tokens": 8})
    assert forecast(plan(job), history=[earlier.output.uri], nodes=(1,)).lengths.output.high <= 8


def test_units_whose_objects_have_changed_are_not_in_the_estimate(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    for name in ("in/a.parquet", "in/b.parquet"):
        write_table(pa.table({"prompt": [f"{name} {row}" for row in range(32)]}), name)
    job = make_job()
    run(job)
    for part in (tmp_path / "out").glob("part-*.parquet"):
        part.unlink()
    write_table(pa.table({"prompt": ["changed"] * 32}), "in/a.parquet")
    assert forecast(plan(job), nodes=(1,)).lengths.rows == 32


def test_where_all_is_committed_nothing_is_estimated(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(32)]}))
    job = make_job()
    file = write_file(job, tmp_path / "job.json")
    run(job)
    shown = CliRunner().invoke(main, ["plan", file])
    assert (shown.exit_code, "nothing is left to estimate" in shown.output) == (0, True), shown.output
    assert json.loads(CliRunner().invoke(main, ["plan", file, "--json"]).stdout)["estimate"] is None


def test_a_guess_goes_by_the_rows_own_max_tokens(make_job: MakeJob, write_table: WriteTable) -> None:
    own = [json.dumps({"max_tokens": 100}) if row % 2 else None for row in range(64)]
    write_table(pa.table({"prompt": [f"question {row}" for row in range(64)], "own": own}))
    found = forecast(plan(make_job(input={"sampling": "own"})), nodes=(1,)).lengths.output
    assert found.value == 0.75 * (100 + 8) / 2
    assert 0.25 * 30 < found.low < 0.25 * 54
    assert 54 < found.high < 80


def test_each_size_is_compared_once_and_one_of_the_users_own_beside_azures(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CliRunner().invoke(main, ["profiles", "nd96isr-h100-v5"]).stdout)
    azures = [size.name for size in known_sizes()]
    for profile in ("auto", "local-cpu", "nd96isr-h100-v5", "Standard_ND96isr_H100_v5"):
        assert [size.name for size in sizes_for(profile)] == azures
    assert [size.name for size in sizes_for(str(tmp_path / "mine.yaml"))] == [*azures, "mine"]
    alike = tmp_path / "nd96isr-h100-v5.yaml"
    alike.write_text((tmp_path / "mine.yaml").read_text().replace("max_num_seqs: ", "max_num_seqs: 1"))
    assert [size.name for size in sizes_for(str(alike))] == [*azures, str(alike)]


def test_a_plan_tells_the_users_own_size_from_azures(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(64)]}))
    (tmp_path / "mine.yaml").write_text(CliRunner().invoke(main, ["profiles", "nd96isr-h100-v5"]).stdout)
    file = write_file(make_job(engine={"profile": str(tmp_path / "mine.yaml")}), tmp_path / "job.json")
    shown = CliRunner().invoke(main, ["plan", file, "--nodes", "1"])
    assert shown.exit_code == 0, shown.output
    nodes = [line.split()[1] for line in shown.output.splitlines() if line.endswith("roofline   │")]
    assert {"mine", "nd96isr-h100-v5", "Standard_ND96asr_v4"} <= set(nodes)
    assert len(nodes) == len(set(nodes)) == len(known_sizes()) + 1
    assert "cannot hold this model" not in shown.output
