"""The journal of a search for engine settings: what was measured, as it comes, so that a killed search goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from filelock import Timeout

from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.model import cache_folder
from pipeline.profile import asked_options
from pipeline.tuned import engine_package
from pipeline.tuning import Outcome
from pipeline.tuning import Setting
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.profile import Profile

_KEY_CHARACTERS = 24
_VERSION = 2
"""Of how trials are run: what another version measured is not compared with."""


@contextlib.contextmanager
def open_journal(
    job: JobSpec, model: Model, base: Profile, node: str, sample: Sequence[Request], rows: int | None, fresh: bool
) -> Iterator[Journal]:
    """The journal of just this search around a profile; one process at a time. Raises JobError where another one has it."""
    digest = hashlib.sha256()
    for request in sample:
        digest.update(json.dumps([request.position, request.token_ids, request.sampling.model_dump(mode="json", by_alias=True)]).encode())
    header = {
        "weights": model.weights_digest, "node": node, "engine": engine_package(), "sample": digest.hexdigest(), "rows": rows,
        "profile": base.model_dump(mode="json", exclude={"description", "node"}),
        "options": asked_options(job.engine),
        "replicas": job.cluster.replicas,
        "version": _VERSION,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:_KEY_CHARACTERS]
    path = cache_folder() / "tune" / f"{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise JobError(f"another `tokenmill tune` is at work on the same ({path}); wait for it") from None
    try:
        yield Journal(path, header, fresh=fresh)
    finally:
        lock.release()


class Journal:
    """A line of JSON for each thing measured."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.lengths: dict[int, int] = {}
        """Completion tokens, by position."""
        self.first_tokens: dict[int, list[int]] = {}
        """What greedy rows began with, by position."""
        self.outcomes: dict[str, Outcome] = {}
        if fresh:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if not text:
            self._append({"header": dict(header)})
        elif not text.endswith("\n"):
            with path.open("a") as file:
                file.write("\n")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the line at which a search was killed
                self._take(json.loads(line))

    def add(self, setting: Setting, outcome: Outcome) -> None:
        self.outcomes[setting.key] = outcome
        self._append({"setting": setting.key, "outcome": asdict(outcome)})

    def add_lengths(self, lengths: Mapping[int, int], first_tokens: Mapping[int, list[int]]) -> None:
        self.lengths, self.first_tokens = dict(lengths), dict(first_tokens)
        self._append({"lengths": [[row, count, first_tokens.get(row, [])] for row, count in lengths.items()]})

    def _append(self, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def _take(self, values: dict[str, Any]) -> None:
        if "lengths" in values:
            self.lengths = {row: count for row, count, _ in values["lengths"]}
            self.first_tokens = {row: tokens for row, _, tokens in values["lengths"] if tokens}
        elif "outcome" in values:
            curve = tuple((at_s, tokens) for at_s, tokens in values["outcome"].pop("curve"))
            self.outcomes[values["setting"]] = Outcome(curve=curve, **values["outcome"])
