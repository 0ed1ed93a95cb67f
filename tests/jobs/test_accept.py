"""A wrong job is refused before anything starts: a JobError that names the field, what was found and what to do."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.api import plan
from jobs.api import run
from jobs.summary import RunResult
from jobs.verify import verify
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from tests.conftest import build_tiny_model
from tests.conftest import read_output

MakeJob = Callable[..., JobSpec]
WriteTable = Callable[..., Path]


def quiet(job: JobSpec) -> RunResult:
    return run(job, stream=io.StringIO())


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refusal(job: JobSpec) -> str:
    """The message with which both `plan` and `run` refuse the job. Neither may have written anything."""
    output = Path(job.output.uri)
    before = files_in(output)
    with pytest.raises(JobError) as planned:
        plan(job)
    with pytest.raises(JobError) as ran:
        quiet(job)
    assert str(planned.value) == str(ran.value)
    assert ran.value.exit_code == 2
    assert files_in(output) == before
    return str(ran.value)


def questions(count: int = 4, first: int = 0) -> list[dict[str, Any]]:
    return [{"id": index, "prompt": f"question {index}"} for index in range(first, first + count)]


# The input is not there, or cannot be read.


def test_an_input_that_is_not_there_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    message = refusal(make_job(input={"uri": str(tmp_path / "nowhere.parquet")}))
    assert message.startswith("input.uri: ")
    assert str(tmp_path / "nowhere.parquet") in message


def test_a_glob_that_matches_nothing_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    message = refusal(make_job())
    assert message.startswith("input.uri: no file matches ")
    assert str(tmp_path / "in" / "*.parquet") in message


def test_a_folder_without_parquet_files_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("none here")
    message = refusal(make_job(input={"uri": str(tmp_path / "in")}))
    assert message.startswith("input.uri: the folder ")
    assert str(tmp_path / "in") in message


def test_an_input_below_a_file_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    path = write_table(questions())
    message = refusal(make_job(input={"uri": str(path / "more.parquet")}))
    assert message.startswith("input.uri: ")
    assert str(path / "more.parquet") in message


def test_one_missing_input_of_several_is_named(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    path = write_table(questions())
    message = refusal(make_job(input={"uri": [str(path), str(tmp_path / "gone.parquet")]}))
    assert str(tmp_path / "gone.parquet") in message
    assert str(path) not in message


def test_a_storage_nobody_knows_is_refused(make_job: MakeJob) -> None:
    message = refusal(make_job(input={"uri": "gopher://host/a.parquet"}))
    assert "gopher://host/a.parquet" in message
    assert "az://" in message


def break_empty(path: Path) -> None:
    path.write_bytes(b"")


def break_text(path: Path) -> None:
    path.write_text("id,prompt\n1,what is this?\n" * 20)


def break_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def break_footer(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-8:-4] = (10**9).to_bytes(4, "little")
    path.write_bytes(data)


def break_footer_content(path: Path) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = bytes(length)
    path.write_bytes(data)


BREAKS = [break_empty, break_text, break_truncated, break_footer, break_footer_content]


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    make_job: MakeJob, write_table: WriteTable, break_it: Callable[[Path], None]
) -> None:
    write_table(questions(), "in/a.parquet")
    bad = write_table(questions(first=4), "in/b.parquet")
    break_it(bad)
    message = refusal(make_job())
    assert message.startswith(f"input.uri: {bad}: cannot be read as Parquet: ")
    assert "input.unreadable: skip" in message


@pytest.mark.parametrize("break_it", BREAKS)
def test_skip_leaves_unreadable_files_out_and_names_them(
    make_job: MakeJob, write_table: WriteTable, break_it: Callable[[Path], None], tmp_path: Path
) -> None:
    write_table(questions(), "in/a.parquet")
    bad = write_table(questions(first=4), "in/b.parquet")
    write_table(questions(first=8), "in/c.parquet")
    break_it(bad)
    stream = io.StringIO()
    result = run(make_job(input={"unreadable": "skip"}), stream=stream)
    assert (result.state, result.rows) == ("complete", 8)
    assert [uri for uri, _ in result.skipped] == [str(bad)]
    assert str(bad) in stream.getvalue()
    assert read_output(tmp_path / "out")["id"].to_pylist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert verify(str(tmp_path / "out")).complete


def test_skip_with_nothing_left_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    bad = write_table(questions())
    break_text(bad)
    assert str(bad) in refusal(make_job(input={"unreadable": "skip"}))


def test_every_unreadable_file_is_counted(make_job: MakeJob, write_table: WriteTable) -> None:
    for name in ("a", "b", "c"):
        break_text(write_table(questions(), f"in/{name}.parquet"))
    assert "(and 2 more)" in refusal(make_job())


# Schemas.

_PLAIN = pa.table({"id": pa.array([1, 2], pa.int64()), "prompt": ["one", "two"]})
_NOT_NULL = pa.schema([pa.field("id", pa.int64()), pa.field("prompt", pa.string(), nullable=False)])

DIFFERENT = [
    (pa.table({"id": pa.array([1], pa.int32()), "prompt": ["x"]}), "its column 'id' is int32, expected int64"),
    (pa.table({"prompt": ["x"]}), "it lacks column 'id'"),
    (pa.table({"id": [1], "prompt": ["x"], "extra": [2]}), "it also has column 'extra'"),
    (pa.table({"prompt": ["x"], "id": [1]}), "its columns are in another order: prompt, id"),
]


@pytest.mark.parametrize(("other", "difference"), DIFFERENT)
def test_schemas_that_differ_are_refused_with_file_and_field(
    make_job: MakeJob, write_table: WriteTable, other: pa.Table, difference: str
) -> None:
    first, second = write_table(_PLAIN, "in/a.parquet"), write_table(other, "in/b.parquet")
    message = refusal(make_job())
    assert message.startswith(f"input.uri: {second} has another schema than {first}: {difference}")
    assert "input.schemas: unify" in message


def test_a_column_that_may_not_be_null_in_one_file_alone_is_named(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(_PLAIN, "in/a.parquet")
    second = write_table(_PLAIN.cast(_NOT_NULL), "in/b.parquet")
    message = refusal(make_job())
    assert str(second) in message
    assert "'prompt'" in message
    assert "another order" not in message


@pytest.mark.parametrize("other", [table for table, _ in DIFFERENT])
def test_unify_reads_the_union_with_nulls(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, other: pa.Table) -> None:
    write_table(_PLAIN, "in/a.parquet")
    write_table(other, "in/b.parquet")
    result = quiet(make_job(input={"schemas": "unify"}))
    made = read_output(tmp_path / "out")
    assert (result.state, result.totals.error_rows) == ("complete", 0)
    expected = pa.concat_tables([_PLAIN, other], promote_options="permissive")
    assert made.select(expected.column_names).to_pylist() == expected.to_pylist()
    assert verify(str(tmp_path / "out")).complete


def test_unify_makes_room_for_nulls_in_a_column_that_one_file_lacks(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    schema = pa.schema([pa.field("prompt", pa.string()), pa.field("code", pa.int64(), nullable=False)])
    write_table(pa.table([["one"], [7]], schema=schema), "in/a.parquet")
    write_table(pa.table({"prompt": ["two"]}), "in/b.parquet")
    result = quiet(make_job(input={"schemas": "unify"}, limits={"attempts": 1}))
    assert (result.state, result.failed) == ("complete", {})
    assert read_output(tmp_path / "out")["code"].to_pylist() == [7, None]
    assert verify(str(tmp_path / "out")).complete


def test_schemas_without_a_union_are_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(_PLAIN, "in/a.parquet")
    write_table(pa.table({"id": [[1]], "prompt": ["x"]}), "in/b.parquet")
    assert refusal(make_job(input={"schemas": "unify"})).startswith("input.uri: the schemas have no union: ")


# Columns.


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"prompt": "question"}, "input.prompt"),
        ({"prompt": "Answer: {question}"}, "input.prompt"),
        ({"prompt": {"messages": "question"}}, "input.prompt"),
        ({"sampling": "question"}, "input.sampling"),
    ],
)
def test_a_missing_column_is_refused_with_those_there_are(
    make_job: MakeJob, write_table: WriteTable, section: dict[str, Any], field: str
) -> None:
    write_table(questions())
    assert refusal(make_job(input=section)) == f"{field}: the table has no column 'question'; it has id, prompt"


def test_a_prompt_column_that_is_not_text_is_refused_with_a_way_out(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions())
    message = refusal(make_job(input={"prompt": "id"}))
    assert message.startswith("input.prompt: column 'id' is int64; allowed are text")
    assert '"{id}"' in message


@pytest.mark.parametrize("prompt", ["prompt", "Say {prompt}", {"messages": "chat"}])
def test_a_sampling_column_of_a_wrong_type_is_refused(make_job: MakeJob, write_table: WriteTable, prompt: str | dict[str, str]) -> None:
    write_table([{"id": 1, "prompt": "x", "chat": '[{"role": "user", "content": "x"}]'}])
    message = refusal(make_job(input={"prompt": prompt, "sampling": "id"}))
    assert message.startswith("input.sampling: column 'id' is int64; allowed are JSON text or a struct")


@pytest.mark.parametrize("template", ["Say {}", "Say {0}", "Say {prompt!r}", "Say {prompt:>10}", "Say {prompt", "Say {{nothing}}"])
def test_a_template_with_anything_but_column_names_is_refused(make_job: MakeJob, write_table: WriteTable, template: str) -> None:
    write_table(questions())
    assert refusal(make_job(input={"prompt": template})).startswith("input.prompt: ")


def test_a_prompt_column_that_is_there_twice_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]))
    assert refusal(make_job()) == "input.prompt: the table has 2 columns named 'prompt'; rename them"


@pytest.mark.parametrize("name", ["completion", "finish_reason", "prompt_tokens", "completion_tokens", "error"])
def test_a_clash_of_names_is_refused_with_a_way_out(make_job: MakeJob, write_table: WriteTable, name: str) -> None:
    write_table([{"prompt": "x", name: "mine"}])
    message = refusal(make_job())
    assert f"already has {name}," in message
    assert "output.prefix" in message


def test_a_prefix_resolves_a_clash_of_names(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table([{"prompt": "x", "completion": "mine", "error": "also mine"}])
    assert quiet(make_job(output={"prefix": "tm_"})).state == "complete"
    (row,) = read_output(tmp_path / "out").to_pylist()
    assert (row["completion"], row["error"], row["tm_error"], row["tm_completion_tokens"] > 0) == ("mine", "also mine", None, True)
    assert verify(str(tmp_path / "out")).complete


def test_a_prefix_that_clashes_itself_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table([{"prompt": "x", "completion": "mine", "tm_completion": "also mine"}])
    assert "already has tm_completion," in refusal(make_job(output={"prefix": "tm_"}))


# The model.


def test_a_model_folder_that_is_not_there_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    message = refusal(make_job(model=str(tmp_path / "no-model")))
    assert message.startswith(f"model: there is no folder {tmp_path / 'no-model'}")


def test_a_model_that_is_not_llama_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    model = build_tiny_model(tmp_path / "qwen", architecture="Qwen2ForCausalLM")
    message = refusal(make_job(model=str(model)))
    assert message.startswith(f"model: {model} is Qwen2ForCausalLM")
    assert "LlamaForCausalLM" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_without_one_of_its_files_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, name: str) -> None:
    write_table(questions())
    model = build_tiny_model(tmp_path / "model")
    (model / name).unlink()
    message = refusal(make_job(model=str(model)))
    assert message.startswith("model: ")
    assert str(model) in message
    assert name.removeprefix("model") in message


def test_a_model_with_one_shard_missing_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    model = build_tiny_model(tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002.safetensors" in refusal(make_job(model=str(model)))


@pytest.mark.parametrize(
    "key", ["architectures", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings", "num_hidden_layers"]
)
def test_a_model_configuration_without_a_needed_key_is_refused(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, key: str
) -> None:
    write_table(questions())
    model = build_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for gone in {key, "head_dim"}:
        del config[gone]
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(make_job(model=str(model)))
    assert message.startswith("model: ")
    assert key in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_a_model_file_that_is_not_json_is_refused_by_name(make_job: MakeJob, write_table: WriteTable, tmp_path: Path, name: str) -> None:
    write_table(questions())
    model = build_tiny_model(tmp_path / "model", template=False)
    (model / name).write_text("{broken")
    message = refusal(make_job(model=str(model)))
    assert message.startswith("model: ")
    assert name in message


@pytest.mark.parametrize("section", [{"system": "Be brief."}, {"chat": True}, {"prompt": {"messages": "chat"}}, {"prompt": "turns"}])
def test_chat_without_a_chat_template_is_refused(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, section: dict[str, Any]
) -> None:
    turns = [{"role": "user", "content": "hello"}]
    write_table([{"prompt": "x", "chat": json.dumps(turns), "turns": turns}])
    model = build_tiny_model(tmp_path / "plain", template=False)
    message = refusal(make_job(model=str(model), input=section))
    assert message.startswith("input.prompt: ")
    assert str(model) in message
    assert "no chat template" in message


def test_text_without_a_chat_template_is_fine(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    result = quiet(make_job(model=str(build_tiny_model(tmp_path / "plain", template=False))))
    assert (result.state, result.totals.error_rows) == ("complete", 0)


# The output.


def test_an_output_that_is_a_file_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    (tmp_path / "out").write_text("a file")
    assert refusal(make_job()) == f"output.uri: {tmp_path / 'out'} is a file; give a folder"
    assert (tmp_path / "out").read_text() == "a file"


def test_an_output_below_a_file_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    (tmp_path / "notes").write_text("a file")
    message = refusal(make_job(output={"uri": str(tmp_path / "notes" / "out")}))
    assert message.startswith("output.uri: ")
    assert str(tmp_path / "notes") in message


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which even root cannot write: /proc")
def test_an_output_that_takes_no_writes_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions())
    with pytest.raises(JobError, match=r"output\.uri: cannot write to /proc/tokenmill: "):
        quiet(make_job(output={"uri": "/proc/tokenmill"}))


def test_an_output_on_a_store_without_create_once_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions())
    with pytest.raises(JobError, match=r"http"):
        quiet(make_job(output={"uri": "http://127.0.0.1:9/out"}))


def test_an_output_begun_by_another_job_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions())
    quiet(make_job())
    message = refusal(make_job(input={"prompt": "Other: {prompt}"}))
    assert message.startswith("output.uri: ")
    assert "was begun by another job" in message


def test_an_output_with_parts_of_another_job_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    quiet(make_job())
    shutil.rmtree(tmp_path / "out" / layout.FOLDER)
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    message = refusal(make_job(sampling={"max_tokens": 9}))
    assert message.startswith("output.uri: ")
    assert part.name in message


def test_an_output_with_foreign_parquet_files_is_refused(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions())
    write_table(questions(), "out/sales.parquet")
    message = refusal(make_job())
    assert message.startswith("output.uri: ")
    assert "sales.parquet" in message


def test_other_files_in_the_output_are_no_reason_to_refuse(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.txt").write_text("what this folder is for")
    assert quiet(make_job()).state == "complete"
    assert verify(str(tmp_path / "out")).complete


@pytest.mark.parametrize("name", [layout.JOB, layout.PLAN])
@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\x00\xff damaged"])
def test_an_output_whose_records_are_damaged_is_refused(
    make_job: MakeJob, write_table: WriteTable, tmp_path: Path, name: str, damage: bytes
) -> None:
    write_table(questions())
    quiet(make_job())
    (tmp_path / "out" / name).write_bytes(damage)
    message = refusal(make_job())
    assert message.startswith("output.uri: ")
    assert name in message


def test_an_input_inside_the_output_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    path = write_table(questions(), "out/in/prompts.parquet")
    message = refusal(make_job(input={"uri": str(path)}))
    assert message.startswith(f"output.uri: the input {path} lies inside the output {tmp_path / 'out'}")


def test_an_output_inside_the_input_folder_is_refused(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """Whoever reads the folder next would take the completions for prompts."""
    write_table(questions(), "in/prompts.parquet")
    message = refusal(make_job(input={"uri": str(tmp_path / "in")}, output={"uri": str(tmp_path / "in" / "completions")}))
    assert message.startswith("output.uri: ")
    assert str(tmp_path / "in" / "completions") in message


def test_an_output_beside_a_globbed_input_is_fine(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(), "in/prompts.parquet")
    job = make_job(output={"uri": str(tmp_path / "in" / "completions")})
    assert quiet(job).state == "complete"
    assert quiet(job).new_objects == ()


# What a plan says, and that it leaves no trace.


def test_plan_writes_nothing(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    plan(make_job())
    assert not (tmp_path / "out").exists()


def test_plan_says_what_a_run_would_do(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions(40), "in/a.parquet")
    write_table(pa.Table.from_pylist(questions()).slice(0, 0), "in/b.parquet")
    report = plan(make_job())
    accepted = report.accepted
    assert (accepted.plan.num_rows, len(accepted.todo), accepted.done, accepted.begun) == (40, 3, {}, False)
    assert [reason for _, reason in accepted.plan.skipped] == ["it has no rows"]
    assert (report.replicas, report.profile) == (1, "simulated")


def test_plan_of_a_finished_job_has_nothing_to_do(make_job: MakeJob, write_table: WriteTable) -> None:
    write_table(questions(40))
    quiet(make_job())
    accepted = plan(make_job()).accepted
    assert (len(accepted.done), accepted.todo, accepted.begun) == (3, [], True)


def test_the_same_files_named_twice_are_read_once(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    path = write_table(questions())
    job = make_job(input={"uri": [str(path), str(tmp_path / "in"), str(tmp_path / "in" / "*.parquet")]})
    assert plan(job).accepted.plan.num_rows == 4


def test_hidden_files_are_no_input(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions(), "in/a.parquet")
    write_table(questions(), "in/.hidden.parquet")
    write_table(questions(), "in/_metadata.parquet")
    assert plan(make_job()).accepted.plan.num_rows == 4
    assert plan(make_job(input={"uri": str(tmp_path / "in")})).accepted.plan.num_rows == 4


def test_the_fingerprint_does_not_depend_on_how_the_job_is_run(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    write_table(questions())
    one = plan(make_job()).accepted.record.fingerprint
    other = plan(
        make_job(
            name="another",
            cluster={"kind": "local", "replicas": 2},
            limits={"attempts": 1},
            output={"uri": str(tmp_path / "elsewhere"), "compression": "snappy"},
            engine={"options": {"max_num_seqs": 4}},
        )
    )
    assert other.accepted.record.fingerprint == one


def test_a_job_that_is_accepted_does_write(make_job: MakeJob, write_table: WriteTable, tmp_path: Path) -> None:
    """The control of `refusal`, which looks for files."""
    write_table(_PLAIN)
    quiet(make_job())
    assert {layout.JOB, layout.PLAN, layout.MANIFEST, layout.STATUS, layout.SUCCESS} < set(files_in(tmp_path / "out"))
