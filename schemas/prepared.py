"""Prepared: what tokenmill.json in a prepared checkpoint says of where it comes from and how it was judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.sampling import Frozen

PREPARED_FILE = "tokenmill.json"

Precision = Literal["int8", "fp8", "nvfp4"]


class Bar(Frozen):
    """What a prepared checkpoint must reach, against the one it comes from."""

    max_perplexity_ratio: float = Field(default=1.02, ge=1)
    """Of the references given the prompts."""
    min_rouge_ratio: float = Field(default=0.99, ge=0, le=1)
    """Of greedy completions against the references; counted beyond its error."""


class Rouge(Frozen):
    """One kind of ROUGE, mean over the rows, in percent."""

    before: float
    after: float
    ratio: float
    error: float
    """How far chance alone moves the ratio: half the width of its 95 % interval, by paired bootstrap over the rows."""


class Verdict(Frozen):
    """The gate's answer."""

    rows: int
    bar: Bar
    lowered: bool
    """Whether the bar was lower than the usual one."""
    perplexity_before: float
    perplexity_after: float
    perplexity_ratio: float
    rouge: dict[str, Rouge]
    refusals: tuple[str, ...]
    """Why not; empty where it passed."""
    engine: str = ""
    dtype: str = ""
    """That both were computed in, where weights do not say otherwise."""
    baseline: str = ""
    """Engine and dtype of the unquantised model where another node had asked it (--baseline)."""

    @property
    def passed(self) -> bool:
        return not self.refusals


class Baseline(Frozen):
    """What an unquantised model made of the rows that judge, for a node that does not hold it."""

    source: dict[str, str]
    """Its digests, as in Prepared."""
    rows: str
    """Digest of what it was shown."""
    max_tokens: int
    logprobs: tuple[float, ...]
    """Of each reference."""
    completions: tuple[tuple[int, ...], ...]
    """Greedy, token ids."""
    dtype: str
    kv_cache_dtype: str = ""
    """Of keys and values; empty where an earlier version, which took the profile's, did not say."""
    engine: str


class Prepared(Frozen):
    """The provenance of a prepared checkpoint."""

    digest: str
    """Of source, recipe and rows; a part of the folder's name."""
    source: dict[str, str]
    """Digests of weights, tokenizer and chat template of the checkpoint it comes from."""
    precision: Precision
    smoothing: float | None
    output_layer: bool
    calibration_rows: int
    versions: dict[str, str]
    gate: Verdict | None
    """None where the gate was left out on request."""
