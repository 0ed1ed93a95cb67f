"""A model's name in, a checked local Llama checkpoint out, with digests and sizes. Loads no weights, imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline import storage
from pipeline.demo_model import demo_model
from schemas.errors import JobError
from schemas.job import DEMO_MODEL

_ARCHITECTURES = ("LlamaForCausalLM",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A Llama checkpoint on this machine."""

    path: str
    weights_digest: str
    tokenizer_digest: str
    template_digest: str
    """Of the chat template; empty where the tokenizer has none."""
    weights_bytes: int
    max_position_embeddings: int
    vocab_size: int
    kv_values_per_token: int
    """Numbers that one token adds to the KV cache, over all layers."""

    @property
    def digests(self) -> dict[str, str]:
        """Of what decides a job's output, by the names that a job's record has for them."""
        return {"weights": self.weights_digest, "tokenizer": self.tokenizer_digest, "chat_template": self.template_digest}

    @property
    def has_chat_template(self) -> bool:
        return bool(self.template_digest)


def cache_folder() -> Path:
    """Where converted and downloaded models and digests are kept: $TOKENMILL_CACHE, or ~/.cache/tokenmill."""
    return Path(os.environ.get("TOKENMILL_CACHE") or Path.home() / ".cache" / "tokenmill")


def resolve_model(name: str) -> Model:
    """Find, fetch where it is remote, and check. Raises JobError saying what a Llama checkpoint needs and this one lacks."""
    if name == DEMO_MODEL:
        path = demo_model(cache_folder())
    elif storage.scheme_of(name) in ("file", "local"):
        path = Path(storage.absolute(name))
    else:
        path = _fetch(name)
    return _check(path, name)


def _check(path: Path, name: str) -> Model:
    if not path.is_dir():
        raise JobError(f"model: there is no folder {path}; give a folder with a Llama checkpoint, its URI, or {DEMO_MODEL!r}")
    config = _read_json(path / "config.json", name)
    found = config.get("architectures") or ["none named"]
    if found[0] not in _ARCHITECTURES:
        raise JobError(
            f"model: {name} is {found[0]} (config.json, architectures); only Llama-family models run here: {', '.join(_ARCHITECTURES)}"
        )
    if not (path / "tokenizer.json").is_file():
        raise JobError(f"model: {name} has no tokenizer.json; save it from a fast tokenizer with save_pretrained")
    weights = _weight_files(path, name)
    missing = [key for key in _CONFIG_SIZES if not isinstance(config.get(key), int)]
    if missing:
        raise JobError(f"model: config.json of {name} lacks {', '.join(missing)}, or has no number there; copy the checkpoint whole")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return Model(
        path=str(path),
        weights_digest=_digest([path / "config.json", path / "generation_config.json", *weights]),
        tokenizer_digest=_digest([path / file for file in _TOKENIZER_FILES]),
        template_digest=_template_digest(path, name),
        weights_bytes=sum(file.stat().st_size for file in weights),
        max_position_embeddings=int(config["max_position_embeddings"]),
        vocab_size=int(config["vocab_size"]),
        kv_values_per_token=2 * int(config["num_hidden_layers"]) * kv_heads * head_dim,
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise JobError(f"model: {name} has no {path.name}; a checkpoint as saved by transformers' save_pretrained has one") from None
    except ValueError as error:
        raise JobError(f"model: {path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise JobError(f"model: {path} holds {type(data).__name__}, expected an object")
    return data


def _weight_files(path: Path, name: str) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index, name).get("weight_map")
        if not isinstance(weight_map, dict):
            raise JobError(f"model: {index} has no weight_map; copy the checkpoint whole")
        files = [path / file for file in _plain_names(weight_map, index)]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise JobError(f"model: {name} lacks {', '.join(missing) or 'its *.safetensors weights'}; copy the checkpoint whole")
    return files


def _plain_names(weight_map: dict[str, Any], index: Path) -> list[str]:
    """The checkpoint's own files alone: a path would have any file of this machine read, and its digest told."""
    for file in weight_map.values():
        if not isinstance(file, str) or file in ("", ".", "..") or {"/", "\\", "\0"} & set(file):
            raise JobError(f"model: weight_map in {index} names {str(file)[:80]!r}, expected a plain name of a file beside it")
    return sorted(set(weight_map.values()))


def _template_digest(path: Path, name: str) -> str:
    """The template lies in its own file, or in tokenizer_config.json."""
    if (path / _TEMPLATE_FILE).is_file():
        return _digest([path / _TEMPLATE_FILE])
    config = path / "tokenizer_config.json"
    template = _read_json(config, name).get("chat_template") if config.is_file() else None
    return hashlib.sha256(json.dumps(template).encode()).hexdigest() if template else ""


def _digest(files: list[Path]) -> str:
    """SHA-256 over the files' own digests; a file's is remembered by path, size and mtime, since weights are large."""
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            total.update(f"{file.name}:{_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(file: Path) -> str:
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    remembered = cache_folder() / "digests" / key
    try:
        return remembered.read_text()
    except OSError:
        pass
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    with contextlib.suppress(OSError):  # a read-only or full cache costs time, not correctness
        storage.replace(str(remembered), digest.hexdigest().encode())
    return digest.hexdigest()


def _fetch(uri: str) -> Path:
    """Copy a remote checkpoint into the cache, once per version of its files; one process at a time."""
    names = storage.list_names(uri)
    if not names:
        raise JobError(f"model: there is nothing at {uri}")
    versions = {name: storage.info(storage.join(uri, name)).version for name in sorted(names)}
    key = hashlib.sha256(json.dumps([uri, versions]).encode()).hexdigest()[:24]
    target = cache_folder() / "models" / key
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            return target
        partial = target.with_name(f".{key}-{uuid.uuid4().hex}")
        partial.mkdir()
        for name in versions:
            with storage.open_read(storage.join(uri, name)) as source, (partial / name).open("wb") as copy:
                while block := source.read(_BLOCK_BYTES):
                    copy.write(block)
        partial.rename(target)
    return target
