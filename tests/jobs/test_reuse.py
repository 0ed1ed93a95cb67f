"""Reuse, end to end on the simulated engine: exactly the rows that changed are generated, and every row is proven."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from jobs.api import plan
from jobs.api import run
from jobs.cli import main
from jobs.forecast import forecast
from jobs.summary import RunResult
from jobs.verify import verify
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from tests.conftest import build_tiny_model
from tests.conftest import read_output

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]
_ROWS = 400
_EDITED = range(0, _ROWS, 20)
"""Five in a hundred."""


def rows(edited: range | tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [{"id": row, "prompt": f"question {row}" + (", please" if row in edited else "")} for row in range(_ROWS)]


class Place:
    """Two tables and their outputs: what was asked before, and what is asked now."""

    def __init__(self, make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
        self._make_job, self._write_table, self._folder = make_job, write_table, tmp_path

    def out(self, name: str) -> Path:
        return self._folder / f"out-{name}"

    def job(self, name: str, table: list[dict[str, Any]] | pa.Table, **sections: Any) -> JobSpec:
        path = self._write_table(table, f"in-{name}/prompts.parquet")
        inputs = {"uri": str(path), **sections.pop("input", {})}
        output = {"uri": str(self.out(name)), **sections.pop("output", {})}
        return self._make_job(input=inputs, output=output, **sections)

    def run(self, name: str, table: list[dict[str, Any]] | pa.Table, **sections: Any) -> RunResult:
        result = run(self.job(name, table, **sections), stream=io.StringIO())
        assert result.exit_code == 0
        verdict = verify(str(self.out(name)))
        assert verdict.complete, verdict.problems
        return result

    def generated(self, result: RunResult) -> int:
        """Rows that an engine has answered, of a table without errors."""
        return result.this_run.rows - result.this_run.reused_rows - result.this_run.copied_rows


@pytest.fixture
def place(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> Place:
    """See Place."""
    return Place(make_job, write_table, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inline", "local"])
def test_an_edit_of_five_rows_in_a_hundred_pays_for_just_these(place: Place, kind: str) -> None:
    ids = {"token_ids": True}
    old = place.run("old", rows(), output=ids)
    result = place.run("new", rows(_EDITED), output=ids, reuse=[str(place.out("old"))], cluster={"kind": kind})
    plain = place.run("plain", rows(_EDITED), output=ids)
    assert place.generated(old) == place.generated(plain) == _ROWS
    assert place.generated(result) == len(_EDITED)
    assert result.this_run.reused_rows == _ROWS - len(_EDITED)
    assert read_output(place.out("new")).equals(read_output(place.out("plain")))
    kept = [row for row in read_output(place.out("new")).to_pylist() if row["id"] not in _EDITED]
    assert result.this_run.reused_tokens == sum(row["completion_tokens"] for row in kept)


def test_reused_rows_are_counted_everywhere(place: Place) -> None:
    place.run("old", rows())
    result = place.run("new", rows(_EDITED), reuse=[str(place.out("old"))])
    count = _ROWS - len(_EDITED)
    assert result.to_dict()["this_run"]["reused_rows"] == count
    assert result.account is not None
    assert result.account.reused_tokens == result.this_run.reused_tokens
    assert result.account.output_tokens == result.this_run.completion_tokens - result.this_run.reused_tokens  # no engine's doing
    manifest = pq.read_table(place.out("new") / layout.MANIFEST)
    assert sum(row["reused_rows"] for row in manifest.to_pylist()) == count
    metadata = [pq.read_metadata(path).metadata or {} for path in place.out("new").glob("part-*")]
    footers = [json.loads(footer[b"tokenmill.provenance"]) for footer in metadata]
    (fingerprint,) = {source["fingerprint"] for footer in footers for source in footer["reused_from"]}
    assert sum(source["rows"] for footer in footers for source in footer["reused_from"]) == count
    assert fingerprint in (place.out("old") / layout.JOB).read_text()
    from jobs.reporting.evidence import gather
    from jobs.reporting.sections import repeated

    facts = dict(repeated(gather(str(place.out("new")))).facts)
    assert str(facts["rows reused from earlier outputs"]).startswith(f"{count} (")


def test_rows_in_another_order_and_table_with_other_columns_are_found(place: Place) -> None:
    place.run("old", rows(), output={"prefix": "was_", "token_ids": True})
    table = [{"prompt": f"question {row}", "more": row} for row in reversed(range(_ROWS - 50, _ROWS + 50))]
    result = place.run("new", table, reuse=[str(place.out("old"))], output={"prefix": "is_"})
    assert (place.generated(result), result.this_run.reused_rows) == (50, 50)
    before = {row["prompt"]: row["was_completion"] for row in read_output(place.out("old")).to_pylist()}
    after = read_output(place.out("new")).to_pylist()
    assert [row["more"] for row in after] == [row["more"] for row in table]
    assert all(row["is_completion"] == before[row["prompt"]] for row in after if row["prompt"] in before)


@pytest.mark.slow
def test_several_outputs_and_what_they_took_over_themselves_are_taken_from(place: Place) -> None:
    place.run("first", rows()[: _ROWS // 2])
    second = place.run("second", rows()[: _ROWS // 2 + 100], reuse=[str(place.out("first"))])
    third = place.run("third", rows(), reuse=[str(place.out("second"))])
    both = place.run("both", rows(), reuse=[str(place.out("first")), str(place.out("second"))])
    assert [place.generated(result) for result in (second, third, both)] == [100, _ROWS // 2 - 100, _ROWS // 2 - 100]
    assert read_output(place.out("third")).equals(read_output(place.out("both")))


def test_errors_are_made_anew_and_identical_rows_all_get_the_answer(place: Place) -> None:
    table = [{"id": row, "prompt": None if row == 3 else "the same" if row < 10 else f"question {row}"} for row in range(20)]
    place.run("old", table)
    result = place.run("new", table, reuse=[str(place.out("old"))])
    assert (result.this_run.reused_rows, result.this_run.error_rows) == (19, 1)
    assert read_output(place.out("new")).equals(read_output(place.out("old")))


def test_rows_with_their_own_sampling_are_matched_one_by_one(place: Place) -> None:
    def table(more: int) -> list[dict[str, Any]]:
        own = [json.dumps({"max_tokens": 4 + row % 3 + (more if row < 30 else 0)}) for row in range(100)]
        return [{"prompt": f"question {row}", "own": own[row]} for row in range(100)]

    place.run("old", table(0), input={"sampling": "own"})
    result = place.run("new", table(1), input={"sampling": "own"}, reuse=[str(place.out("old"))])
    assert place.generated(result) == 30


@pytest.mark.slow
def test_drawn_rows_are_taken_over_where_job_and_row_draw_by_the_same_seed(place: Place) -> None:
    drawn = {"temperature": 0.8, "n": 3, "seed": 11}
    place.run("old", rows(), sampling=drawn, output={"token_ids": True})
    result = place.run("new", rows(_EDITED), sampling=drawn, reuse=[str(place.out("old"))])
    plain = place.run("plain", rows(_EDITED), sampling=drawn)
    assert place.generated(result) == len(_EDITED)
    assert read_output(place.out("new")).equals(read_output(place.out("plain")))
    assert plain.this_run.reused_rows == 0
    with pytest.raises(JobError, match=r"sampling\.seed: this job has 12, that output 11"):
        run(place.job("other", rows(), sampling={**drawn, "seed": 12}, reuse=[str(place.out("old"))]), stream=io.StringIO())
    with pytest.raises(JobError, match=r"sampling\.seed: this job has one made of the job"):
        run(place.job("none", rows(), sampling={"temperature": 0.8, "n": 3}, reuse=[str(place.out("old"))]), stream=io.StringIO())
    assert not place.out("other").exists()


def test_an_output_without_a_column_that_is_wanted_gives_nothing(place: Place) -> None:
    place.run("old", rows())
    said = io.StringIO()
    result = run(place.job("new", rows(), output={"token_ids": True}, reuse=[str(place.out("old"))]), stream=said)
    assert (result.exit_code, result.this_run.reused_rows) == (0, 0)
    assert "keeps no token ids" in said.getvalue()


def test_an_output_of_another_model_template_or_sampling_is_refused_with_what_differs(place: Place, tmp_path: Path) -> None:
    place.run("old", rows()[:5])
    reuse = [str(place.out("old"))]
    model = build_tiny_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    template = build_tiny_model(tmp_path / "template")
    (template / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    wrong: dict[str, dict[str, Any]] = {
        "weights": {"model": str(model)},
        "chat_template": {"model": str(template)},
        "sampling.max_tokens: this job has 9, that output 8": {"sampling": {"max_tokens": 9}},
        "engine.options.lengths": {"engine": {"options": {"lengths": "max"}}},
    }
    for match, sections in wrong.items():
        with pytest.raises(JobError, match=match):
            run(place.job("new", rows()[:5], reuse=reuse, **sections), stream=io.StringIO())
        assert not place.out("new").exists()


def test_what_is_no_output_is_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"reuse: .*holds no job"):
        run(place.job("new", rows()[:5], reuse=[str(tmp_path / "nowhere")]), stream=io.StringIO())
    with pytest.raises(JobError, match="this job's own output"):
        run(place.job("new", rows()[:5], reuse=[str(place.out("new"))]), stream=io.StringIO())
    with pytest.raises(JobError, match="reuse"):
        place.job("new", rows()[:5], reuse=[""])
    with pytest.raises(JobError, match=r"reuse is memory://"):
        place.job("new", rows()[:5], reuse=["memory://x"], cluster={"kind": "local"})
    with pytest.raises(JobError, match="secret"):
        place.job("new", rows()[:5], reuse=["https://a.blob.core.windows.net/c?sv=2024-01-01&sig=abcdefgh"])
    assert not place.out("new").exists()


@pytest.mark.slow
def test_missing_and_damaged_parts_of_an_earlier_output_cost_their_rows_alone(place: Place) -> None:
    place.run("old", rows())
    parts = sorted(place.out("old").glob("part-*.parquet"))
    lost = [pq.read_metadata(path).num_rows for path in parts[:2]]
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:-30])
    said = io.StringIO()
    result = run(place.job("new", rows(), reuse=[str(place.out("old"))]), stream=said)
    assert place.generated(result) == sum(lost)
    assert "1 parts of earlier outputs are gone or damaged" in said.getvalue()  # the other was not even listed
    assert verify(str(place.out("new"))).complete


def test_a_part_that_goes_after_it_was_indexed_costs_its_rows_alone(place: Place) -> None:
    from jobs.accept import accept
    from jobs.accept import store
    from jobs.reuse import find_earlier
    from jobs.reuse import index_earlier

    place.run("old", rows())
    job = place.job("new", rows(), reuse=[str(place.out("old"))])
    accepted = accept(job)
    index_earlier(store(accepted), find_earlier(accepted), lambda _: None)
    gone, other, *_ = sorted(place.out("old").glob("part-*.parquet"))
    num_rows = pq.read_metadata(gone).num_rows
    # As if the listing were older than the store: the index names a part that is another one by now.
    gone.write_bytes(other.read_bytes())
    result = run(job, stream=io.StringIO())
    assert place.generated(result) == num_rows
    assert verify(str(place.out("new"))).complete


def test_a_damaged_index_is_made_anew_and_a_good_one_is_taken(place: Place) -> None:
    place.run("old", rows())
    job = place.job("new", rows(_EDITED), reuse=[str(place.out("old"))])
    assert run(job, stream=io.StringIO()).this_run.reused_rows == _ROWS - len(_EDITED)
    (index,) = (place.out("new") / layout.REUSE).iterdir()
    good = index.read_bytes()
    for data, word in ((good[:100], "indexed in"), (good, "indexed by an earlier run")):
        index.write_bytes(data)
        for path in sorted(place.out("new").glob("part-*.parquet"))[:3]:
            path.unlink()
        said = io.StringIO()
        result = run(job, stream=said)
        assert word in said.getvalue()
        assert place.generated(result) == sum(1 for row in _EDITED if row < result.this_run.rows)
        assert index.read_bytes() == good


@pytest.mark.slow
def test_a_job_goes_on_with_more_or_fewer_earlier_outputs(place: Place) -> None:
    place.run("old", rows())
    bare = place.job("new", rows(_EDITED))
    reusing = bare.model_copy(update={"reuse": [str(place.out("old"))]})
    run(bare, stream=io.StringIO())
    before = read_output(place.out("new"))
    for number, (job, reuses) in enumerate([(reusing, True), (bare, False), (reusing, True)]):
        lost = sorted(place.out("new").glob("part-*.parquet"))[number]
        num_rows = pq.read_metadata(lost).num_rows
        lost.unlink()
        result = run(job, stream=io.StringIO())
        assert (result.exit_code, result.this_run.rows, result.this_run.reused_rows > 0) == (0, num_rows, reuses)
    assert read_output(place.out("new")).equals(before)
    assert verify(str(place.out("new"))).complete


def test_what_an_unfinished_output_has_committed_counts(place: Place) -> None:
    place.run("old", rows())
    (place.out("old") / layout.SUCCESS).unlink()
    parts = sorted(place.out("old").glob("part-*.parquet"))
    left = sum(pq.read_metadata(path).num_rows for path in parts[:5])
    for path in parts[5:]:
        path.unlink()
    assert place.run("new", rows(), reuse=[str(place.out("old"))]).this_run.reused_rows == left


def test_a_finished_job_needs_its_earlier_outputs_no_more(place: Place, tmp_path: Path) -> None:
    import shutil

    place.run("old", rows())
    job = place.job("new", rows(_EDITED), reuse=[str(place.out("old"))])
    run(job, stream=io.StringIO())
    shutil.rmtree(place.out("old"))
    assert run(job, stream=io.StringIO()).exit_code == 0
    assert verify(str(place.out("new"))).complete


def test_more_units_are_sent_where_engines_see_few_of_their_rows() -> None:
    from jobs.driver import engine_rows
    from schemas.manifest import Totals

    assert engine_rows(100, Totals()) == 100
    assert engine_rows(100, Totals(rows=50, reused_rows=10)) == 80
    assert engine_rows(100, Totals(rows=50, reused_rows=50)) == 13  # not nothing: it may be over with what is known
    assert engine_rows(0, Totals()) == 0


def estimated(job: JobSpec) -> tuple[Any, list[str]]:
    """Lengths of the plan's estimate, and what was said."""
    said: list[str] = []
    return forecast(plan(job), nodes=(1,), say=said.append).lengths, said


