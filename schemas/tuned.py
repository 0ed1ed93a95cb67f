"""Tuned: the engine settings that trials found quickest for one model on one kind of node. Lies in the user's cache."""

from __future__ import annotations

import json

from pydantic import Field
from pydantic import ValidationError

from schemas.errors import JobError
from schemas.errors import describe_validation
from schemas.profile import Profile
from schemas.sampling import Frozen


class Sooner(Frozen):
    """Settings that generate more slowly and are up sooner, for small jobs."""

    profile: Profile
    below_tokens: int = Field(ge=0)
    """Output tokens below which they are done first, their start included."""


class Tuned(Frozen):
    """A profile with where it comes from."""

    weights: str
    """Digest of the model that it is for."""
    node: str
    """Kind of node that it is for."""
    engine: str
    """Package and version of the engine that it was found with; no other takes it."""
    profile: Profile
    sooner: tuple[Sooner, ...] = ()
    """For small jobs, those for the smallest first."""
    made_at: str
    rows: int = Field(ge=1)
    """Rows of the table that every trial ran."""
    output_tokens_per_s: float = Field(gt=0)
    defaults_tokens_per_s: float | None = None
    """Of the engine's own defaults on the same rows; None where they did not come up."""
    trials: int = Field(ge=1)
    quicker_model: str | None = None
    """Folder of a checkpoint of the same model in another precision that was quicker still. Nobody takes it by itself."""

    @property
    def times_defaults(self) -> float | None:
        return self.output_tokens_per_s / self.defaults_tokens_per_s if self.defaults_tokens_per_s else None

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Tuned:
        """Raises JobError saying where it lies."""
        try:
            return cls.model_validate_json(_of_now(data))
        except ValidationError as error:
            raise JobError(f"{where}: {describe_validation(error)}; remove it, or run `tokenmill tune` again") from None


def _of_now(data: bytes) -> bytes:
    """An earlier version knew one profile for small jobs, under two names of its own."""
    try:
        values = json.loads(data)
        quick, tokens = values.pop("quick"), values.pop("quick_below_tokens")
    except (ValueError, KeyError, AttributeError, TypeError):
        return data
    return json.dumps({**values, "sooner": [{"profile": quick, "below_tokens": tokens}] if quick else []}).encode()
