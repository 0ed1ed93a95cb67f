"""LoadGen's Offline scenario over a job's rows: all samples at once, accuracy then performance, every sample computed in full.

Prefix cache off, no row is copied, none is reordered: replica n of m gets samples n, n + m, ... as LoadGen issued them. Rendering
and tokenising are untimed, as in MLPerf. Not an MLPerf result: other model, other data.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.accept import Accepted
from jobs.bench.engine import LIMIT_S
from jobs.bench.loadgen import AccuracyEntry
from jobs.bench.loadgen import Answer
from jobs.bench.loadgen import LoadGenRun
from jobs.bench.loadgen import Mode
from jobs.bench.loadgen import require_loadgen
from jobs.bench.loadgen import run_loadgen
from jobs.bench.result import BenchResult
from jobs.bench.result import Measured
from jobs.bench.rows import Rows
from jobs.bench.rows import accept_for_bench
from jobs.bench.rows import plan_of
from jobs.bench.rows import read_rows
from jobs.bench.rows import with_engine
from jobs.bench.setting import eos_ids_of
from jobs.bench.setting import quantisation_of
from jobs.bench.setting import setting_of
from pipeline import storage
from pipeline.engine.engine import Generation
from pipeline.profile import this_machine
from pipeline.trial import Replicas
from pipeline.trial import TrialResult
from pipeline.trial import run_trial
from schemas.errors import JobError
from schemas.job import JobSpec

LABEL = "LoadGen Offline rules; not an MLPerf result: other model, other data"
RULES_MIN_DURATION_S = 600.0
_QPS_MARGIN = 1.1
"""A long run is quicker than one pass, whose end is a larger part of it, and must last long enough all the same."""
_MIN_SHARE = 0.99
"""Of the baseline's ROUGE."""
_MIN_LENGTH_SHARE = 0.9
"""Of the baseline's tokens per sample."""
_WINDOW = "LoadGen's own, from its query to the last sample's completion"
_PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90")
_SEEDS = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflineOptions:
    """What a run of the scenario is told."""

    min_duration_s: float = RULES_MIN_DURATION_S
    target_qps: float | None = None
    """Samples/s that LoadGen sizes its query for; by default what the accuracy run reached."""
    reference: str | None = None
    """Column with the text that completions are scored against."""
    baseline_model: str | None = None
    """An unquantised checkpoint whose greedy completions of the same rows are scored beside."""
    logs: Path | None = None
    """Where LoadGen's log files stay; by default nowhere."""


def bench_offline(job: JobSpec, options: OfflineOptions, *, num_rows: int | None, say: Callable[[str], None]) -> BenchResult:
    """Raises JobError, EngineStartError and EngineError."""
    require_loadgen()
    _check(job, options)
    plain = with_engine(job, ordering="off", options={"enable_prefix_caching": False} if job.engine.kind == "vllm" else None)
    with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as folder:
        accepted = accept_for_bench(plain, Path(folder), num_rows)
        began = time.monotonic()
        rows = read_rows(accepted, reference=options.reference)
        read_s = time.monotonic() - began
        baseline = _baseline_rows(accepted, options, Path(folder)) if options.baseline_model else None
        logs = _new_folder(options.logs) if options.logs else Path(folder, "logs")
        say(f"{len(rows.requests):,} samples, {plan_of(accepted).replicas} replicas; {LABEL}")
        with Replicas(plan_of(accepted), accepted.model, job.engine.kind, timeout_s=LIMIT_S) as replicas:
            first, scored = _run("accuracy", replicas, rows, qps=1.0, min_duration_s=0.0, folder=logs / "accuracy")
            say(f"accuracy: {first.output_tokens_per_s:,.1f} output tokens/s in {first.elapsed_s:.1f} s")
            qps = options.target_qps or _QPS_MARGIN * first.rows / first.elapsed_s
            timed, said = _run("performance", replicas, rows, qps=qps, min_duration_s=options.min_duration_s, folder=logs / "performance")
            say(f"performance: {said.detail['result_tokens_per_second']} output tokens/s in {timed.elapsed_s:.1f} s")
            setting = setting_of(accepted, next(iter(replicas.infos.values())), replicas.start_seconds)
        scores = _scores([entry.token_ids for entry in sorted(scored.accuracy, key=lambda entry: entry.index)], rows)
        if baseline is not None:
            say(f"baseline: {options.baseline_model}")
            scores |= _beside(scores, _baseline(*baseline))
        name = ", ".join(job.input.uris) + (f", first {num_rows} rows" if num_rows else "")
        offline = {
            **summary_of(said, min_duration_s=options.min_duration_s, num_samples=len(rows.requests)),
            "set": {"name": name, "samples": len(rows.requests), "sha256": _sha256(accepted)},
            "order": "as LoadGen issued them, every mth to one replica; whole passes over the set",
            "accuracy": scores,
            "accuracy_elapsed_s": round(first.elapsed_s, 3),
            "end_to_end": _end_to_end(rows, scored.accuracy, Path(folder, "answers.parquet"), read_s=read_s, engine_s=first.elapsed_s),
            "test06": check_test06(scored.accuracy, eos_ids_of(accepted.model)),
            "logs": str(logs) if options.logs else None,
        }
    # LoadGen counts no token of a sample that has one token only; the headline counts all that were generated in the same time.
    measured = replace(Measured.of(timed), elapsed_s=timed.rows / said.detail["result_samples_per_second"])
    return BenchResult(mode="offline", rounds=(measured,), setting=setting, error_rows=rows.error_rows, window=_WINDOW, offline=offline)


