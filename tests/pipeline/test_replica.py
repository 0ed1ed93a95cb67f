"""A replica runs units of jobs on its own model only."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.accept import Accepted
from jobs.accept import accept
from jobs.accept import store
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.replica import Replica
from pipeline.replica import unit_tag
from pipeline.replica import wrong_replica
from schemas.errors import UnitError
from schemas.job import JobSpec
from tests.conftest import build_tiny_model

_OPTIONS = {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7}


@pytest.fixture
def accepted(write_table: Callable[..., Path], make_job: Callable[..., JobSpec]) -> Accepted:
    write_table([{"prompt": "one"}, {"prompt": "two"}])
    return store(accept(make_job()))


@pytest.fixture
def make_replica() -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(model: Model, **options: float) -> Replica:
        made.append(Replica(name="node-0", model=model, kind="simulated", options={**_OPTIONS, **options}))
        return made[-1]

    yield make
    for replica in made:
        replica.close()


def test_the_jobs_own_model_is_right(accepted: Accepted) -> None:
    assert wrong_replica(accepted.record.decides, accepted.model, "simulated", "none") is None


@pytest.mark.parametrize("field", ["weights_digest", "tokenizer_digest", "template_digest"])
def test_any_other_digest_is_wrong(accepted: Accepted, field: str) -> None:
    other = replace(accepted.model, **{field: "0123456789abcdef"})
    found = wrong_replica(accepted.record.decides, other, "simulated", "none")
    assert found is not None
    assert "has digest 01234567, expected " in found
    assert accepted.model.path in found


def test_another_engine_is_wrong(accepted: Accepted) -> None:
    assert wrong_replica(accepted.record.decides, accepted.model, "vllm", "none") == "it runs engine vllm, expected simulated"


def test_a_unit_of_a_job_on_another_model_is_refused_and_nothing_is_committed(
    accepted: Accepted, make_replica: Callable[..., Replica], tmp_path: Path
) -> None:
    other = make_replica(resolve_model(str(build_tiny_model(tmp_path / "other", template=False))))
    unit = accepted.todo[0].to_dict()
    with pytest.raises(UnitError, match=r"replica node-0 is not the one that this job needs: it holds .*; start it with the job's file"):
        other.run(accepted.out_uri, accepted.record.fingerprint, unit)
    assert list(Path(accepted.out_uri).glob("part-*")) == []
    right = make_replica(accepted.model)
    assert right.run(accepted.out_uri, accepted.record.fingerprint, unit)["outcome"] == "created"


@pytest.mark.slow
def test_a_unit_that_is_asked_for_again_while_it_is_in_flight_is_run_once(accepted: Accepted, make_replica: Callable[..., Replica]) -> None:
    """As after a scheduler was lost: the next one sends the unit anew, to a replica that never stopped."""
    replica = make_replica(accepted.model, decode_tokens_per_s=10)  # a second and more for the unit
    unit, fingerprint = accepted.todo[0], accepted.record.fingerprint
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(replica.run, accepted.out_uri, fingerprint, unit.to_dict())
        while not replica.engine.counters().in_flight:
            assert not first.done()
            time.sleep(0.01)
        assert replica.status()["units"] == [unit_tag(accepted.out_uri, fingerprint, unit.index)]
        second = replica.run(accepted.out_uri, fingerprint, unit.to_dict())
    assert second == first.result()
    assert second["outcome"] == "created"
    assert replica.status()["units"] == []
    assert replica.engine.counters().rows == unit.num_rows


def test_the_same_job_into_another_place_is_another_unit() -> None:
    assert unit_tag("a", "f", 1) != unit_tag("b", "f", 1)
    assert unit_tag("a", "f", 1) != unit_tag("a", "f", 2)


def test_a_replica_in_another_dtype_than_the_job_was_begun_in_is_told(accepted: Accepted) -> None:
    decides = {**accepted.record.decides, "engine": {"kind": "vllm", "options": {}, "found": {"dtype": "float32"}}}
    assert wrong_replica(decides, accepted.model, "vllm", "float32") is None
    said = "it computes in bfloat16, and the job was begun in float32 (--set engine.options.dtype=float32)"
    assert wrong_replica(decides, accepted.model, "vllm", "bfloat16") == said
    decides["engine"]["found"]["dtype"] = "auto"
    assert wrong_replica(decides, accepted.model, "vllm", "bfloat16") is None
