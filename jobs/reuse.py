"""Earlier outputs in, the index of what they have answered out, for workers to take over instead of generating it.

Their parts hold the rows that they were asked for; rendering those again, as their jobs did, gives the requests that they answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from typing import Any

from jobs.accept import NUMERICS
from jobs.accept import Accepted
from jobs.accept import list_parts
from jobs.accept import load_job_of
from pipeline import storage
from pipeline.answered import Source
from pipeline.answered import merge
from pipeline.answered import read_index
from pipeline.answerer import KEY_BYTES
from pipeline.answerer import Answerer
from pipeline.engine.engine import Request
from schemas import layout
from schemas.errors import JobError
from schemas.record import JobRecord
from schemas.unit import WorkUnit

if TYPE_CHECKING:
    from pipeline.render import Text

_VERSION = 1
"""Of how requests are rendered and keys made: an index of another version is made anew."""
_THREADS = 4
"""The tokenizer lets other threads at Python while it works."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """An earlier output that may hold answers, as far as it is committed now."""

    out_uri: str
    record: JobRecord
    units: tuple[WorkUnit, ...]

    @property
    def rows(self) -> int:
        return sum(unit.num_rows for unit in self.units)

    @property
    def source(self) -> Source:
        return Source(uri=self.out_uri, fingerprint=self.record.fingerprint, prefix=self.record.spec.output.prefix)


def find_earlier(accepted: Accepted) -> tuple[Earlier, ...]:
    """The outputs that a job wants to reuse. Raises JobError where one holds no job, or one whose answers are none of this job's."""
    found = []
    for uri in accepted.job.reuse if accepted.todo else ():
        out_uri = storage.absolute(uri)
        if out_uri.rstrip("/") == accepted.out_uri.rstrip("/"):
            raise JobError(f"reuse: {uri} is this job's own output, and what is done there stays anyway; name earlier outputs")
        try:
            record, plan = load_job_of(out_uri)
            done, _ = list_parts(out_uri, record.fingerprint)
        except JobError as error:
            raise JobError(f"reuse: {error}") from None
        if differences := why_nothing(accepted.record, record):
            raise JobError(
                f"reuse: no answer in {out_uri} is one of this job's. What differs:\n  "
                + "\n  ".join(differences)
                + "\nDrop it from reuse."
            )
        found.append(Earlier(out_uri=out_uri, record=record, units=tuple(unit for unit in plan.units if unit.index in done)))
    return tuple(found)


def why_nothing(mine: JobRecord, theirs: JobRecord) -> list[str]:
    """What keeps every answer of an earlier job from being one of this job's, one line each."""
    pairs = [(what, mine.decides[what], theirs.decides[what]) for what in ("weights", "tokenizer", "chat_template")]
    pairs.append(("engine.kind", mine.decides["engine"]["kind"], theirs.decides["engine"]["kind"]))
    ours, others = _engine_options(mine), _engine_options(theirs)
    for name in sorted(ours.keys() | others.keys()):
        # What a profile chose is not known of every job.
        if name not in NUMERICS or (name in ours and name in others):
            pairs.append((f"engine.options.{name}", ours.get(name), others.get(name)))
    if mine.decides["prompt"]["sampling"] is None and theirs.decides["prompt"]["sampling"] is None:
        pairs += _sampling_pairs(mine, theirs)
    return [f"{what}: this job has {_short(one)}, that output {_short(other)}" for what, one, other in pairs if one != other]


def index_earlier(accepted: Accepted, earlier: Sequence[Earlier], say: Say) -> Accepted:
    """The job with an index of what was answered; made here, or found in the output, where a run that was stopped has left it."""
    useful = _useful(accepted, earlier, say)
    if not useful:
        return accepted
    began = time.monotonic()
    name = _index_name(useful)
    uri = storage.join(accepted.out_uri, name)
    index = read_index(uri)
    how = "indexed by an earlier run"
    if index is None:
        say(f"reuse: indexing {sum(one.rows for one in useful):,} committed rows of {len(useful)} earlier outputs")
        index = merge([one.source for one in useful], _keys(accepted, useful, say))
        _store(uri, index.to_parquet())
        how = f"indexed in {time.monotonic() - began:.1f} s"
    say(f"reuse: {len(index):,} requests are answered there; {how}")
    return replace(accepted, index=name)


def find_answered(accepted: Accepted, earlier: Sequence[Earlier], sampled: Sequence[tuple[Request, Text]], say: Say) -> list[bool]:
    """Whether a run would take each request's answer over, of those whose text an earlier job had too. Stores nothing."""
    useful, requests = _useful(accepted, earlier, say), [request for request, _ in sampled]
    if not useful:
        return [False] * len(sampled)
    from jobs.asked import PartReader

    wanted: list[dict[bytes, list[int]]] = []
    for one in useful:
        theirs = PartReader(one.out_uri, one.record, accepted.model).engine(one.units)
        wanted.append(_by_key(Answerer(accepted.record.decides, _engine_here(accepted, one.record, theirs)), requests) if theirs else {})
    index = read_index(storage.join(accepted.out_uri, _index_name(useful)))
    if index is not None:
        say("reuse: looking up sampled rows in the index that an earlier run has left")
        known = ([key for key, place in zip(keys, index.find([*keys]), strict=True) if place is not None] for keys in wanted)
        return _found(len(requests), zip(wanted, known, strict=True))
    say(f"reuse: looking for sampled rows among {sum(one.rows for one in useful):,} committed rows of {len(useful)} earlier outputs")
    answers = _keys(accepted, useful, say, only=frozenset(text for _, text in sampled))
    return _found(len(requests), ((wanted[number], _split(joined)) for number, _, joined, _ in answers))


