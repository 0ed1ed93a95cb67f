"""Models: what a Llama checkpoint needs, how it is recognised again, and how a remote one comes here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.model import Model
from pipeline.model import resolve_model
from schemas.errors import JobError


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "checkpoint")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes one out."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def refusal(name: Path | str) -> str:
    with pytest.raises(JobError) as caught:
        resolve_model(str(name))
    message = str(caught.value)
    assert message.startswith("model: ")
    return message


def test_a_whole_checkpoint_is_accepted_with_its_sizes(tiny_model: Path) -> None:
    model = resolve_model(str(tiny_model))
    assert (model.path, model.max_position_embeddings, model.vocab_size) == (str(tiny_model), 512, 320)
    assert model.weights_bytes == (tiny_model / "model.safetensors").stat().st_size
    assert model.kv_values_per_token == 2 * 2 * 1 * 32  # keys and values, layers, heads, numbers of one head
    assert model.has_chat_template


def test_a_relative_path_is_made_absolute(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model.parent)
    assert resolve_model(tiny_model.name).path == str(tiny_model)


def test_head_sizes_that_the_config_leaves_out_are_derived(checkpoint: Path) -> None:
    before = resolve_model(str(checkpoint))
    edit(checkpoint / "config.json", head_dim=None)
    assert resolve_model(str(checkpoint)).kv_values_per_token == before.kv_values_per_token
    edit(checkpoint / "config.json", num_key_value_heads=None)
    assert resolve_model(str(checkpoint)).kv_values_per_token == 2 * before.kv_values_per_token


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path / "nothing")
        == f"model: there is no folder {tmp_path}/nothing; give a folder with a Llama checkpoint, its URI, or 'demo'"
    )


def test_a_file_is_no_checkpoint(tiny_model: Path) -> None:
    assert "there is no folder" in refusal(tiny_model / "config.json")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "has no config.json; a checkpoint as saved by transformers' save_pretrained has one"),
        ("tokenizer.json", "has no tokenizer.json; save it from a fast tokenizer with save_pretrained"),
        ("model.safetensors", r"lacks its *.safetensors weights; copy the checkpoint whole"),
    ],
)
def test_a_missing_file_is_refused_by_name(checkpoint: Path, file: str, message: str) -> None:
    (checkpoint / file).unlink()
    assert refusal(checkpoint) == f"model: {checkpoint} {message}"


@pytest.mark.parametrize("text", ["{", "", "not json", "\x00"])
def test_a_broken_config_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert refusal(checkpoint).startswith(f"model: {checkpoint}/config.json is not JSON: ")


def test_a_config_that_is_no_object_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[]")
    assert refusal(checkpoint) == f"model: {checkpoint}/config.json holds list, expected an object"


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings"]
)
def test_a_config_without_a_size_is_refused_naming_it(checkpoint: Path, key: str) -> None:
    edit(checkpoint / "config.json", **{key: None})
    assert key in refusal(checkpoint)


def test_a_broken_tokenizer_config_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("architectures", "shown"),
    [
        (["MistralForCausalLM"], "MistralForCausalLM"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        ([], "none named"),
    ],
)
def test_another_architecture_is_refused_by_name(checkpoint: Path, architectures: list[str], shown: str) -> None:
    edit(checkpoint / "config.json", architectures=architectures)
    message = refusal(checkpoint)
    assert f"{checkpoint} is {shown} (config.json, architectures)" in message
    assert "LlamaForCausalLM" in message


def test_shards_are_those_of_the_index_and_a_missing_one_is_named(checkpoint: Path) -> None:
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "a.safetensors").write_bytes(data)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(checkpoint) == f"model: {checkpoint} lacks b.safetensors; copy the checkpoint whole"
    (checkpoint / "b.safetensors").write_bytes(b"1234")
    assert resolve_model(str(checkpoint)).weights_bytes == len(data) + 4


@pytest.mark.parametrize("place", ["absolute", "../secret", "sub/secret", "..", ".", "", "a\\b", 7, None, ["secret"], "a\0b"])
def test_an_index_that_names_more_than_files_beside_it_is_refused(checkpoint: Path, tmp_path: Path, cache: Path, place: Any) -> None:
    """A hostile checkpoint could have any file of this machine hashed."""
    (checkpoint / "sub").mkdir()
    for secret in (tmp_path / "secret", checkpoint / "sub" / "secret"):
        secret.write_text("not ours to read")
    named = str(tmp_path / "secret") if place == "absolute" else place
    index = {"weight_map": {"x": "model.safetensors", "y": named}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(checkpoint)
    assert "model.safetensors.index.json names" in message
    assert message.endswith("expected a plain name of a file beside it")
    assert not cache.exists()  # no digest was made


def test_an_index_without_its_map_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json" in refusal(checkpoint)


def digests(path: Path) -> tuple[str, str, str]:
    model = resolve_model(str(path))
    return model.weights_digest, model.tokenizer_digest, model.template_digest


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("model.safetensors", (True, False, False)),
        ("config.json", (True, False, False)),
        ("tokenizer.json", (False, True, False)),
        ("tokenizer_config.json", (False, True, False)),
        ("chat_template.jinja", (False, False, True)),
    ],
)
def test_a_changed_file_changes_its_digest_and_no_other(checkpoint: Path, file: str, changed: tuple[bool, bool, bool]) -> None:
    before = digests(checkpoint)
    append(checkpoint / file)
    assert tuple(old != new for old, new in zip(before, digests(checkpoint), strict=True)) == changed


def test_a_file_rewritten_at_the_same_size_changes_its_digest(checkpoint: Path) -> None:
    before, path = digests(checkpoint), checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert digests(checkpoint) != before


def test_digests_do_not_depend_on_the_place(tiny_model: Path, checkpoint: Path) -> None:
    assert digests(tiny_model) == digests(checkpoint)


def test_digests_are_the_same_with_and_without_a_memory_of_them(checkpoint: Path, cache: Path) -> None:
    first = digests(checkpoint)
    assert list((cache / "digests").iterdir())
    assert digests(checkpoint) == first
    shutil.rmtree(cache)
    assert digests(checkpoint) == first


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digests(checkpoint)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "file"))
    assert digests(checkpoint) == expected


def test_a_template_may_lie_in_the_tokenizers_config(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    assert not resolve_model(str(checkpoint)).has_chat_template
    edit(checkpoint / "tokenizer_config.json", chat_template="{{ messages }}")
    assert resolve_model(str(checkpoint)).has_chat_template


@pytest.fixture
def remote(tiny_model: Path) -> str:
    """The tiny model in memory, as on a remote store."""
    uri = f"memory://{uuid.uuid4().hex}/model"
    for path in tiny_model.iterdir():
        storage.create_once(storage.join(uri, path.name), path.read_bytes())
    return uri


def same_but_for_the_path(one: Model, other: Model) -> bool:
    return digests(Path(one.path)) == digests(Path(other.path)) and one.weights_bytes == other.weights_bytes


def test_a_remote_model_is_fetched_into_the_cache_whole(remote: str, tiny_model: Path, cache: Path) -> None:
    model = resolve_model(remote)
    folder = Path(model.path)
    assert folder.parent == cache / "models"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    assert same_but_for_the_path(model, resolve_model(str(tiny_model)))


def test_a_fetched_model_is_not_fetched_again(remote: str, cache: Path) -> None:
    folder = Path(resolve_model(remote).path)
    (folder / "mark").write_text("still the first copy")
    assert resolve_model(remote).path == str(folder)
    assert (folder / "mark").exists()


def test_a_remote_model_that_changed_is_fetched_beside_the_old(remote: str, cache: Path) -> None:
    first = resolve_model(remote)
    storage.replace(storage.join(remote, "chat_template.jinja"), b"{{ messages }}")
    second = resolve_model(remote)
    assert second.path != first.path
    assert second.template_digest != first.template_digest
    assert Path(first.path).is_dir()


def test_a_remote_model_that_is_not_there_is_refused(cache: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/nothing"
    assert refusal(uri) == f"model: there is nothing at {uri}"
    assert not (cache / "models").exists()


def test_a_broken_remote_model_is_refused_under_its_own_name(remote: str, cache: Path) -> None:
    storage.remove(storage.join(remote, "tokenizer.json"))
    assert refusal(remote) == f"model: {remote} has no tokenizer.json; save it from a fast tokenizer with save_pretrained"


def test_a_half_fetched_model_is_never_taken_for_a_whole_one(remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Callable[[str], Any] = storage.open_read
    calls = iter([False, True])

    def break_off(uri: str) -> Any:
        if next(calls, False):
            raise ConnectionResetError("gone")
        return opened(uri)

    monkeypatch.setattr(storage, "open_read", break_off)
    with pytest.raises(ConnectionResetError):
        resolve_model(remote)
    assert resolve_model(remote).weights_bytes > 0


_FETCH = """
import sys, time
from pathlib import Path
from pipeline import model, storage

here, uri, me = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class Lock(model.FileLock):
    def __enter__(self):
        (here / f"before-{me}").touch()
        return super().__enter__()

def read(uri, opened=storage.open_read):
    deadline = time.monotonic() + 60
    while len(list(here.glob("before-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # until the other process wants the model, too
    with (here / "reads").open("a") as reads:
        reads.write(uri + "\\n")
    return opened(uri)

model.FileLock, storage.open_read = Lock, read
print(model._fetch(uri))
"""
"""One of a node's workers. The store is a folder, which `_fetch` takes as any other."""


@pytest.mark.slow
def test_two_processes_of_a_node_that_want_one_model_at_once_read_the_store_once(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    words = [sys.executable, "-c", _FETCH, str(here), str(tiny_model)]
    both = [subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True) for name in ("one", "other")]
    said = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] == str(next(path for path in (cache / "models").iterdir() if path.is_dir()))
    assert sorted((here / "reads").read_text().split()) == sorted(str(path) for path in tiny_model.iterdir())
    assert sorted(path.name for path in Path(said[0]).iterdir()) == sorted(path.name for path in tiny_model.iterdir())
