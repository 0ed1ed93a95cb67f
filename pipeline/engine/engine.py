"""Request, Generation and the Engine protocol: token ids in, token ids out. The engine never hears of Parquet or text columns."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from pipeline.flight import Tag
from schemas.prompts import RowError
from schemas.sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt for the engine."""

    position: int
    """The row's place in the input table; comes back in the Generation."""
    token_ids: list[int]
    sampling: Sampling
    seed: int | None = None
    """Set where temperature is above 0."""
    begun: tuple[int, ...] = ()
    """Tokens that an earlier engine had generated for this row; the answer begins with them."""
    ordered: bool = False
    """Whether it may be taken before or after its turn, and be answered with a copy of an identical row's answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedChoice:
    """One completion of a request."""

    token_ids: list[int]
    finish_reason: str
    text: str | None = None
    """Set only where the engine had to decode in order to see stop strings."""
    logprobs: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What came of one request: its choices, or an error."""

    position: int
    choices: tuple[GeneratedChoice, ...] = ()
    error: RowError | None = None
    copied: bool = False
    """Whether the choices were generated for an identical row."""
    cached_prompt_tokens: int = 0
    """Of the prompt, what the engine had in its prefix cache and did not compute again."""

    @property
    def num_tokens(self) -> int:
        """Output tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What generates here; goes into every part's provenance."""

    kind: str
    version: str
    dtype: str
    max_model_len: int
    """Prompt plus completion, in tokens."""
    max_num_seqs: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCounters:
    """Since the engine came up."""

    rows: int
    prompt_tokens: int
    completion_tokens: int
    in_flight: int


def may_go_on(sampling: Sampling) -> bool:
    """Whether a greedy choice depends on prompt and tokens so far alone, so that a row can go on elsewhere from its token ids.

    Not so with what is counted over the output alone, is seen in its text, or is reported for every token.
    """
    return (
        sampling.temperature == 0
        and sampling.n == 1
        and sampling.presence_penalty == sampling.frequency_penalty == 0
        and sampling.repetition_penalty == 1
        and not sampling.stop
        and not sampling.bad_words
        and sampling.logprobs is None
        and sampling.structured_outputs is None
    )


def as_generation(request: Request, outcome: RowError | Generation) -> Generation:
    """What came of a request that a core did not take in."""
    return outcome if isinstance(outcome, Generation) else Generation(position=request.position, error=outcome)


def generated_tokens(request: Request, generation: Generation) -> int:
    """Output tokens that this engine made for a row; those it had begun with were made by an earlier one."""
    if generation.copied:
        return 0
    return max(0, generation.num_tokens - len(request.begun))


class Engine(Protocol):
    """What a unit needs of an engine."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(
        self, requests: Iterable[Request], *, tag: Tag | None = None, alone: bool = False, wide: bool = False
    ) -> Iterator[Generation]:
        """Generations as they finish, in no order. Safe from several threads, whose requests run in one continuous batch.

        Requests are pulled as the engine has room for them, in the caller's thread. The tag names them in the flight record;
        alone, no other caller's row is in the engine with them; wide, more of them are taken in, to choose the longest from.
        Raises EngineDead; as EngineEvicted after what is finished.
        """
        ...

    def counters(self) -> EngineCounters: ...

    def close(self) -> None: ...


class Core(Protocol):
    """What drives one model: owned by a single thread, knows nothing of other threads."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def busy(self) -> bool:
        """Whether a step would do work."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that are being generated or wait for it, without those that will be copied from them."""
        ...

    def add(self, key: int, request: Request) -> RowError | Generation | None:
        """Take a request in. Or keep nothing of it, and say why it cannot be done, or its answer where that is known."""
        ...

    def abort(self, key: int) -> None:
        """Forget a request; it will not come out."""
        ...

    def begun(self, key: int) -> list[int]:
        """Token ids that a request has got so far; empty where going on from them would not be exact."""
        ...

    def tokens_inside(self) -> int:
        """Output tokens that this engine has made so far for rows that are not finished. Asked every second or so."""
        ...

    def step(self) -> list[tuple[int, Generation]]:
        """Work for a moment; the requests that finished."""
        ...

    def close(self) -> None: ...
