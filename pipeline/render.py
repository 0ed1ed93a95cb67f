"""Prompts in, Requests out: chat template, tokens, length check, seed. Knows the tokenizer, not the engine's workings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from pipeline.engine.engine import Request
from pipeline.frame import find_frame
from pipeline.prompts import Content
from pipeline.prompts import with_system
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.prompts import Message
from schemas.prompts import Prompt
from schemas.prompts import RowError

_SEED_BITS = 31
_SHORTEN_TRIES = 4

Text = tuple[str, bool]
"""What is tokenised, and whether a chat template made it."""


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """From a local checkpoint; imports no torch. Raises JobError."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise JobError(f"model: cannot load the tokenizer of {path}: {type(error).__name__}: {error}") from error


def row_seed(base: str, position: int) -> int:
    """A row's own seed: a function of job and row, so that it does not matter which worker runs it."""
    digest = hashlib.blake2b(f"{base}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


def _messages(content: Content) -> tuple[Message, ...]:
    """As a conversation."""
    return (Message(role="user", content=content),) if isinstance(content, str) else content


class Renderer:
    """Turns prompts into requests for one job and one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, job: JobSpec, *, max_model_len: int, seed_base: str) -> None:
        """Raises JobError where the job wants a chat template and the tokenizer has none."""
        self._tokenizer = tokenizer
        self._job = job
        self._max_model_len = max_model_len
        self._seed_base = seed_base if job.sampling.seed is None else str(job.sampling.seed)
        has_template = tokenizer.chat_template is not None
        if job.input.chat and not has_template:
            raise JobError(
                "input.chat: the model's tokenizer has no chat template; drop chat, or add chat_template.jinja to the checkpoint"
            )
        self._chat = has_template if job.input.chat is None else job.input.chat
        self._frame = find_frame(str(tokenizer.chat_template), self._framed) if self._chat else None

    def render(self, prompts: Iterable[Prompt | RowError]) -> list[Request | tuple[RowError, int]]:
        """One Request, or RowError with the prompt's token count (0 if unknown), for each prompt, in order."""
        prompts = list(prompts)
        texts = [p if isinstance(p, RowError) else self.text(p) for p in prompts]
        ids: dict[int, list[int]] = {}
        for templated in (True, False):  # chat templates bring their own special tokens, plain text gets the tokenizer's
            chosen = {index: item[0] for index, item in enumerate(texts) if isinstance(item, tuple) and item[1] is templated}
            ids.update(zip(chosen, self._tokenize(list(chosen.values()), special=not templated), strict=True))
        out: list[Request | tuple[RowError, int]] = []
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if isinstance(prompt, RowError):
                out.append((prompt, 0))
            elif isinstance(text, RowError):
                out.append((text, 0))
            else:
                out.append(self._request(prompt, ids[index]))
        return out

    def decode(self, token_ids: Sequence[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """Text of each completion."""
        texts: list[str] = self._tokenizer.batch_decode(token_ids, skip_special_tokens=skip_special_tokens)
        return texts

    def text(self, prompt: Prompt) -> Text | RowError:
        """What `render` tokenises, which takes most of its time."""
        if isinstance(prompt.content, str) and not self._chat:
            return prompt.content, False
        if not isinstance(prompt.content, str) and self._tokenizer.chat_template is None:
            return RowError(kind="bad_messages", message="the model's tokenizer has no chat template, which messages need")
        messages = _messages(prompt.content)
        # With a system prompt every prompt is that and a text; without one, messages are the table's own, in any number.
        if self._frame is not None and isinstance(prompt.content, str) is (self._job.input.system is None):
            return self._frame.around(messages[-1].content), True
        text = self._apply_template(messages)
        return text if isinstance(text, RowError) else (text, True)

    def _framed(self, text: str) -> str:
        """A text prompt of this job, rendered by the template itself."""
        return self._rendered(_messages(with_system(text, self._job.input)))

    def _rendered(self, messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    def _apply_template(self, messages: Sequence[Message]) -> str | RowError:
        try:
            return self._rendered(messages)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            # Templates raise on roles and orders that the model was not trained on.
            return RowError(kind="bad_messages", message=f"the model's chat template refuses the messages: {error}")

    def _tokenize(self, texts: list[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded: Any = self._tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return [self._one_bos(ids) for ids in encoded["input_ids"]]

    def _one_bos(self, ids: list[int]) -> list[int]:
        """A prompt that spells its BOS out must not get a second one."""
        bos, first = self._tokenizer.bos_token_id, 0
        while bos is not None and ids[first : first + 2] == [bos, bos]:
            first += 1
        return ids[first:]

    def _request(self, prompt: Prompt, ids: list[int]) -> Request | tuple[RowError, int]:
        limit = self._max_model_len - 1  # one token at least must be left for the completion
        policy = self._job.input.too_long
        if len(ids) > limit and policy != "error":
            # A cut prompt is cut far enough for the completion that was asked for.
            budget = max(1, self._max_model_len - prompt.sampling.max_tokens)
            ids = self._shorten(prompt, ids, budget if budget > 1 else limit, left=policy == "truncate_left")
        if not ids:
            return RowError(kind="empty_prompt", message="the prompt has no tokens"), 0
        if len(ids) > limit:
            hint = "" if policy != "error" else "; set input.too_long to truncate_left or truncate_right to cut it"
            return RowError(kind="prompt_too_long", message=f"the prompt has {len(ids)} tokens, the limit is {limit}{hint}"), len(ids)
        seed = None
        if prompt.sampling.temperature > 0:
            seed = prompt.seed if prompt.seed is not None else row_seed(self._seed_base, prompt.position)
        ordered = self._job.engine.ordering == "auto"
        return Request(position=prompt.position, token_ids=ids, sampling=prompt.sampling, seed=seed, ordered=ordered)

    def _shorten(self, prompt: Prompt, ids: list[int], budget: int, *, left: bool) -> list[int]:
        """The prompt within `budget` tokens, cut at its left or right. Of a chat, the last user message is cut, not the template."""
        if isinstance(prompt.content, str) and not self._chat:
            keep_bos = ids[:1] if left and ids[0] == self._tokenizer.bos_token_id else []
            return keep_bos + ids[len(ids) - budget + len(keep_bos) :] if left else ids[:budget]
        messages = list(_messages(prompt.content))
        users = [index for index, message in enumerate(messages) if message.role == "user"]
        for _ in range(_SHORTEN_TRIES):
            if len(ids) <= budget or not users:
                break
            content = messages[users[-1]].content
            offsets: Any = self._tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            overflow = len(ids) - budget
            if overflow >= len(offsets):
                break
            content = content[offsets[overflow - 1][1] :] if left else content[: offsets[-overflow][0]]
            messages[users[-1]] = Message(role="user", content=content)
            text = self._apply_template(messages)
            if isinstance(text, RowError):
                break  # a template that refuses what is left: the prompt stays too long
            ids = self._tokenize([text], special=False)[0]
        return ids