def test_an_estimate_is_of_the_rows_that_no_earlier_output_answers(place: Place) -> None:
    place.run("old", rows())
    long = [{"id": row, "prompt": f"question {row}" + (" and more of it" * 3 if row in _EDITED else "")} for row in range(_ROWS)]
    job = place.job("new", long, reuse=[str(place.out("old"))])
    found, _ = estimated(job)
    plain, _ = estimated(place.job("plain", long))
    assert (found.rows, found.sampled, found.reused.value) == (_ROWS, _ROWS, _ROWS - len(_EDITED))
    assert found.generated.low < len(_EDITED) == found.generated.value < found.generated.high
    assert found.prompt.low > plain.prompt.high  # only the edited rows, which are the long ones
    assert (plain.reused.value, plain.generated.value) == (0, _ROWS)
    assert not place.out("new").exists()


def test_an_estimate_knows_the_seeds_that_drawn_rows_will_have(place: Place) -> None:
    drawn = {"temperature": 0.8, "seed": 11}
    place.run("old", rows(), sampling=drawn)
    kept, _ = estimated(place.job("new", rows(_EDITED), sampling=drawn, reuse=[str(place.out("old"))]))
    assert kept.reused.value == _ROWS - len(_EDITED)
    # One row more at the front: every other row stands elsewhere, and draws by another seed.
    moved, _ = estimated(place.job("moved", [{"id": -1, "prompt": "first"}, *rows()], sampling=drawn, reuse=[str(place.out("old"))]))
    assert moved.reused.value == 0


