"""Which engine settings to try next. Machine, models and what was measured so far in, the next trial out; measures nothing.

A setting is a value for each dimension. The walk goes through the dimensions in the order of what they are worth, a few at a time,
and varies each around the best setting so far. Since an engine's start costs more than a trial's rows, halving happens inside a
trial: at a quarter and at half of its tokens one that is clearly slower than the best was there ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import Literal

from pipeline.model import Model
from pipeline.profile import ALLOCATORS
from pipeline.profile import Machine
from pipeline.profile import ReplicaPlan
from pipeline.profile import plan_replicas
from schemas.profile import Profile

_SOONER = 0.8
"""Of the best setting's start, that another's must be below to be up sooner: the rest is what two starts of the same differ by."""
BETTER = 1.02
"""A setting replaces the best one only if it is quicker by more than what two runs of the same differ by."""
RUNGS = ((0.25, 0.60), (0.50, 0.80))
"""Share of a trial's tokens, and share of the best setting's speed up to there below which the trial ends."""
_COMPILE_S = 75.0
_FIRST_START_S = 40.0
"""Where nothing was started yet."""
_GPU_SHARE = 0.92
_GPU_OVERHEAD_BYTES = 5 << 30
_KV_SHARE = 0.2
"""Of the weights' bytes, that the cache must get at least before a tensor-parallel width is worth a trial."""
_ROWS_AT_LEAST = 64
"""The same, in longest rows."""
_WIDTHS = 2
"""The smallest tensor-parallel width that fits, and the next: wider ones lose more to talking than they gain."""
_WORTH_SHARING = 0.05
"""Of the prompts' tokens, that a prefix cache would find, before it is worth a trial."""
_CORES_TO_SPARE = 8
"""So many, before an engine core in a process of its own is worth a trial on a CPU."""
_FIELDS = ("max_num_seqs", "max_num_batched_tokens", "dtype")
"""Options that a profile has as fields of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One point of the space."""

    model: str
    """Digest of the weights."""
    replicas: int
    options: tuple[tuple[str, Any], ...]
    """Engine arguments, sorted by name; those that are None are the engine's own."""
    preload: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    """Variables over the profile's, sorted by name."""
    pin_cores: bool = False
    defaults: bool = False
    """The engine's own defaults, with nothing of ours; one replica."""

    @property
    def key(self) -> str:
        """The same for equal settings, in every process."""
        return json.dumps(asdict(self), sort_keys=True)

    def get(self, name: str) -> Any:
        """An option's value; None where it is the engine's own."""
        return dict(self.options).get(name)

    def but(self, *, environment: Mapping[str, str] | None = None, **values: Any) -> Setting:
        """This setting with fields, or else options, changed; an option that is None is left to the engine."""
        own = {name: values.pop(name) for name in ("model", "replicas", "preload", "pin_cores") if name in values}
        return replace(
            self,
            **own,
            environment=tuple(sorted({**dict(self.environment), **(environment or {})}.items())),
            options=tuple(sorted((name, value) for name, value in {**dict(self.options), **values}.items() if value is not None)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a trial."""

    state: Literal["done", "stopped", "failed"]
    """Stopped because it was clearly slower; failed because the engine did not come up, died, or generates something else."""
    output_tokens_per_s: float = 0.0
    curve: tuple[tuple[float, int], ...] = ()
    """Seconds since the rows went in, and output tokens by then."""
    start_s: float = 0.0
    run_s: float = 0.0
    message: str = ""


Cut = tuple[int, Mapping[str, Any]]
"""Replicas of a node, and the options that go with so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What may be varied, and around what."""

    start: Setting
    """What a run without tuning would take."""
    models: tuple[str, ...]
    """Digests; the first is the model itself, the others are the same in other precisions, the most promising first."""
    dtypes: tuple[str, ...] = ()
    cuts: tuple[tuple[str, tuple[Cut, ...]], ...] = ()
    """For each model, from fewest replicas to most."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """How the engine runs, its process and its surroundings; tried each by itself, before dtypes and ladders."""
    ladders: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Options with an order, and the values that they may take."""
    rest: tuple[Mapping[str, Any], ...] = ()
    """Changes that are tried last, each by itself."""

    def cuts_of(self, model: str) -> tuple[Cut, ...]:
        return dict(self.cuts).get(model, ())


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where a search stands."""

    next: Setting | None
    """None at its end."""
    best: Setting
    skipped: int = 0
    """Settings that the time that is left is too short for."""


def next_trial(space: Space, outcomes: Mapping[str, Outcome], *, left_s: float) -> Step:
    """The next setting to try, given what every tried one gave, by its key.

    A setting that would not end in time is left out, but for the two that everything is compared with.
    """
    always, skipped = (space.start, engine_defaults(space)), 0
    walk = _walk(space, outcomes)
    try:
        wanted, best = next(walk)
        while True:
            outcome = outcomes.get(wanted.key)
            if outcome is None and (wanted in always or expected_s(wanted, outcomes) <= left_s):
                return Step(next=wanted, best=best, skipped=skipped)
            if outcome is None:
                skipped += 1
                outcome = Outcome(state="stopped")
            wanted, best = walk.send(outcome)
    except StopIteration as end:
        return Step(next=None, best=end.value, skipped=skipped)


def best_of(outcomes: Mapping[str, Outcome], model: str) -> Setting | None:
    """The best setting that was measured for one model; None where none was."""
    found = [
        (outcome.output_tokens_per_s, key)
        for key, outcome in outcomes.items()
        if outcome.state == "done" and (setting := parse_key(key)).model == model and not setting.defaults
    ]
    return parse_key(max(found)[1]) if found else None


def sooner_of(outcomes: Mapping[str, Outcome], best: Setting) -> list[tuple[Setting, int]]:
    """Settings that are up sooner than the best, each with the output tokens below which it is done first, for the smallest jobs first.

    In the same dtype, which decides a job's output.
    """

    def line(key: str) -> tuple[float, float, str]:
        """Seconds of a start, and of a token."""
        return outcomes[key].start_s, 1 / outcomes[key].output_tokens_per_s, key

    def alike(key: str) -> bool:
        setting, outcome = parse_key(key), outcomes[key]
        same = setting.model == best.model and setting.get("dtype") == best.get("dtype") and not setting.defaults
        return same and outcome.state == "done" and outcome.start_s < _SOONER * outcomes[best.key].start_s

    top = line(best.key)
    lines = [one for one in map(line, filter(alike, outcomes)) if one[1] > top[1]]
    now, found = min([*lines, top]), []
    while now != top:
        # The quicker one that catches up first.
        tokens, after = min(((one[0] - now[0]) / (now[1] - one[1]), one) for one in [*lines, top] if one[1] < now[1])
        found.append((parse_key(now[2]), round(tokens)))
        now = after
    return found


def parse_key(key: str) -> Setting:
    """Raises what says that it is none."""
    values = json.loads(key)
    pairs = {name: tuple((first, second) for first, second in values.pop(name)) for name in ("options", "environment")}
    return Setting(**{**values, **pairs, "preload": tuple(values["preload"])})


def engine_defaults(space: Space) -> Setting:
    """What the engine takes on this node when only the model is named."""
    return Setting(model=space.models[0], replicas=1, options=(), preload=(), defaults=True)


def goes_on(curve: Sequence[tuple[float, int]], best: Sequence[tuple[float, int]], *, total_tokens: int) -> bool:
    """Whether a running trial, of which this is known so far, may still be the quickest. Both ran the same rows."""
    if not curve or not best:
        return True
    now_s, now_tokens = curve[-1]
    for share, least in RUNGS:
        rung = share * total_tokens
        best_s = _seconds_at(best, rung)
        if best_s is None:
            continue
        mine_s = _seconds_at(curve, rung)
        if (now_s if mine_s is None else mine_s) > best_s / least:
            return False
    return now_tokens >= total_tokens or now_s <= best[-1][0] / RUNGS[-1][1]


def _seconds_at(curve: Sequence[tuple[float, int]], tokens: float) -> float | None:
    """When so many tokens were there, between the points that are known; None if never."""
    before_s, before = 0.0, 0
    for at_s, count in curve:
        if count >= tokens:
            return before_s + (at_s - before_s) * ((tokens - before) / (count - before) if count > before else 1.0)
        before_s, before = at_s, count
    return None


def expected_s(setting: Setting, outcomes: Mapping[str, Outcome]) -> float:
    """How long a trial of it will take, by what others took, those of its model first: weights that were read once start sooner.

    Starts are slower than rows, and replicas start together.
    """
    seen = {parse_key(key): outcome for key, outcome in outcomes.items()}
    ours = {tried: outcome for tried, outcome in seen.items() if not tried.defaults and outcome.state != "failed"}
    eager = [(tried.model, outcome.start_s) for tried, outcome in ours.items() if not compiles(tried)]
    alike = [start_s for model, start_s in eager if model == setting.model] or [start_s for _, start_s in eager]
    start_s = max(alike, default=_FIRST_START_S)
    runs = [outcome.run_s for outcome in ours.values() if outcome.state == "done"]
    run_s = min(runs, default=_FIRST_START_S) / RUNGS[-1][1]
    if compiles(setting):  # then once more, as runs will start
        start_s = 2 * start_s + _COMPILE_S
    return start_s + run_s


def profile_of(setting: Setting, base: Profile) -> Profile:
    """The profile that makes a run take this setting."""
    options = dict(setting.options)
    values = {
        "name": f"{base.name}-tuned",
        "description": f"{base.description.rstrip('.')}, as tuned.",
        "replicas": setting.replicas,
        "preload": setting.preload,
        "pin_cores": setting.pin_cores,
        "environment": {**base.environment, **dict(setting.environment)},
        "dtype_by_cpu_flag": {},
        **{name: options.pop(name) for name in _FIELDS if name in options},
        "options": {**base.options, **options},
    }
    return Profile.model_validate({**base.model_dump(), **values})


def plan_of(
    setting: Setting, base: Profile, machine: Machine, model: Model, options: Mapping[str, Any], *, row_tokens: int | None = None
) -> ReplicaPlan:
    """How its trial is run; the user's own options, and rows' length, are for every trial but the engine's defaults. Raises JobError."""
    profile, length = profile_of(setting, base), None if setting.defaults else row_tokens
    plan = plan_replicas(profile, machine, model, replicas=setting.replicas, options=dict(options), row_tokens=length)
    if not setting.defaults:
        return plan
    # The engine would take nearly all memory for its cache, which other processes hold; its size decides no speed here.
    cache = {name: plan.options[name] for name in ("kv_cache_memory_bytes",) if name in plan.options}
    return ReplicaPlan(profile="defaults", replicas=1, options=cache, bare=True)


def space_for(
    machine: Machine,
    base: Profile,
    models: Sequence[Model],
    *,
    options: Mapping[str, Any],
    replicas: int | None = None,
    rows: int,
    tokens_per_row: int,
    row_tokens: int | None = None,
    shared_share: float = 0.0,
    kv_cache_dtypes: Sequence[str] = (),
) -> Space:
    """What is worth trying on a machine; what the user says, options or replicas, stays as it is.

    `tokens_per_row` is the longest prompt and completion together, `row_tokens` what a run would take it for, `shared_share` how much of
    the prompts' tokens begin another prompt, too. KV types that lose precision are for the caller to allow. Raises JobError where the
    model fits nowhere.
    """
    plan = plan_replicas(base, machine, models[0], replicas=replicas, options=dict(options), row_tokens=row_tokens)
    given = base.options_for(machine.cpu_flags)
    own = {name for name, value in given.items() if isinstance(value, str | int | float)}  # nothing to vary in the others
    free = {name: value for name, value in plan.options.items() if name in {*_FIELDS, *own} and name not in options}
    preload = tuple(name for name in ALLOCATORS if name in machine.libraries)[:1] if base.device == "cpu" else ()
    start = Setting(model=models[0].weights_digest, replicas=plan.replicas, options=(), preload=preload).but(**free)
    if base.device == "gpu" and "tensor_parallel_size" not in options:
        start = start.but(tensor_parallel_size=plan.options.get("tensor_parallel_size", 1))
    build = _gpu_space if base.device == "gpu" else _cpu_space
    space = build(machine, start, models, tokens_per_row)
    rest: list[Mapping[str, Any]] = [{"kv_cache_dtype": name} for name in kv_cache_dtypes]
    if shared_share >= _WORTH_SHARING:
        rest.append({"enable_prefix_caching": True})
    rest += space.rest
    return replace(
        space,
        ladders=tuple(
            (name, _rungs(values, start.get(name), math.inf if "tokens" in name else max(rows, 64)))
            for name, values in space.ladders
            if name not in options
        ),
        changes=tuple(change for change in space.changes if not set(change) & set(options)),
        rest=tuple(change for change in rest if not set(change) & set(options)),
        dtypes=() if "dtype" in options else space.dtypes,
        cuts=() if replicas or "tensor_parallel_size" in options else space.cuts,
    )


def _rungs(values: Sequence[int], now: int | None, most: float) -> tuple[int, ...]:
    """Those worth trying, and where a run stands without."""
    return tuple(sorted({*(value for value in values if value <= most), *(() if now is None else (now,))}))


def _cpu_space(machine: Machine, start: Setting, models: Sequence[Model], tokens_per_row: int) -> Space:
    x86 = "sse2" in machine.cpu_flags
    dtypes = [name for name in ("bfloat16", "float32", "float16") if name != "float16" or not x86 or "avx512_fp16" in machine.cpu_flags]
    if "amx_bf16" in machine.cpu_flags:  # its tiles do sixteen times the arithmetic of float32: 1,307 against 31 and 33 tok/s were seen
        dtypes = ["bfloat16"]
    dtypes.sort(key=lambda name: name != start.get("dtype"))
    cuts = sorted({max(1, machine.cores // threads) for threads in _doubling(machine.cores)} | {start.replicas})
    allocators = [name for name in ALLOCATORS if name in machine.libraries]
    openmp = ("iomp",) if "iomp" in machine.libraries else ()
    libraries = [(*openmp, *allocators[:1]), openmp, *((name,) for name in allocators), ()]
    # Compiling is worth more than what follows it: 5 to 20 %, against a few.
    changes: list[Mapping[str, Any]] = [{"enforce_eager": False}]
    changes += [{"preload": names} for names in dict.fromkeys(libraries) if names != start.preload]
    changes.append({"pin_cores": True})
    # Threads that spin while they wait for each other are the quickest, unless something else wants their cores.
    changes.append({"environment": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "1"}})
    if machine.cores >= _CORES_TO_SPARE:
        changes.append({"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "pin_cores": True})
    return Space(
        start=start,
        models=_most_promising(models),
        dtypes=tuple(dtypes),
        cuts=tuple((model.weights_digest, tuple((replicas, {}) for replicas in cuts)) for model in models),
        changes=tuple(changes),
        ladders=(("max_num_seqs", (16, 32, 64, 128, 256, 512)), ("max_num_batched_tokens", (512, 1024, 2048, 4096, 8192))),
        # The engine has one attention backend for CPUs; its own blocks are of 128 tokens.
        rest=tuple({"block_size": size} for size in (64, 32, 128) if size != (start.get("block_size") or 128)),
    )


def _gpu_space(machine: Machine, start: Setting, models: Sequence[Model], tokens_per_row: int) -> Space:
    cuts = {model.weights_digest: _gpu_cuts(machine, model, tokens_per_row) for model in models}
    # What a run takes goes by the model's context, these by the table's rows.
    first, now = models[0].weights_digest, (start.replicas, {"tensor_parallel_size": start.get("tensor_parallel_size")})
    cuts[first] = tuple(sorted({cut[0]: cut for cut in (*cuts[first], now)}.values(), key=lambda cut: cut[0]))
    return Space(
        start=start,
        models=_most_promising(models),
        cuts=tuple(cuts.items()),
        ladders=(
            ("max_num_seqs", (128, 256, 512, 1024, 2048)),
            ("max_num_batched_tokens", (4096, 8192, 16384, 32768)),
        ),
        rest=(
            *({"attention_backend": name} for name in _backends(machine.gpu_name)),
            {"max_cudagraph_capture_size": 1024},  # the engine's own stops at 512 but for Blackwell; larger batches run without a graph
            {"block_size": 32},
            {"block_size": 64},
            {"enforce_eager": True},
        ),
    )


def _backends(gpu_name: str) -> tuple[str, ...]:
    """vLLM's for attention, the most promising first."""
    name = gpu_name.lower()
    if "amd" in name:
        return ("ROCM_ATTN", "ROCM_AITER_FA", "TRITON_ATTN")
    blackwell = "b200" in name or "b300" in name
    return ("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN") if blackwell else ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


def _gpu_cuts(machine: Machine, model: Model, tokens_per_row: int) -> tuple[Cut, ...]:
    """The smallest tensor-parallel width that fits and the next, widest first."""
    widths = [width for width in _doubling(machine.num_gpus) if machine.num_gpus % width == 0]
    fitting = [width for width in widths if _fits(model, machine, width, tokens_per_row)] or widths[-1:]
    return tuple((machine.num_gpus // width, {"tensor_parallel_size": width}) for width in reversed(fitting[:_WIDTHS]))


def _fits(model: Model, machine: Machine, width: int, tokens_per_row: int) -> bool:
    """Whether weights and a cache worth having lie on so many GPUs; yes where nobody knows their memory."""
    if not machine.gpu_memory_bytes:
        return True
    cache = max(int(_KV_SHARE * model.weights_bytes), _ROWS_AT_LEAST * tokens_per_row * model.kv_values_per_token * 2)
    return model.weights_bytes + cache <= width * (_GPU_SHARE * machine.gpu_memory_bytes - _GPU_OVERHEAD_BYTES)


def _doubling(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _most_promising(models: Sequence[Model]) -> tuple[str, ...]:
    """The model itself, then other precisions, smallest first: fewer bytes are fewer bytes to read and wider arithmetic."""
    others = sorted(models[1:], key=lambda model: model.weights_bytes)
    return tuple(model.weights_digest for model in (models[0], *others))


def compiles(setting: Setting) -> bool:
    """Whether its engine compiles the model when it starts, which takes long the first time."""
    return setting.get("enforce_eager") is False


_Walk = Generator[tuple[Setting, Setting], Outcome, Setting]
"""Yields what it wants to know and the best so far; is sent the outcome; returns the best."""


def _walk(space: Space, outcomes: Mapping[str, Outcome]) -> _Walk:
    """The whole search, as if every trial were known already."""
    best = space.start
    rates = {best.key: (yield best, best).output_tokens_per_s}
    yield engine_defaults(space), best

    def ask(wanted: Setting) -> Generator[tuple[Setting, Setting], Outcome, float]:
        if wanted.key not in rates:
            outcome = yield wanted, best
            rates[wanted.key] = outcome.output_tokens_per_s if outcome.state == "done" else 0.0
        return rates[wanted.key]

    def best_among(candidates: Sequence[Setting]) -> _Walk:
        winner = best
        for candidate in candidates:
            rate = yield from ask(candidate)
            if rate > BETTER * rates[winner.key] or (rate > rates[winner.key] and winner != best):
                winner = candidate
        return winner

    models = (*space.models[1:], *space.models[:1])
    best = yield from best_among([_on(space, best, model) for model in models])
    best = yield from _climb(best, _cuts(space, best), ask)
    for change in space.changes:
        best = yield from best_among([best.but(**change)])
    # Late, as the profile knows the good one for a CPU by its flags.
    first = best.model
    dtypes = space.dtypes if set(space.dtypes) != {best.get("dtype")} else ()
    best = yield from best_among([_on(space, best, model).but(dtype=name) for model in models for name in dtypes])
    if best.model != first:
        best = yield from _climb(best, _cuts(space, best), ask)
    for name, values in space.ladders:
        best = yield from _climb(best, [best.but(**_named(name, value)) for value in values], ask)
    for change in space.rest:
        best = yield from best_among([best.but(**change)])
    for model in space.models[:1]:  # whoever must keep the weights gets what was learnt with others
        if model != best.model and (own := best_of(outcomes, model)) is not None:
            yield from ask(_on(space, best, model).but(dtype=own.get("dtype")))
    return best


def _cuts(space: Space, setting: Setting) -> list[Setting]:
    return [setting.but(replicas=replicas, **options) for replicas, options in space.cuts_of(setting.model)]


def _on(space: Space, setting: Setting, model: str) -> Setting:
    """The setting with another model; cut otherwise where this one needs more devices, or can do with fewer."""
    moved = setting.but(model=model)
    cuts = _cuts(space, moved)
    return moved if moved in cuts or not cuts else cuts[-1]


def _named(name: str, value: Any) -> dict[str, Any]:
    return {name: value}


def _climb(best: Setting, rungs: Sequence[Setting], ask: Any) -> _Walk:
    """Up from the best one's place while it gets better; if the first step up does not, down."""
    rungs = list(dict.fromkeys(rungs))
    if best not in rungs:
        return best
    place = rungs.index(best)
    best_rate = yield from ask(best)
    for direction in (1, -1):
        at = place + direction
        moved = False
        while 0 <= at < len(rungs):
            rate = yield from ask(rungs[at])
            if rate <= BETTER * best_rate:
                break
            best, best_rate, moved = rungs[at], rate, True
            at += direction
        if moved:
            break
    return best


def shared_share(prompts: Sequence[Sequence[int]], *, block: int) -> float:
    """How much of the prompts' tokens lie in whole blocks that an earlier prompt began with, too."""
    seen: set[tuple[int, ...]] = set()
    shared = 0
    for prompt in prompts:
        beginnings = [tuple(prompt[:end]) for end in range(block, len(prompt) + 1, block)]
        shared += block * sum(beginning in seen for beginning in beginnings)
        seen.update(beginnings)
    total = sum(map(len, prompts))
    return shared / total if total else 0.0


def agreement(reference: Mapping[int, Sequence[int]], generated: Mapping[int, Sequence[int]]) -> float:
    """The share of rows, of those in both, whose first tokens are the same; 1 where none is in both."""
    rows = [row for row in generated if row in reference]
    return sum(list(generated[row][:1]) == list(reference[row][:1]) for row in rows) / len(rows) if rows else 1.0
