"""QualitySpec: how bad completions may become before a run stops by itself, and by which marks they are counted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.sampling import Frozen

Flaw = Literal["errors", "truncated", "repeated", "invalid_json"]
"""What is counted: error rows; rows cut off at max_tokens; rows that say the same again and again; rows that are no JSON."""


class QualitySpec(Frozen):
    """Shares of rows, from 0 to 1; those not given are not judged. Rows of one run count, from `after_rows` on and at a canary's end."""

    errors: float | None = Field(default=None, ge=0, le=1)
    truncated: float | None = Field(default=None, ge=0, le=1)
    repeated: float | None = Field(default=None, ge=0, le=1)
    """Completions of 200 characters and more whose end compresses to under an eighth."""
    invalid_json: float | None = Field(default=None, ge=0, le=1)
    after_rows: int = Field(default=100, ge=1)

    @property
    def judged(self) -> dict[Flaw, float]:
        """The shares that are given."""
        shares: dict[Flaw, float | None] = {
            "errors": self.errors,
            "truncated": self.truncated,
            "repeated": self.repeated,
            "invalid_json": self.invalid_json,
        }
        return {flaw: share for flaw, share in shares.items() if share is not None}