def test_an_estimate_for_nodes_elsewhere_takes_their_engines_for_the_earlier_ones(place: Place) -> None:
    place.run("old", rows())
    cluster = {"kind": "address", "address": "tls://nowhere:8786", "keys": "keys"}
    found, _ = estimated(place.job("new", rows(_EDITED), cluster=cluster, reuse=[str(place.out("old"))]))
    assert found.reused.value == _ROWS - len(_EDITED)


def test_an_estimate_counts_no_output_without_a_wanted_column_and_no_lost_part(place: Place) -> None:
    place.run("old", rows())
    without, said = estimated(place.job("new", rows(), output={"token_ids": True}, reuse=[str(place.out("old"))]))
    assert (without.reused.value, "keeps no token ids" in said[0]) == (0, True)
    damaged = sorted(place.out("old").glob("part-*.parquet"))[0]
    num_rows = pq.read_metadata(damaged).num_rows
    damaged.write_bytes(damaged.read_bytes()[:-30])
    found, _ = estimated(place.job("other", rows(), reuse=[str(place.out("old"))]))
    assert found.reused.value == _ROWS - num_rows


def test_an_estimate_takes_the_index_that_an_earlier_run_left(place: Place) -> None:
    place.run("old", rows())
    job = place.job("new", rows(_EDITED), reuse=[str(place.out("old"))])
    run(job, stream=io.StringIO())
    lost = sorted(place.out("new").glob("part-*.parquet"))[0]
    left = pq.read_metadata(lost).num_rows
    lost.unlink()
    found, said = estimated(job)
    assert (found.rows, "index that an earlier run has left" in said[0]) == (left, True)
    assert found.reused.value == pytest.approx(left - sum(row < left for row in _EDITED))


