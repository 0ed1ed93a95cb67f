"""`tokenmill model prepare` on a tiny Llama: stored once, judged by the real engine, refused where it must be."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from jobs.cli import main
from jobs.cli.model import describe
from jobs.prepare import Order
from jobs.prepare import _check_room
from jobs.prepare import _upload
from jobs.prepare import choose_precision
from jobs.prepare import prepare
from pipeline import storage
from pipeline.hardware import find_profile
from pipeline.model import resolve_model
from pipeline.prepare import recipe_for
from pipeline.profile import Machine
from pipeline.render import load_tokenizer
from schemas.errors import ForeignOutput
from schemas.errors import JobError
from schemas.prepared import PREPARED_FILE
from schemas.prepared import Bar
from schemas.prepared import Prepared
from tests.commands import Command

CPU = Machine(cores=2, memory_bytes=8 << 30)
GPU = Machine(cores=8, memory_bytes=64 << 30, num_gpus=1)


def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.fixture
def order(tiny_model: Path, write_table: Callable[..., Path], tmp_path: Path) -> Order:
    table = write_table([{"prompt": f"what is {row} and {row}", "answer": f"it is {2 * row}"} for row in range(24)])
    return Order(
        model=str(tiny_model),
        table=str(table),
        prompt="prompt",
        reference="answer",
        precision="int8",
        output=str(tmp_path / "models"),
        max_tokens=8,
        gate=False,
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))


@pytest.mark.parametrize(
    ("profile", "machine", "gpus", "expected"),
    [
        ("local-cpu", CPU, [], "int8"),
        ("nd96amsr-a100-v4", GPU, [], "int8"),
        ("nd96asr-v4", GPU, [], "int8"),
        ("nd96isr-h100-v5", GPU, [], "fp8"),
        ("nd96isr-mi300x-v5", GPU, [], "fp8"),
        ("nd128isr-gb300-v6", GPU, [], "nvfp4"),
        ("local-gpu", GPU, ["Model: NVIDIA A100-SXM4-80GB"], "int8"),
        ("local-gpu", GPU, ["Model: NVIDIA H100 80GB HBM3"], "fp8"),
        ("local-gpu", GPU, ["Model: NVIDIA H200"], "fp8"),
        ("local-gpu", GPU, [], "fp8"),  # AMD's are not listed there
        ("local-gpu", GPU, ["Model: NVIDIA GB200"], "nvfp4"),
        ("local-gpu", GPU, ["Model: NVIDIA B300 SXM6"], "nvfp4"),
    ],
)
def test_auto_is_what_the_machine_computes_fastest_in(profile: str, machine: Machine, gpus: list[str], expected: str) -> None:
    assert choose_precision("auto", find_profile(profile), machine, gpus) == expected


def test_what_is_asked_for_wins() -> None:
    assert choose_precision("nvfp4", find_profile("local-cpu"), CPU, []) == "nvfp4"


def test_an_unknown_precision_is_refused_with_those_there_are() -> None:
    with pytest.raises(JobError, match="--precision: found 'int3'; allowed are auto, int8, fp8, nvfp4"):
        choose_precision("int3", find_profile("local-cpu"), CPU, [])


def test_a_model_that_memory_cannot_hold_is_refused(tiny_model: Path) -> None:
    model = replace(resolve_model(str(tiny_model)), weights_bytes=140 << 30)
    with pytest.raises(JobError, match=r"preparing 150.3 GB of weights in int8 takes about 211.5 GB of memory, this machine has 8.6 GB"):
        _check_room(model, recipe_for("int8"), CPU)


def test_a_model_that_is_quantised_already_is_refused(order: Order, tiny_model: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_model, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(JobError, match=r"is quantised already \(config.json, quantization_config: gptq\)"):
        prepare(replace(order, model=str(quantised)), quiet)


def test_what_no_engine_here_computes_is_not_judged_in_secret(order: Order) -> None:
    with pytest.raises(JobError, match=r"no engine on this machine computes in it.*--no-gate"):
        prepare(replace(order, precision="nvfp4", gate=True), quiet)


@pytest.fixture
def stored() -> Iterator[str]:
    """A folder in memory."""
    uri = f"memory://prepared-{uuid.uuid4().hex}"
    yield uri
    for name in storage.list_names(uri):
        storage.remove(storage.join(uri, name))


def test_config_comes_last_so_that_half_a_checkpoint_resolves_nowhere(tiny_model: Path, stored: str) -> None:
    lines: list[str] = []
    _upload(tiny_model, stored, lines.append)
    assert lines[-1].startswith(f"stored {stored}/config.json")
    assert storage.list_names(stored) == {file.name: file.stat().st_size for file in tiny_model.iterdir()}
    assert resolve_model(stored).digests == resolve_model(str(tiny_model)).digests


def test_another_node_finds_on_the_store_what_one_has_made(
    order: Order, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "one"))
    made = prepare(replace(order, output=stored), quiet)
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "another"))
    lines: list[str] = []
    found = prepare(replace(order, output=stored), lines.append)
    assert (made.existed, found.existed, lines) == (False, True, [])
    assert replace(found, existed=False) == made
    assert found.uri is not None
    with pytest.raises(JobError, match=r"is there, but does not reach this bar: it was made without the gate"):
        prepare(replace(order, output=stored, gate=True), quiet)
    storage.remove(storage.join(found.uri, "tokenmill.json"))
    with pytest.raises(ForeignOutput, match=r"is no prepared checkpoint \(tokenmill\.json: FileNotFoundError\)"):
        prepare(replace(order, output=stored), quiet)


def test_what_was_stored_is_left_as_it_is_and_what_differs_is_refused(tiny_model: Path, stored: str) -> None:
    storage.create_once(storage.join(stored, "config.json"), (tiny_model / "config.json").read_bytes())
    lines: list[str] = []
    _upload(tiny_model, stored, lines.append)
    assert not any("config.json (" in line and line.startswith(f"stored {stored}/config") for line in lines)
    storage.replace(storage.join(stored, "tokenizer.json"), b"another")
    with pytest.raises(ForeignOutput, match=r"tokenizer\.json is there with another content"):
        _upload(tiny_model, stored, quiet)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int3"], "tokenmill: --precision: found 'int3'"),
        (["--reference", "gold"], "tokenmill: --reference: the table has no column 'gold'"),
        (["--rows", "30"], "tokenmill: --rows 30: the table has 24 usable rows"),
    ],
)
def test_the_command_refuses_a_wrong_order_with_exit_code_two(order: Order, arguments: list[str], message: str) -> None:
    usual = ["--table", str(order.table), "--prompt", "prompt", "--reference", "answer", "--no-gate"]
    done = CliRunner().invoke(main, ["model", "prepare", order.model, *usual, *arguments])
    assert (done.exit_code, done.stderr.startswith(message)) == (2, True), done.stderr


@pytest.mark.engine  # torch, in processes of its own
@pytest.mark.long
@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4"])
def test_a_checkpoint_is_stored_once_with_its_provenance(order: Order, precision: str) -> None:
    lines: list[str] = []
    asked = replace(order, precision=precision)
    first = prepare(asked, lines.append)
    assert first.uri is not None
    folder = Path(first.uri)
    assert visible(folder.parent) == [folder.name]
    found = Prepared.model_validate_json((folder / PREPARED_FILE).read_bytes())
    assert found == first.prepared
    assert folder.name.endswith(f"-{precision}-{found.digest[:12]}")
    assert (found.source, found.gate) == (resolve_model(order.model).digests, None)
    model = resolve_model(first.uri)
    assert (model.tokenizer_digest, model.template_digest) == (found.source["tokenizer"], found.source["chat_template"])
    again = prepare(asked, lines.append)
    assert (again.uri, again.existed, again.prepared) == (first.uri, True, found)
    assert sum("writing the checkpoint" in line for line in lines) == 1
    if precision == "int8":  # the others are refused before anything is looked for: no engine here could judge them
        with pytest.raises(JobError, match="was made without the gate"):
            prepare(replace(asked, gate=True), quiet)


@pytest.mark.engine
@pytest.mark.long
def test_a_folder_of_that_name_that_is_none_of_ours_is_not_touched(order: Order) -> None:
    made = prepare(order, quiet)
    folder = Path(made.uri or "")
    (folder / PREPARED_FILE).write_text("{}")
    with pytest.raises(ForeignOutput, match="is no prepared checkpoint"):
        prepare(order, quiet)
    assert (folder / PREPARED_FILE).read_text() == "{}"


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_gate_asks_the_real_engine(order: Order) -> None:
    """Random weights: every token is about as likely as any other, before and after."""
    lines: list[str] = []
    made = prepare(replace(order, gate=True, bar=Bar(max_perplexity_ratio=1.1, min_rouge_ratio=0)), lines.append)
    gate = made.prepared.gate
    assert made.uri is not None
    assert gate is not None
    assert (gate.rows, gate.lowered, gate.passed) == (18, True, True)
    assert 100 < gate.perplexity_before < 2000
    assert 0.9 < gate.perplexity_ratio < 1.1
    assert gate.engine.startswith("vllm")
    assert {line.split(":")[0] for line in lines if "starting the engine" in line} == {"unquantised", "int8"}


@pytest.fixture
def brittle(tiny_model: Path, tmp_path: Path) -> Path:
    """A model that knows in which letters the answers are written, and that INT8 makes forget it.

    Its first channel is always loud, and the output layer hears the letters in it. The second is silent, and weighs so much there that
    the step of a row's eight bits is larger than all its other weights.
    """
    folder = tmp_path / "brittle"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    letters = load_tokenizer(str(folder))("it is 0123456789", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][:, 0] = 8.0
    weights["model.norm.weight"][1] = 0.0
    weights["lm_head.weight"][:, :2] = (0.0, 1000.0)
    weights["lm_head.weight"][letters, 0] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(400)
def test_what_became_worse_is_refused_and_not_stored_also_by_a_baseline_from_elsewhere(order: Order, brittle: Path, tmp_path: Path) -> None:
    usual = [str(brittle), "--table", str(order.table), "--prompt", "prompt", "--reference", "answer", "--max-tokens", "8"]
    file, models = tmp_path / "baseline.json", Path(str(order.output))
    written = CliRunner().invoke(main, ["model", "baseline", *usual, "--to", str(file)])
    assert written.exit_code == 0, written.output
    refused = CliRunner().invoke(
        main, ["model", "prepare", *usual, "--precision", "int8", "--output", str(models), "--baseline", str(file), "--json"]
    )
    assert refused.exit_code == 1, refused.output
    assert visible(models) == []
    assert not list(models.glob(".*.partial"))
    said = json.loads(refused.stdout)
    gate = said["prepared"]["gate"]
    assert (said["uri"], gate["lowered"], gate["baseline"].startswith("vllm")) == (None, False, True)
    assert gate["perplexity_before"] < 50 < 200 < gate["perplexity_after"]
    assert "perplexity of the references rose" in gate["refusals"][0]
    assert not any("unquantised" in line for line in refused.stderr.splitlines())  # nobody asked it again
    assert "refused, nothing was stored:" in describe(said)
    lowered = CliRunner().invoke(
        main,
        ["model", "prepare", *usual, "--precision", "int8", "--output", str(models), "--allow-perplexity", "100", "--allow-rouge", "0"],
    )
    assert lowered.exit_code == 0, lowered.output
    (made,) = visible(models)
    found = Prepared.model_validate_json((models / made / PREPARED_FILE).read_bytes()).gate
    assert found is not None
    assert (found.lowered, found.passed, found.baseline) == (True, True, "")


def test_a_baseline_and_no_gate_exclude_each_other(order: Order) -> None:
    usual = ["--table", str(order.table), "--prompt", "prompt", "--reference", "answer", "--no-gate", "--baseline", "b.json"]
    done = CliRunner().invoke(main, ["model", "prepare", order.model, *usual])
    assert (done.exit_code, done.stderr) == (2, "tokenmill: --baseline and --no-gate: give one of them\n")


@pytest.mark.chaos
@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_kill_leaves_nothing_that_could_be_taken_for_a_checkpoint(order: Order, tmp_path: Path) -> None:
    models = Path(str(order.output))
    arguments = ["model", "prepare", order.model, "--precision", "int8", "--table", str(order.table), "--prompt", "prompt"]
    arguments += ["--reference", "answer", "--output", str(models), "--no-gate"]
    first = Command(tmp_path / "log", *arguments)
    try:
        first.wait_for("calibrating")
        first.send(signal.SIGKILL)
    finally:
        first.kill()
    assert visible(models) == []
    second = Command(tmp_path / "log", *arguments)
    try:
        assert second.end() == 0, second.log
    finally:
        second.kill()
    (made,) = visible(models)
    assert resolve_model(str(models / made)).weights_bytes > 0
    assert not list(models.glob(".*.partial"))


@pytest.mark.chaos
def test_a_full_disk_is_said_and_leaves_nothing(order: Order, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        with pytest.raises(JobError, match="make room"):
            prepare(replace(order, output=str(small)), quiet)
        assert visible(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
