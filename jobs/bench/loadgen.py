"""MLCommons LoadGen's Offline scenario around a function that answers samples. Its log files in, its own verdict out. Knows no engine.

LoadGen issues all samples at once and waits, in a thread of its own, until every one is answered; so after an error the rest is
answered with nothing and LoadGen's result thrown away, or its thread would wait for ever.
"""

from __future__ import annotations

import array
import importlib.util
import json
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Literal

from schemas.errors import JobError

Mode = Literal["performance", "accuracy"]
Answer = Callable[[int, Sequence[int]], None]
"""Called with a sample's number among those issued and its tokens, once each."""

_SUMMARY, _DETAIL, _ACCURACY = "mlperf_log_summary.txt", "mlperf_log_detail.txt", "mlperf_log_accuracy.json"
_DETAIL_PREFIX = ":::MLLOG "
_MODEL = "tokenmill"
"""Names no MLPerf model, so that LoadGen sets none's rules; what applies is set below."""
_SEEDS = {
    # LoadGen 6.0's own. It reads them the first time in a process only, and takes none from user.conf.
    "qsl_rng_seed": 2085463073848966840,
    "sample_index_rng_seed": 2747215439041700203,
    "schedule_rng_seed": 16159082839903944936,
}
_LOG_POLL_S = 0.1
_UNLOAD_S = 0.5
"""LoadGen's log thread reads the list of loaded samples where it lies, and it is freed once they are unloaded: without a poll of
that thread in between (they come once a second by default), a short run of 6.0.17 now and then ends with a segmentation fault."""
_JOIN_S = 10.0
_MIN_QUERIES = 24_576
"""Samples that an Offline run of a language model has at least, or one pass where the set is smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyEntry:
    """One sample's answer as LoadGen logged it."""

    index: int
    """In the set."""
    token_ids: list[int]
    token_count: int
    """As it was reported to LoadGen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadGenRun:
    """What LoadGen said of one run."""

    detail: dict[str, Any]
    """Its detail log's values by key; the last where there are several."""
    reasons: list[str]
    """Why it calls the result invalid."""
    summary: str
    """Its own summary, for people."""
    accuracy: list[AccuracyEntry]
    """Empty but in accuracy mode."""


def require_loadgen() -> None:
    """Raises JobError where the packages of the extra are missing."""
    missing = [package for package in ("mlperf_loadgen", "rouge_score") if importlib.util.find_spec(package) is None]
    if missing:
        raise JobError(f"bench offline needs {' and '.join(missing)}: pip install 'tokenmill[bench]'")


def run_loadgen(
    mode: Mode, *, num_samples: int, target_qps: float, min_duration_s: float, folder: Path, answer_all: Callable[[list[int], Answer], None]
) -> LoadGenRun:
    """One run, its logs in `folder`. `answer_all` gets the issued samples' indices and an Answer; it runs in this thread."""
    import mlperf_loadgen as lg

    folder.mkdir(parents=True, exist_ok=True)
    settings = lg.TestSettings()
    settings.FromConfig(str(_write_config(folder, num_samples, target_qps, min_duration_s)), _MODEL, "Offline")
    for name, seed in _SEEDS.items():
        setattr(settings, name, seed)
    settings.scenario = lg.TestScenario.Offline
    settings.mode = lg.TestMode.AccuracyOnly if mode == "accuracy" else lg.TestMode.PerformanceOnly
    output, logs = lg.LogOutputSettings(), lg.LogSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    logs.log_output, logs.enable_trace = output, False
    logs.log_mode_async_poll_interval_ms = round(1000 * _LOG_POLL_S)

    issued: queue.SimpleQueue[list[Any] | BaseException | None] = queue.SimpleQueue()
    sut = lg.ConstructSUT(issued.put, lambda: None)
    library = lg.ConstructQSL(num_samples, num_samples, lambda _: None, lambda _: time.sleep(_UNLOAD_S))

    def run() -> None:
        try:
            lg.StartTestWithLogSettings(sut, library, settings, logs, "")
        except BaseException as error:  # raised in the caller below
            issued.put(error)
        else:
            issued.put(None)

    thread = threading.Thread(target=run, name="loadgen", daemon=True)
    thread.start()
    try:
        while (samples := issued.get()) is not None:
            if isinstance(samples, BaseException):
                raise samples
            _answer_query(lg, samples, answer_all)
    finally:
        thread.join(_JOIN_S)
    lg.DestroyQSL(library)
    lg.DestroySUT(sut)
    return read_logs(folder, mode)


def read_logs(folder: Path, mode: Mode) -> LoadGenRun:
    """What LoadGen's log files say."""
    detail: dict[str, Any] = {}
    reasons: list[str] = []
    for line in (folder / _DETAIL).read_text().splitlines():
        if line.startswith(_DETAIL_PREFIX):
            entry = json.loads(line.removeprefix(_DETAIL_PREFIX))
            detail[entry["key"]] = entry["value"]
            if entry["key"] == "result_invalid_reason":
                reasons.append(entry["value"].strip())
    accuracy = []
    if mode == "accuracy":
        for item in json.loads((folder / _ACCURACY).read_text()):
            token_ids = array.array("i", bytes.fromhex(item["data"])).tolist()
            accuracy.append(AccuracyEntry(index=item["qsl_idx"], token_ids=token_ids, token_count=item["token_count"]))
    return LoadGenRun(detail=detail, reasons=reasons, summary=(folder / _SUMMARY).read_text(), accuracy=accuracy)


def _answer_query(lg: Any, samples: Sequence[Any], answer_all: Callable[[list[int], Answer], None]) -> None:
    """Every sample is answered in the end, with nothing where `answer_all` fails."""
    open_ids = {number: sample.id for number, sample in enumerate(samples)}

    def answer(number: int, token_ids: Sequence[int]) -> None:
        data = array.array("i", token_ids)
        address, length = data.buffer_info()
        lg.QuerySamplesComplete([lg.QuerySampleResponse(open_ids.pop(number), address, length * data.itemsize, length)])

    try:
        answer_all([sample.index for sample in samples], answer)
    finally:
        for number in list(open_ids):
            answer(number, [])


def _write_config(folder: Path, num_samples: int, target_qps: float, min_duration_s: float) -> Path:
    """What the rules fix for language models, and what a submitter chooses."""
    path = folder / "user.conf"
    values = {
        "*.Offline.target_qps": target_qps,
        "*.Offline.min_duration": round(min_duration_s * 1000),
        "*.Offline.min_query_count": min(num_samples, _MIN_QUERIES),
        "*.*.performance_sample_count_override": num_samples,
        "*.*.sample_concatenate_permutation": 1,  # whole passes over the set
        "*.*.use_token_latencies": 1,  # tokens/s in the summary
    }
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    return path
