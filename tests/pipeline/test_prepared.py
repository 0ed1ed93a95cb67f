"""Prepared checkpoints that may be tried in a model's place: of this model, and through their gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.prepared import other_precisions
from pipeline.prepared import why_not
from schemas.errors import JobError
from schemas.prepared import PREPARED_FILE
from schemas.prepared import Bar
from schemas.prepared import Prepared
from schemas.prepared import Verdict

PASSED = Verdict(
    rows=8, bar=Bar(), lowered=False, perplexity_before=4.0, perplexity_after=4.01, perplexity_ratio=1.0025, rouge={}, refusals=()
)  # fmt: skip


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    return resolve_model(str(tiny_model))


def prepare(model: Model, folder: Path, *, file: bool = True, scale: float = 0.5, **values: Any) -> str:
    """A copy with other weights, and what is said of it."""
    shutil.copytree(model.path, folder)
    weights = {name: (tensor * scale).astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said: dict[str, Any] = {
        "digest": "d", "source": model.digests, "precision": "int8", "smoothing": None, "output_layer": False, "calibration_rows": 0,
        "versions": {}, "gate": PASSED, **values,
    }  # fmt: skip
    if file:
        (folder / PREPARED_FILE).write_text(Prepared(**said).model_dump_json())
    return str(folder)


def test_named_ones_come_first_then_those_in_the_cache_and_none_twice(model: Model, tmp_path: Path) -> None:
    named = prepare(model, tmp_path / "named")
    cached = prepare(model, tmp_path / "cache" / "models" / "b-int8", scale=0.25)
    prepare(model, tmp_path / "cache" / "models" / "a-same-as-named")
    found = other_precisions(model, [named])
    assert {other.path for other in found} == {str(tmp_path / "cache" / "models" / "a-same-as-named"), cached}
    assert [other.weights_digest for other in found] == [resolve_model(path).weights_digest for path in (named, cached)]


def test_what_may_not_be_tried_is_left_in_the_cache(model: Model, tmp_path: Path) -> None:
    models = tmp_path / "cache" / "models"
    prepare(model, models / "no-gate", gate=None)
    prepare(model, models / "of-another", source={**model.digests, "weights": "other"})
    (models / "half").mkdir()
    (models / "half" / PREPARED_FILE).write_text("{}")
    assert other_precisions(model, []) == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"gate": None}, "its quality gate was left out"),
        ({"gate": PASSED.model_copy(update={"refusals": ("perplexity rose",)})}, "it did not pass its quality gate: perplexity rose"),
        ({"source": {"weights": "other"}}, "it was not prepared from "),
        ({"file": False}, f"{PREPARED_FILE} is missing"),
    ],
)
def test_a_named_one_that_may_not_be_tried_is_refused_with_the_reason(
    model: Model, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    named = prepare(model, tmp_path / "named", **values)
    with pytest.raises(JobError, match=f"--prepared {named}: .*{reason}"):
        other_precisions(model, [named])


def test_another_tokenizer_is_another_model(model: Model, tmp_path: Path) -> None:
    named = Path(prepare(model, tmp_path / "named"))
    config = named / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": "left"}))
    assert (
        why_not(resolve_model(str(named)), model) == f"it was not prepared from {model.path}; run `tokenmill model prepare` on this model"
    )