def summary_of(run: LoadGenRun, *, min_duration_s: float, num_samples: int) -> dict[str, Any]:
    """LoadGen's own figures of a performance run, under the names that its summary has."""
    detail = run.detail
    reasons = list(run.reasons)
    if min_duration_s < RULES_MIN_DURATION_S:
        reasons.append(f"the rules ask for {RULES_MIN_DURATION_S:.0f} s at least, this run was asked for {min_duration_s:g} s")
    latencies = {"min": "result_min_latency_ns", "max": "result_max_latency_ns", "mean": "result_mean_latency_ns"}
    latencies |= {f"p{float(value):g}": f"result_{value}_percentile_latency_ns" for value in _PERCENTILES}
    issued = detail["generated_samples_per_query"]
    return {
        "label": LABEL,
        "scenario": detail["effective_scenario"],
        "loadgen_mode": detail["effective_test_mode"],
        "sut_name": detail["sut_name"],
        "result_validity": "INVALID" if reasons else detail["result_validity"],
        "invalid_reasons": reasons,
        "loadgen_validity": detail["result_validity"],
        "tokens_per_second": detail["result_tokens_per_second"],
        "samples_per_second": detail["result_samples_per_second"],
        "min_duration_met": detail["result_min_duration_met"],
        "min_duration_s": min_duration_s,
        "min_queries_met": detail["result_min_queries_met"],
        "early_stopping_met": detail["early_stopping_met"],
        "effective_samples_per_query": detail["effective_samples_per_query"],
        "generated_samples_per_query": issued,
        "passes": issued / num_samples,
        "performance_sample_count": detail["effective_performance_sample_count"],
        "target_qps": detail["effective_target_qps"],
        "seeds": {seed: detail[f"effective_{seed}"] for seed in _SEEDS},
        "completion_s": {name: round(detail[key] / 1e9, 3) for name, key in latencies.items()},
        "loadgen_version": detail["loadgen_version"],
    }


def check_test06(entries: Sequence[AccuracyEntry], eos_ids: frozenset[int]) -> dict[str, Any]:
    """Whether each sample has one EOS at most, at its end, and as many tokens as were reported; and which have not."""
    early = [entry.index for entry in entries if eos_ids.intersection(entry.token_ids[:-1])]
    wrong = [entry.index for entry in entries if len(entry.token_ids) != entry.token_count]
    return {
        "eos_only_at_the_end": not early,
        "token_counts_match": not wrong,
        "samples": len(entries),
        **({"first_failing_samples": sorted({*early, *wrong})[:10]} if early or wrong else {}),
    }


def _check(job: JobSpec, options: OfflineOptions) -> None:
    sampling, engine = job.sampling, job.engine
    if sampling.temperature or sampling.n != 1:
        raise JobError(
            f"sampling: found temperature {sampling.temperature:g} and n {sampling.n}; the Offline scenario is greedy, one choice"
        )
    if job.input.sampling is not None:
        raise JobError("input.sampling: rows with settings of their own have no place in the Offline scenario; leave it out")
    if engine.options.get("enable_prefix_caching"):
        raise JobError("engine.options.enable_prefix_caching: found true; the Offline rules forbid what one sample takes from another")
    if options.baseline_model and not options.reference:
        raise JobError("--baseline-model needs --reference, the column that completions are scored against")


