"""A node and a device of the user's own: what plan, run and tune make of the files, and what the node costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from jobs.accept import accept
from jobs.api import plan
from jobs.api import run
from jobs.caps import caps_of
from jobs.estimate import cut_remarks
from jobs.estimate import offers
from jobs.forecast import forecast
from jobs.lengths import Lengths
from jobs.lengths import Mean
from pipeline.hardware import find_profile
from pipeline.hardware import profile_text
from pipeline.model import resolve_model
from pipeline.profile import load_profile
from pipeline.profile import node_kind
from pipeline.profile import this_machine
from pipeline.shape import known_shape
from pipeline.tuned import engine_package
from pipeline.tuned import save_tuned
from pipeline.tuning import Setting
from pipeline.tuning import profile_of
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.tuned import Tuned

MakeJob = Callable[..., JobSpec]


@pytest.fixture(autouse=True)
def table(write_table: Callable[..., Path]) -> None:
    write_table(pa.table({"prompt": [f"question {row}" for row in range(64)]}))


def own_size(folder: Path, name: str = "mine", *, price: float | None = 7.0, **options: Any) -> Path:
    """Two devices nobody knows but the file beside it."""
    size = yaml.safe_load(profile_text("nd96isr-h100-v5"))
    size["node"] |= {"vm_size": None, "device": "oddity", "devices": 2}
    size["node"]["price"] = size["node"]["price"] | {"usd_per_hour": price} if price else None
    size["options"] |= options
    device = yaml.safe_load((Path("pipeline/devices") / "h100-80.yaml").read_text()) | {"description": "An oddity"}
    (folder / "oddity.yaml").write_text(yaml.safe_dump(device))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(size))
    return folder / f"{name}.yaml"


def vllm_job(make_job: MakeJob, profile: Path | str, **sections: Any) -> JobSpec:
    return make_job(engine={"kind": "vllm", "options": {}, "profile": str(profile)}, cluster={"kind": "local"}, **sections)


def test_run_and_plan_find_the_device_beside_the_profile(make_job: MakeJob, tmp_path: Path) -> None:
    job = vllm_job(make_job, own_size(tmp_path))
    cut = accept(job).cut
    assert cut is not None
    assert (cut.profile, cut.replicas) == ("mine", 2)
    (offer,) = [offer for offer in forecast(plan(job), nodes=(1,)).offers if offer.profile == "mine"]
    assert offer.usd is not None
    assert offer.replicas == 2
    assert offer.usd.value == pytest.approx(7.0 * offer.hours.value)


@pytest.mark.parametrize("name", ["mine", "nd96isr-h100-v5"])
def test_a_node_costs_what_its_own_file_says(make_job: MakeJob, tmp_path: Path, name: str) -> None:
    job = vllm_job(make_job, own_size(tmp_path, name), limits={"max_cost_usd": 10.0})
    assert accept(job).usd_per_hour == 7.0
    assert caps_of(job.limits, profile_usd_per_hour=accept(job).usd_per_hour, now=datetime.now(UTC)).usd_per_hour == 7.0


def test_a_clusters_nodes_cost_what_the_jobs_profile_says(make_job: MakeJob, tmp_path: Path) -> None:
    cluster = {"kind": "address", "address": "tcp://10.0.0.4:8786", "insecure": True}
    for profile, expected in ((str(own_size(tmp_path)), 7.0), ("auto", None), ("on-the-nodes.yaml", None)):
        job = make_job(engine={"kind": "vllm", "options": {}, "profile": profile}, cluster=cluster)
        assert accept(job).usd_per_hour == expected


def test_a_run_with_a_cap_and_no_price_anywhere_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"limits\.max_cost_usd: nobody knows what a node costs here"):
        run(vllm_job(make_job, own_size(tmp_path, "nd96isr-h100-v5", price=None), limits={"max_cost_usd": 10.0}))


def test_the_jobs_own_price_wins(make_job: MakeJob, tmp_path: Path) -> None:
    assert accept(vllm_job(make_job, own_size(tmp_path), limits={"usd_per_hour": 3.0})).usd_per_hour == 3.0


def test_a_tuned_profile_keeps_price_and_device(
    make_job: MakeJob, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    model = resolve_model(str(tiny_model))
    tuned = profile_of(
        Setting(model=model.weights_digest, replicas=1, options=(("max_num_seqs", 17),)), find_profile(str(own_size(tmp_path)))
    )
    save_tuned(
        Tuned(
            weights=model.weights_digest, node=node_kind(this_machine()), engine=engine_package(), profile=tuned, rows=8, trials=1,
            made_at="2026-11-25T18:00:00+00:00", output_tokens_per_s=1.0,
        )
    )  # fmt: skip
    (tmp_path / "oddity.yaml").unlink()
    accepted = accept(vllm_job(make_job, "auto"))
    assert accepted.cut is not None
    assert (accepted.cut.profile, accepted.cut.options["max_num_seqs"], accepted.usd_per_hour) == ("mine-tuned", 17, 7.0)


def test_a_context_cut_short_by_memory_is_said_and_kept_for_the_job(make_job: MakeJob, tiny_model: Path, tmp_path: Path) -> None:
    model = resolve_model(str(tiny_model))
    room = int(1.06 * 256 * model.kv_values_per_token)  # of FP8
    job = vllm_job(make_job, own_size(tmp_path, kv_cache_memory_bytes=room))
    accepted = accept(job)
    assert accepted.cut is not None
    assert accepted.cut.options["max_model_len"] == 256
    assert f"may have 256 tokens of the model's {model.max_position_embeddings:,}" in accepted.cut.found
    assert accepted.record.decides["engine"]["found"]["max_model_len"] == 256
    whole = accept(vllm_job(make_job, load_profile("local-cpu", this_machine()).name))
    assert "max_model_len" not in whole.record.decides["engine"]["found"]


def mean(value: float) -> Mean:
    return Mean(value=value, low=value, high=value)


def test_a_plan_says_where_rows_are_so_long_that_another_cut_is_quicker() -> None:
    shape = replace(known_shape("llama-3.1-70b"), precision="fp8")
    size = [find_profile("nd96isr-h200-v5")]
    short = Lengths(rows=1000, sampled=512, prompt=mean(500), output=mean(200), basis="history")
    long = replace(short, prompt=mean(9_000), output=mean(2_000))
    for lengths, said in ((short, False), (long, True)):
        found = offers(lengths, shape, size, nodes=(1,))
        assert found[0].devices_per_replica == 1  # as a run cuts it
        assert bool(cut_remarks(found)) is said
    (wider,) = offers(long, shape, size, nodes=(1,), options={"tensor_parallel_size": 2})
    (taken,) = offers(long, shape, size, nodes=(1,))
    assert taken.wider is not None
    assert (wider.devices_per_replica, cut_remarks([wider])) == (2, [])
    assert wider.output_tokens_per_s == pytest.approx(taken.wider[1] * taken.output_tokens_per_s)
