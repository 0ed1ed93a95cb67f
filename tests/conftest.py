"""Real small parts that tests share: a tiny Llama with random weights, small tables, jobs on the simulated engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck
from hypothesis import settings
from safetensors.numpy import save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

from pipeline import storage
from schemas.job import JobSpec
from schemas.job import parse_job
from tests.azurite import azurite as azurite
from tests.azurite import container as container

settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")  # a busy machine pauses for longer than any deadline

TINY_MAX_LEN = 512
_SPECIALS = ["<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"]
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tiny_model(folder: Path, *, template: bool = True, architecture: str = "LlamaForCausalLM") -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer: one token per ASCII character, BOS on plain text."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*_SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(_TEMPLATE)
    hidden, heads, kv_heads, head_dim, inner, layers, size = 64, 2, 1, 32, 96, 2, 320
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": [architecture], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
                "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "num_hidden_layers": layers,
                "vocab_size": size, "max_position_embeddings": TINY_MAX_LEN, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
            }
        )
    )  # fmt: skip
    rng = np.random.default_rng(7)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": weight(size, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": weight(size, hidden),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        weights[name + "self_attn.q_proj.weight"] = weight(heads * head_dim, hidden)
        weights[name + "self_attn.k_proj.weight"] = weight(kv_heads * head_dim, hidden)
        weights[name + "self_attn.v_proj.weight"] = weight(kv_heads * head_dim, hidden)
        weights[name + "self_attn.o_proj.weight"] = weight(hidden, heads * head_dim)
        weights[name + "mlp.gate_proj.weight"] = weight(inner, hidden)
        weights[name + "mlp.up_proj.weight"] = weight(inner, hidden)
        weights[name + "mlp.down_proj.weight"] = weight(hidden, inner)
        weights[name + "input_layernorm.weight"] = np.ones(hidden, np.float32)
        weights[name + "post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Digests of throw-away models do not belong into the user's cache."""
    os.environ["TOKENMILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_recipe() -> Iterator[None]:
    """How a test's jobs reached storage is a matter of this whole process, and of those that later tests start."""
    yield
    storage.use(None)
    storage.commit_as("put_if_absent")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See build_tiny_model."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, or a pyarrow table, as Parquet under tmp_path; returns the path."""

    def write(rows: list[dict[str, Any]] | pa.Table, name: str = "in/prompts.parquet", **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        pq.write_table(table, path, **options)
        return path

    return write


def job_data(model: Path, folder: Path) -> dict[str, Any]:
    """A job on the simulated engine, inline, over folder/in to folder/out."""
    return {
        "model": str(model),
        "input": {"uri": str(folder / "in" / "*.parquet"), "prompt": "prompt"},
        "output": {"uri": str(folder / "out")},
        "sampling": {"max_tokens": 8},
        "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7}},
        "cluster": {"kind": "inline"},
    }


@pytest.fixture
def make_job(tiny_model: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    """A job on the simulated engine, inline, over tmp_path/in to tmp_path/out; sections given as keyword arguments are merged in."""

    def make(**sections: Any) -> JobSpec:
        data = job_data(tiny_model, tmp_path)
        for key, value in sections.items():
            data[key] = {**data[key], **value} if isinstance(value, dict) and isinstance(data.get(key), dict) else value
        return parse_job(data)

    return make


def read_output(folder: Path | str) -> pa.Table:
    """All parts in name order, as one table."""
    paths = sorted(Path(folder).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths])