def _new_folder(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise JobError(f"--logs: {path} is not an empty folder; LoadGen would mix its logs with what lies there")
    return path


def _run(mode: Mode, replicas: Replicas, rows: Rows, *, qps: float, min_duration_s: float, folder: Path) -> tuple[TrialResult, LoadGenRun]:
    """One LoadGen run on warm replicas."""
    results: list[TrialResult] = []

    def answer_all(indices: list[int], answer: Answer) -> None:
        issued = [replace(rows.requests[index], position=number) for number, index in enumerate(indices)]

        def hand_on(generations: list[Generation]) -> None:
            for generation in generations:
                answer(generation.position, generation.choices[0].token_ids)

        results.append(replicas.run(issued, timeout_s=LIMIT_S, on_finished=hand_on))

    said = run_loadgen(
        mode,
        num_samples=len(rows.requests),
        target_qps=qps,
        min_duration_s=min_duration_s,
        folder=folder,
        answer_all=answer_all,
    )
    (result,) = results  # Offline is one query
    return result, said


def _scores(token_ids: Sequence[Sequence[int]], rows: Rows) -> dict[str, Any]:
    lengths = [len(ids) for ids in token_ids]
    values: dict[str, Any] = {
        "gen_num": len(token_ids),
        "gen_tok_len": sum(lengths),
        "tokens_per_sample": round(sum(lengths) / len(lengths), 2),
    }
    if rows.references:
        from pipeline.quality import KINDS
        from pipeline.quality import rouge_of

        texts = rows.renderer.decode([list(ids) for ids in token_ids], skip_special_tokens=True)
        columns = zip(KINDS, zip(*rouge_of(rows.references, texts), strict=True), strict=True)
        values |= {"gen_len": sum(map(len, texts)), **{kind: round(100 * statistics.fmean(scores), 4) for kind, scores in columns}}
    return values


def _baseline_rows(accepted: Accepted, options: OfflineOptions, folder: Path) -> tuple[Accepted, Rows]:
    """The same rows for the other model, unquantised, in float32 where a CPU computes. Raises JobError before anything starts."""
    job = accepted.job
    plain = {"quantization": None, "kv_cache_dtype": "auto", "dtype": "auto" if this_machine().num_gpus else "float32"}
    other = with_engine(job, options=plain if job.engine.kind == "vllm" else None).model_copy(update={"model": options.baseline_model})
    found = accept_for_bench(other, folder / "baseline")
    if found.model.tokenizer_digest != accepted.model.tokenizer_digest:
        raise JobError(
            f"--baseline-model: {options.baseline_model} has another tokenizer than {job.model}; give the same model, unquantised"
        )
    if (quantised := quantisation_of(found.model)) != "none":
        raise JobError(f"--baseline-model: {options.baseline_model} is quantised itself ({quantised}); give the model before that")
    return found, read_rows(found, reference=options.reference)


def _baseline(accepted: Accepted, rows: Rows) -> dict[str, Any]:
    result = run_trial(plan_of(accepted), accepted.model, accepted.job.engine.kind, rows.requests, timeout_s=LIMIT_S, keep=True)
    generations = result.generations
    ids = [generations[request.position].choices[0].token_ids for request in rows.requests]
    dtype = result.replicas[0].engine.dtype
    return {"model": accepted.job.model, "weights_sha256": accepted.model.weights_digest, "dtype": dtype, **_scores(ids, rows)}


def _beside(scores: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline's scores, what share of them is reached, and whether that passes."""
    from pipeline.quality import KINDS

    shares = {kind: round(scores[kind] / baseline[kind], 4) if baseline[kind] else 1.0 for kind in KINDS}
    length_share = round(scores["tokens_per_sample"] / baseline["tokens_per_sample"], 4)
    return {
        "baseline": dict(baseline),
        "share_of_baseline": {**shares, "tokens_per_sample": length_share},
        "passes": all(share >= _MIN_SHARE for share in shares.values()) and length_share >= _MIN_LENGTH_SHARE,
    }


def _end_to_end(rows: Rows, entries: Sequence[AccuracyEntry], path: Path, *, read_s: float, engine_s: float) -> dict[str, Any]:
    """Output tokens/s from the table's first byte read to the answers' last one written: each row once, as in the accuracy run."""
    began = time.monotonic()
    ids = [list(entry.token_ids) for entry in sorted(entries, key=lambda entry: entry.index)]
    texts = rows.renderer.decode(ids, skip_special_tokens=True)
    pq.write_table(pa.table({"completion": texts, "completion_tokens": [len(one) for one in ids]}), path)
    seconds = {"read_s": read_s, "engine_s": engine_s, "write_s": time.monotonic() - began}
    tokens_per_second = sum(map(len, ids)) / sum(seconds.values())
    return {"tokens_per_second": round(tokens_per_second, 1), **{name: round(value, 3) for name, value in seconds.items()}}


def _sha256(accepted: Accepted) -> str:
    """Of the input's bytes, object after object."""
    digest = hashlib.sha256()
    for uri in accepted.plan.objects:
        with storage.open_read(uri) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
