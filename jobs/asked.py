"""What an earlier output's parts were asked, as keys: their rows rendered again, with the settings of the job that made them."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Set
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.answerer import Answerer
from pipeline.commit import read_report
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.prompts import prompt_columns
from pipeline.prompts import read_prompts
from pipeline.read import open_parquet
from pipeline.render import Renderer
from pipeline.render import Text
from pipeline.render import load_tokenizer
from schemas.completions import ERROR
from schemas.completions import PROMPT_TOKENS
from schemas.errors import ForeignOutput
from schemas.manifest import META_PROVENANCE
from schemas.prompts import Prompt
from schemas.prompts import RowError
from schemas.record import JobRecord
from schemas.unit import WorkUnit

_BATCH_ROWS = 1024


class PartReader:
    """Reads what an earlier job's parts were asked. Safe from several threads."""

    def __init__(self, out_uri: str, record: JobRecord, model: Model) -> None:
        """Of an output, whose model's tokenizer and template are the same as when it was made."""
        self._out_uri, self._record, self._job = out_uri, record, record.spec
        self._tokenizer = load_tokenizer(model.path)
        self._renderers: dict[int, Renderer] = {}
        self._lock = threading.Lock()

    def read(self, unit: WorkUnit, only: Set[Text] | None = None) -> tuple[bytes, list[int]] | None:
        """Keys of the rows that are answered, and those rows' numbers; None where the part is gone or damaged.

        `only`: no other texts are tokenised, which is most of the work.
        """
        record, prefix = self._record, self._job.output.prefix
        uri = storage.join(self._out_uri, unit.part_name(record.fingerprint))
        prompts = list(dict.fromkeys(prompt_columns(self._job.input)))
        names = [*prompts, prefix + ERROR, prefix + PROMPT_TOKENS]
        keys, rows, row = [], [], 0
        try:
            report = read_report(uri)
            if (report.unit, report.fingerprint, report.rows) != (unit.index, record.fingerprint, unit.num_rows):
                return None
            with open_parquet(uri) as parquet:
                engine, others = _engines((parquet.metadata.metadata or {})[META_PROVENANCE])
                renderer, answerer = self._renderer(int(engine["max_model_len"])), Answerer(record.decides, engine)
                for group in range(parquet.num_row_groups) if _all_alike(engine, others) else ():
                    table = parquet.read_row_group(group, columns=names, use_threads=False).select(names)
                    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
                        failed, lengths = batch.column(len(prompts)).is_valid().to_pylist(), batch.column(len(prompts) + 1).to_pylist()
                        prompts_here = list(enumerate(read_prompts(batch, unit.position + row, self._job)))
                        if only is not None:
                            prompts_here = [(number, one) for number, one in prompts_here if _text(renderer, one) in only]
                        rendered = renderer.render([one for _, one in prompts_here])
                        for (number, _), item in zip(prompts_here, rendered, strict=True):
                            # A length that is not the recorded one was rendered by other rules than today's.
                            if not failed[number] and isinstance(item, Request) and len(item.token_ids) == lengths[number]:
                                keys.append(answerer.key(item))
                                rows.append(row + number)
                        row += batch.num_rows
        except (FileNotFoundError, ForeignOutput, pa.ArrowException, KeyError, ValueError):
            return None
        return b"".join(keys), rows

    def engine(self, units: Sequence[WorkUnit]) -> dict[str, Any] | None:
        """What generated the first of these parts that is whole; None where none is."""
        for unit in units:
            try:
                with open_parquet(storage.join(self._out_uri, unit.part_name(self._record.fingerprint))) as parquet:
                    return _engines((parquet.metadata.metadata or {})[META_PROVENANCE])[0]
            except (FileNotFoundError, pa.ArrowException, KeyError, ValueError):
                continue
        return None

    def _renderer(self, max_model_len: int) -> Renderer:
        with self._lock:
            if max_model_len not in self._renderers:
                seed_base = self._record.fingerprint
                self._renderers[max_model_len] = Renderer(self._tokenizer, self._job, max_model_len=max_model_len, seed_base=seed_base)
            return self._renderers[max_model_len]


def _text(renderer: Renderer, prompt: Prompt | RowError) -> Text | RowError:
    return prompt if isinstance(prompt, RowError) else renderer.text(prompt)


def _engines(provenance: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What generated a part, and what had begun it."""
    said = json.loads(provenance)
    return said["engine"], said.get("resumed_from", [])


def _all_alike(engine: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key of one is a key of the others."""
    return all(other.get(what) == engine[what] for other in others for what in ("kind", "dtype", "max_model_len"))
