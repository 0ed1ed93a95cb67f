"""How tokens are chosen: every field of vLLM's SamplingParams that makes sense offline, checked without vLLM."""

from __future__ import annotations

from typing import Annotated
from typing import Any
from typing import Self

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_STRUCTURED_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class Frozen(BaseModel):
    """Base of all specs: immutable, unknown keys refused, no silent conversion of text to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


class StructuredOutputs(Frozen):
    """Exactly one of json (a JSON Schema), regex, choice, grammar (EBNF) or json_object."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in _STRUCTURED_KINDS if getattr(self, "json_" if kind == "json" else kind) is not None]
        if len(given) != 1:
            raise ValueError(f"found {', '.join(given) or 'none'}; give exactly one of {', '.join(_STRUCTURED_KINDS)}")
        return self


class Sampling(Frozen):
    """Sampling of one job or, merged with its row's own values, of one row. Greedy by default."""

    max_tokens: int = Field(default=256, ge=1, lt=2**31)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """0 or -1: all tokens."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    stop: list[str] = []
    stop_token_ids: list[TokenId] = []
    include_stop_str_in_output: bool = False
    bad_words: list[str] = []
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Base of every row's own seed where temperature is above 0; by default it comes from the job's fingerprint."""
    n: int = Field(default=1, ge=1, le=64)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """How many alternatives to report beside each chosen token; 0 reports the chosen token alone."""
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_one_stop_string(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("stop"), str):
            return {**data, "stop": [data["stop"]]}
        return data

    @model_validator(mode="after")
    def _possible_together(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n is {self.n} with temperature 0: greedy choices are all the same; raise temperature or drop n")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would stop every completion at once")
        return self

    def merged(self, row: dict[str, Any]) -> Sampling:
        """The job's sampling with a row's own values over it; its seed is the row's alone. Raises pydantic's ValidationError."""
        return Sampling.model_validate({**self.model_dump(by_alias=True, exclude_unset=True, exclude={"seed"}), **row})
