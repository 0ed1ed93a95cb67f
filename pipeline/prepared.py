"""Prepared checkpoints of a model: which lie in the cache, and whether one may be tried in the model's place. Prepares nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import ValidationError

from pipeline.model import Model
from pipeline.model import cache_folder
from pipeline.model import resolve_model
from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.prepared import PREPARED_FILE
from schemas.prepared import Prepared


def other_precisions(model: Model, named: list[str]) -> list[Model]:
    """The prepared checkpoints that are named, then those in the cache that passed their gate; none twice.

    Raises JobError where a named one is of another model, or has not passed its gate.
    """
    others = []
    for name in named:
        other = resolve_model(name)
        if (wrong := why_not(other, model)) is not None:
            raise JobError(f"--prepared {name}: {wrong}")
        others.append(other)
    for path in sorted((cache_folder() / "models").glob(f"*/{PREPARED_FILE}")):
        with contextlib.suppress(JobError):  # half of one, or of a model that does not run here: nobody asked for it
            other = resolve_model(str(path.parent))
            if why_not(other, model) is None:
                others.append(other)
    return list({other.weights_digest: other for other in others if other.weights_digest != model.weights_digest}.values())


def why_not(other: Model, model: Model) -> str | None:
    """Why a checkpoint may not stand for a model; None where it may."""
    path = Path(other.path, PREPARED_FILE)
    try:
        prepared = Prepared.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return f"{path} is missing, expected a checkpoint as `tokenmill model prepare` makes it"
    except ValidationError as error:
        return f"{path}: {describe_validation(error)}"
    if prepared.source != model.digests or {**other.digests, "weights": model.weights_digest} != model.digests:
        return f"it was not prepared from {model.path}; run `tokenmill model prepare` on this model"
    if prepared.gate is None:
        return "its quality gate was left out; run `tokenmill model prepare` with it"
    if not prepared.gate.passed:
        return f"it did not pass its quality gate: {'; '.join(prepared.gate.refusals)}"
    return None