def test_plan_says_how_many_rows_are_copied_also_as_json(place: Place, tmp_path: Path) -> None:
    place.run("old", rows())
    job = place.job("new", rows(_EDITED), reuse=[str(place.out("old"))])
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
    shown = CliRunner().invoke(main, ["plan", str(file), "--nodes", "1"])
    assert f"of {_ROWS} rows about {_ROWS - len(_EDITED)} (" in shown.output
    assert f"are copied from {place.out('old')}" in shown.output
    lengths = json.loads(CliRunner().invoke(main, ["plan", str(file), "--json"]).stdout)["estimate"]["lengths"]
    assert (lengths["reused"]["value"], lengths["generated"]["value"]) == (_ROWS - len(_EDITED), len(_EDITED))
    job = place.job("own", rows(_EDITED))
    file.write_text(json.dumps(job.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
    assert "copied" not in CliRunner().invoke(main, ["plan", str(file), "--nodes", "1"]).output


def test_plan_and_run_take_the_flag(place: Place, tiny_model: Path) -> None:
    place.run("old", rows())
    job = place.job("new", rows(_EDITED), reuse=[str(place.out("old"))])
    assert [one.rows for one in plan(job).earlier] == [_ROWS]
    assert not place.out("new").exists()
    flags = ["--model", str(tiny_model), "--input", str(job.input.uri), "--prompt", "prompt", "--output", str(place.out("new"))]
    flags += ["--engine", "simulated", "--cluster", "inline", "--max-tokens", "8", "--reuse", str(place.out("old"))]
    planned = CliRunner().invoke(main, ["plan", "--no-estimate", *flags])
    assert (planned.exit_code, f"{_ROWS} committed rows" in planned.output) == (0, True), planned.output
    done = CliRunner().invoke(main, ["run", "--json", *flags])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["this_run"]["reused_rows"] == _ROWS - len(_EDITED)


@pytest.mark.slow
def test_rows_in_another_order_altogether_are_taken_from_every_part_for_every_unit(place: Place) -> None:
    ids = {"token_ids": True}
    place.run("old", rows(), output=ids)
    shuffled = rows(_EDITED)
    random.Random(5).shuffle(shuffled)
    result = place.run("new", shuffled, output=ids, reuse=[str(place.out("old"))])
    assert place.generated(result) == len(_EDITED)
    place.run("plain", shuffled, output=ids)
    assert read_output(place.out("new")).equals(read_output(place.out("plain")))
