"""The command: its help, its two ways to name a job, its exit codes, and that errors go to standard error."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from click.testing import Result

from jobs.accept import accept
from jobs.accept import store
from jobs.api import load_job
from jobs.api import run
from jobs.cli import build_job
from jobs.cli import main
from jobs.driver import Progress
from jobs.handle import attach
from jobs.progress import Speed
from jobs.status import write_status
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import json_schema
from schemas.job import parse_job
from tests.conftest import job_data

WriteTable = Callable[..., Path]
WriteJob = Callable[..., Path]

_FLAGS = (
    "name model prompt messages system chat output_uri prefix max_tokens temperature engine profile cluster replicas "
    "scheduler rendezvous keys insecure metrics_port"
)
_NO_FLAGS: dict[str, Any] = {**dict.fromkeys(_FLAGS.split()), "input_uri": (), "settings": ()}


def tokenmill(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def as_data(model: Path, folder: Path) -> dict[str, Any]:
    return {"name": "tickets", **job_data(model, folder)}


@pytest.fixture
def write_job(tiny_model: Path, tmp_path: Path) -> WriteJob:
    """Write a job file on the simulated engine, inline; fields are put over it as with --set."""

    def write(**sections: Any) -> Path:
        data = as_data(tiny_model, tmp_path)
        for key, value in sections.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.fixture
def questions(write_table: WriteTable) -> Path:
    return write_table([{"id": index, "prompt": f"question {index}"} for index in range(40)])


# Help.


def test_the_commands_are_the_ones_that_the_documents_name() -> None:
    assert {"run", "plan", "verify", "status", "cancel", "worker", "schema", "demo"} <= set(main.commands)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_with_an_example(name: str) -> None:
    done = tokenmill(name, "--help")
    assert done.exit_code == 0
    assert re.search(rf"Examples?:\n  +tokenmill {name}\b", done.stdout)
    short = tokenmill(name, "-h")
    assert (short.exit_code, short.stdout) == (0, done.stdout), (short.output, short.exception)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_option_is_explained(name: str) -> None:
    for option in main.commands[name].params:
        if option.param_type_name == "option":
            assert getattr(option, "help", None), f"{name} {option.opts[0]}"


def test_the_command_alone_lists_what_it_can_do_and_the_exit_codes() -> None:
    done = tokenmill("--help")
    assert done.exit_code == 0
    assert all(re.search(rf"^  {name}  ", done.stdout, re.MULTILINE) for name in main.commands)
    assert "0 complete" in done.stdout
    assert "130 drained" in done.stdout


def test_the_version_is_told() -> None:
    done = tokenmill("--version")
    assert (done.exit_code, bool(re.search(r"\d+\.\d+\.\d+", done.stdout))) == (0, True)


# The two ways to name a job.


def test_the_short_form_means_the_same_as_a_job_file(write_job: WriteJob, tiny_model: Path, tmp_path: Path) -> None:
    short = build_job(
        None,
        {
            **_NO_FLAGS,
            "name": "tickets",
            "model": str(tiny_model),
            "input_uri": (str(tmp_path / "in" / "*.parquet"),),
            "prompt": "prompt",
            "system": "Be brief.",
            "chat": True,
            "output_uri": str(tmp_path / "out"),
            "prefix": "tm_",
            "max_tokens": 12,
            "temperature": 0.5,
            "engine": "simulated",
            "profile": "local-cpu",
            "cluster": "local",
            "replicas": 2,
            "metrics_port": 9464,
            "settings": ("engine.options.max_num_seqs=4", "sampling.top_p=0.9", "limits.attempts=2"),
        },
    )
    long = load_job(
        write_job(
            input={"system": "Be brief.", "chat": True},
            output={"prefix": "tm_"},
            sampling={"max_tokens": 12, "temperature": 0.5, "top_p": 0.9},
            engine={"profile": "local-cpu", "options": {"max_num_seqs": 4}},
            cluster={"kind": "local", "replicas": 2, "metrics_port": 9464},
            limits={"attempts": 2},
        )
    )
    assert short == long


def test_flags_win_over_the_job_file(write_job: WriteJob) -> None:
    job = build_job(str(write_job()), {**_NO_FLAGS, "max_tokens": 99, "settings": ("sampling.max_tokens=100", "name=other")})
    assert (job.sampling.max_tokens, job.name, job.engine.kind) == (100, "other", "simulated")


def test_several_inputs_make_a_list(write_job: WriteJob) -> None:
    job = build_job(str(write_job()), {**_NO_FLAGS, "input_uri": ("a.parquet", "b.parquet")})
    assert job.input.uri == ["a.parquet", "b.parquet"]


def test_a_messages_column_takes_the_place_of_a_prompt(write_job: WriteJob) -> None:
    job = build_job(str(write_job()), {**_NO_FLAGS, "messages": "chat"})
    assert job.input.model_dump()["prompt"] == {"messages": "chat"}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sampling.stop=[a, b]", ["a", "b"]),
        ("sampling.stop=x", ["x"]),
        ("sampling.seed=7", 7),
        ("sampling.seed=", None),
        ("sampling.ignore_eos=true", True),
        ("sampling.top_p=0.5", 0.5),
        ("sampling.logit_bias={5: -1.0}", {5: -1.0}),
        ("sampling.structured_outputs.regex=a=b", "a=b"),
    ],
)
def test_set_reaches_every_field_with_a_value_in_yaml(write_job: WriteJob, setting: str, value: Any) -> None:
    found: Any = build_job(str(write_job()), {**_NO_FLAGS, "settings": (setting,)})
    for name in setting.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampling.top_p", "--set sampling.top_p: expected FIELD=VALUE"),
        ("=1", "--set =1: expected FIELD=VALUE"),
        ("sampling.stop=[a", "--set sampling.stop=[a: the value is not YAML"),
        ("name.first=x", "name.first: name is 'tickets' in the job file, expected a mapping"),
        ("sampling.tempratur=1", "sampling.tempratur: unknown key"),
        ("sampling.top_p=high", "sampling.top_p: "),
        ("nothing=1", "nothing: unknown key"),
    ],
)
def test_a_wrong_setting_is_refused(write_job: WriteJob, setting: str, message: str) -> None:
    with pytest.raises(JobError) as refused:
        build_job(str(write_job()), {**_NO_FLAGS, "settings": (setting,)})
    assert message in str(refused.value)


# What is wrong with the call or the job.


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--max-token", "5", "--nonsense"),
        ("run", "--engine", "steam", "job.yaml"),
        ("run", "--max-tokens", "many", "job.yaml"),
        ("fly",),
        ("verify",),
        ("status",),
        ("cancel", "a", "b"),
        ("worker", "--replicas", "0"),
        (),
    ],
)
def test_a_wrong_call_ends_with_2_and_says_so_on_standard_error(arguments: tuple[str, ...]) -> None:
    done = tokenmill(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage: " in done.stderr


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b", "holds list, expected a mapping with model, input and output"),
        ("", "holds NoneType, expected a mapping"),
        ("model: x\ninput: {uri: a, prompt: b}\noutput: {uri: c}\nsampilng: {}", "sampilng: unknown key"),
        ("model: x\ninput: {uri: a, prompt: b}\noutput: {uri: c}\nsampling: {temperature: warm}", "sampling.temperature: "),
        ("model: x\noutput: {uri: c}", "input: "),
        ("model: x\ninput: {uri: memory://a, prompt: b}\noutput: {uri: c}", "memory:// exists in one process only"),
        ("model: x\ninput: {uri: a, prompt: b}\noutput: {uri: c}\nschedule: daily", "schedule: "),
    ],
)
def test_a_wrong_job_file_ends_with_2_and_is_named(tmp_path: Path, command: str, content: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    done = tokenmill(command, path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tokenmill: {path}")
    assert message in done.stderr


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_job_that_cannot_be_accepted_ends_with_2(write_job: WriteJob, command: str) -> None:
    done = tokenmill(command, write_job())
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("tokenmill: input.uri: no file matches ")
    assert "Traceback" not in done.stderr


def test_a_job_file_that_is_not_there_ends_with_2(tmp_path: Path) -> None:
    done = tokenmill("run", tmp_path / "nowhere.yaml")
    assert done.exit_code == 2
    assert str(tmp_path / "nowhere.yaml") in done.stderr
    assert "No such file" in done.stderr


def test_no_job_at_all_says_how_to_give_one() -> None:
    done = tokenmill("run")
    assert done.exit_code == 2
    assert "give a job file, or --model, --input, --prompt and --output" in done.stderr


def test_prompt_and_messages_together_are_refused(write_job: WriteJob) -> None:
    done = tokenmill("run", write_job(), "--prompt", "a", "--messages", "b")
    assert (done.exit_code, done.stderr) == (2, "tokenmill: --prompt and --messages: give one of them\n")


# From plan to proof.


def test_a_job_goes_from_plan_to_run_to_proof(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = write_job()

    planned = tokenmill("plan", job, "--json")
    assert planned.exit_code == 0
    plan = json.loads(planned.stdout)
    assert {key: plan[key] for key in ("rows", "units", "units_done", "units_to_do", "objects", "rows_per_unit", "replicas")} == {
        "rows": 40,
        "units": 3,
        "units_done": 0,
        "units_to_do": 3,
        "objects": 1,
        "rows_per_unit": [8, 16],
        "replicas": 1,
    }
    assert not out.exists()

    done = tokenmill("run", job, "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert (result["state"], result["exit_code"], result["rows_done"], result["output"]) == ("complete", 0, 40, str(out))
    assert result["fingerprint"] == plan["fingerprint"]
    assert "job tickets" in done.stderr

    assert tokenmill("verify", out).exit_code == 0
    status = json.loads(tokenmill("status", out, "--json").stdout)
    assert (status["state"], status["rows_done"], status["units_done"]) == ("complete", 40, 3)
    assert json.loads(tokenmill("plan", job, "--json").stdout)["units_to_do"] == 0


def test_a_plan_can_be_read_by_people(write_job: WriteJob, questions: Path) -> None:
    done = tokenmill("plan", write_job())
    assert done.exit_code == 0
    assert re.search(r"^rows +40$", done.stdout, re.MULTILINE)
    assert re.search(r"^units to do +3$", done.stdout, re.MULTILINE)
    assert re.search(r"^columns +id, prompt$", done.stdout, re.MULTILINE)


def test_a_run_ends_with_a_summary_on_standard_output(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    done = tokenmill("run", write_job())
    assert done.exit_code == 0
    assert re.search(r"rows +40 of 40 in 3 of 3 units", done.stdout)
    assert f"tokenmill verify {tmp_path / 'out'}" in done.stdout
    assert re.search(r"^complete: 40 of 40 rows", done.stderr, re.MULTILINE)


def test_a_status_can_be_read_by_people(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    tokenmill("run", write_job())
    done = tokenmill("status", tmp_path / "out")
    assert done.exit_code == 0
    assert re.match(r"tickets \([0-9a-f]{8}\): complete\n40 of 40 rows and 3 of 3 units are committed in ", done.stdout)


def test_a_status_before_any_run_can_be_read_too(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    store(accept(load_job(write_job())))
    done = tokenmill("status", tmp_path / "out")
    assert done.exit_code == 0
    assert "0 of 40 rows and 0 of 3 units" in done.stdout


def test_a_status_names_failed_units(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    store(accept(load_job(write_job())))
    progress = Progress(
        state="failed", total_units=3, total_rows=40, done_before=0, rows_before=0, failed={2: "UnitError: no"}, began_at=1.0
    )
    write_status(str(tmp_path / "out"), progress, Speed(eta_s=90))
    done = tokenmill("status", tmp_path / "out")
    assert "unit 2 failed: UnitError: no" in done.stdout
    assert "ETA 1m30s" in done.stdout


# Watching.


def test_watching_a_finished_job_shows_it_once(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    tokenmill("run", write_job())
    done = tokenmill("status", tmp_path / "out", "--watch")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "tickets: complete; 40 of 40 (100%) in 3 of 3 units" in done.stderr
    assert f"report: {tmp_path / 'out' / layout.REPORT}" in done.stderr


@pytest.mark.slow
def test_watching_a_job_that_runs_ends_with_it(
    write_job: WriteJob, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.handle._LOOK_EVERY_S", 0.05)
    job = load_job(write_job(engine={"options": {"decode_tokens_per_s": 300.0, "max_num_seqs": 4, "lengths": "max"}}))
    store(accept(job))
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, job, stream=io.StringIO())
        done = tokenmill("status", tmp_path / "out", "--watch")
        assert result.result().state == "complete"
    assert done.exit_code == 0
    states = [match.group(1) for match in re.finditer(r"tickets: (\w+); ", done.stderr)]
    assert states[-1] == "complete"
    assert "running" in states


def test_watching_a_job_whose_driver_is_silent_ends_with_1(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    store(accept(load_job(write_job())))
    write_status(str(tmp_path / "out"), Progress(state="running", total_units=3, total_rows=40, done_before=0, rows_before=0), Speed())
    status = tmp_path / "out" / layout.STATUS
    status.write_text(json.dumps(json.loads(status.read_text()) | {"updated_at": 1000.0}))
    done = tokenmill("status", tmp_path / "out", "--watch")
    assert done.exit_code == 1
    assert "tickets: interrupted; 0 of 40" in done.stderr


def test_watching_outlasts_a_hiccup_of_the_store(
    write_job: WriteJob, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    tokenmill("run", write_job())
    job = attach(str(out))
    out.rename(away)
    assert job.wait(0.01, show=False) is job
    monkeypatch.setattr("jobs.status._HICCUP_S", 0.0)
    with pytest.raises(JobError, match="holds no job"):
        job.wait(show=False)
    away.rename(out)
    assert job.wait(show=False).status().state == "complete"


def test_units_that_fail_end_with_1_and_say_how_to_go_on(write_job: WriteJob, questions: Path) -> None:
    job = write_job(limits={"attempts": 1})
    store(accept(load_job(job)))
    questions.write_bytes(questions.read_bytes() + b"x")
    done = tokenmill("run", job)
    assert done.exit_code == 1
    assert "unit 0 failed: " in done.stdout
    assert "to go on: tokenmill " in done.stdout
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_too_many_error_rows_end_with_3(write_job: WriteJob, write_table: WriteTable) -> None:
    write_table([{"prompt": None if index else "fine"} for index in range(640)])
    done = tokenmill("run", write_job(limits={"error_rows": 3}, engine={"options": {"max_num_seqs": 2}}))
    assert done.exit_code == 3
    assert "limits.error_rows is 3" in done.stderr


def test_a_changed_job_ends_with_2_and_names_what_differs(write_job: WriteJob, questions: Path) -> None:
    assert tokenmill("run", write_job()).exit_code == 0
    done = tokenmill("run", write_job(), "--max-tokens", "9")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "sampling: this job has " in done.stderr


def test_cancel_says_that_there_is_nothing_to_cancel(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    tokenmill("run", write_job())
    done = tokenmill("cancel", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (0, "nothing to cancel: the job is complete\n")


def test_cancel_asks_a_running_job_to_drain(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    store(accept(load_job(write_job())))
    progress = Progress(state="running", total_units=3, total_rows=40, done_before=0, rows_before=0)
    write_status(str(tmp_path / "out"), progress, Speed())
    done = tokenmill("cancel", tmp_path / "out")
    assert done.exit_code == 0
    assert "asked to drain" in done.stdout
    assert (tmp_path / "out" / layout.DRAIN).exists()


@pytest.mark.parametrize("command", ["status", "cancel", "verify"])
def test_a_folder_without_a_job_ends_with_2(tmp_path: Path, command: str) -> None:
    done = tokenmill(command, tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tokenmill: {tmp_path} holds no job")


def test_the_schema_is_the_job_files() -> None:
    done = tokenmill("schema")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads(json_schema())


def test_an_output_with_brackets_in_its_name_is_summed_up(write_job: WriteJob, questions: Path, tmp_path: Path) -> None:
    done = tokenmill("run", write_job(), "--output", tmp_path / "out [/of] [old]")
    assert done.exit_code == 0, done.exception
    assert str(tmp_path / "out [/of] [old]") in done.stdout


def test_nothing_that_is_printed_repeats_a_prompt(write_job: WriteJob, write_table: WriteTable, tmp_path: Path) -> None:
    secret = "the patient's name is Example"
    chats = [
        json.dumps([{"role": "user", "content": secret}]),
        json.dumps([{"role": "tool", "content": secret}]),
        json.dumps([{"role": "user", "content": secret * 40}]),
        secret,
        json.dumps({"content": secret}),
    ]
    write_table([{"chat": chat} for chat in chats])
    job = write_job()
    done = [tokenmill("plan", job, "--messages", "chat"), tokenmill("run", job, "--messages", "chat", "--canary", "2")]
    done += [tokenmill("status", tmp_path / "out"), tokenmill("verify", tmp_path / "out")]
    assert [result.exit_code for result in done] == [0, 0, 0, 0]
    assert "error rows" in done[1].stdout
    assert "canary: 2 rows are done, in part-" in done[1].stderr
    for result in done:
        assert "patient" not in result.stdout + result.stderr
    lying = [path for path in (tmp_path / "out" / layout.FOLDER).rglob("*") if path.is_file()]
    assert lying
    assert [path.name for path in lying if b"patient" in path.read_bytes()] == []


def test_the_job_of_the_issue_is_a_job() -> None:
    job = parse_job(
        yaml.safe_load(
            """
            name: gsm8k
            model: demo
            input: {uri: "in/*.parquet", prompt: question}
            output: {uri: out/}
            sampling: {max_tokens: 128, temperature: 0}
            engine: {kind: simulated, options: {decode_tokens_per_s: 20000, prefill_tokens_per_s: 200000}}
            cluster: {kind: local}
            """
        )
    )
    assert isinstance(job, JobSpec)
    assert (job.sampling.max_tokens, job.engine.kind, job.cluster.kind) == (128, "simulated", "local")