def _engine_options(record: JobRecord) -> dict[str, Any]:
    engine = record.decides["engine"]
    options = {**engine.get("found", {}), **engine["options"]}
    options.pop("max_model_len", None)  # a key has what it comes to, row by row
    return options


def _sampling_pairs(mine: JobRecord, theirs: JobRecord) -> list[tuple[str, Any, Any]]:
    """Of jobs whose rows all have their job's sampling."""
    one, other = mine.decides["sampling"], theirs.decides["sampling"]
    pairs = [(f"sampling.{name}", one.get(name), other.get(name)) for name in sorted({*one, *other} - {"seed"})]
    if one["temperature"] > 0:  # each row draws by its own seed, made of its job's
        pairs.append(("sampling.seed", _seed(mine), _seed(theirs)))
    return pairs


def _seed(record: JobRecord) -> Any:
    given = record.decides["sampling"]["seed"]
    return f"one made of the job {record.fingerprint[:8]}, since none is given" if given is None else given


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:8] if len(text) == 64 else text[:80]  # a digest


def context_of(accepted: Accepted) -> int | None:
    """Tokens that a prompt and its completion may have; None where the nodes of a cluster decide."""
    if accepted.cut is None:
        return None
    return int(accepted.cut.options.get("max_model_len", accepted.model.max_position_embeddings))


def _useful(accepted: Accepted, earlier: Sequence[Earlier], say: Say) -> list[Earlier]:
    return [one for one in earlier if one.units and not _lacks_columns(accepted, one, say)]


def _index_name(useful: Sequence[Earlier]) -> str:
    return f"{layout.REUSE}/{_digest(useful)}.parquet"


def _engine_here(accepted: Accepted, record: JobRecord, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What this job's rows will meet, as far as that is known before it is up; for the rest what the earlier job's rows have met.

    Where both jobs say their numerics, they say the same: see why_nothing.
    """
    mine, stated = _engine_options(accepted.record), _engine_options(record)
    own = {name: mine[name] for name in NUMERICS if name not in stated and mine.get(name, "auto") != "auto"}
    return {
        **theirs,
        "dtype": own.get("dtype", theirs["dtype"]),
        "max_model_len": context_of(accepted) or theirs["max_model_len"],
        "options": {**theirs["options"], **own},
    }


def _by_key(answerer: Answerer, requests: Sequence[Request]) -> dict[bytes, list[int]]:
    """Numbers of the requests with each key."""
    numbers: defaultdict[bytes, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        numbers[answerer.key(request)].append(number)
    return dict(numbers)


def _found(count: int, answered: Iterable[tuple[Mapping[bytes, Sequence[int]], Iterable[bytes]]]) -> list[bool]:
    """Of so many requests: those whose key, as that output would have it, is among its answers. Stops where all are."""
    found: set[int] = set()
    for wanted, keys in answered:
        found.update(number for key in wanted.keys() & set(keys) for number in wanted[key])
        if len(found) == count:
            break
    return [number in found for number in range(count)]


def _split(joined: bytes) -> list[bytes]:
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def _lacks_columns(accepted: Accepted, one: Earlier, say: Say) -> bool:
    lacking = accepted.job.output.token_ids and not one.record.spec.output.token_ids
    if lacking:
        say(f"reuse: {one.out_uri} keeps no token ids, which this job writes (output.token_ids): its rows are generated")
    return lacking


def _digest(earlier: Sequence[Earlier]) -> str:
    said = [_VERSION, [[one.out_uri, one.record.fingerprint, [unit.index for unit in one.units]] for one in earlier]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _store(uri: str, data: bytes) -> None:
    """Created once; replaced only where it could not be read, or by a run at the same moment, whose index is the same."""
    try:
        storage.create_once(uri, data)
    except FileExistsError:
        storage.replace(uri, data)


def _keys(
    accepted: Accepted, earlier: Sequence[Earlier], say: Say, *, only: Set[Text] | None = None
) -> Iterator[tuple[int, int, bytes, list[int]]]:
    """Of each part, in order: the number of its source, its unit, keys and their rows; `only` those of such texts."""
    from jobs.asked import PartReader  # which loads a tokenizer's packages: asking for work must not

    lost = 0
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="reuse")
    try:
        for number, one in enumerate(earlier):
            reader = PartReader(one.out_uri, one.record, accepted.model)
            for unit, found in zip(one.units, pool.map(partial(reader.read, only=only), one.units), strict=True):
                if found is None:
                    lost += 1
                else:
                    yield number, unit.index, *found
    finally:
        pool.shutdown(cancel_futures=True)  # whoever interrupts this does not wait for every part
    if lost:
        say(f"reuse: {lost} parts of earlier outputs are gone or damaged: their rows are generated (`tokenmill verify` names them)")
