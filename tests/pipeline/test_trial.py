"""Engines alone in processes of their own: real processes, the simulated engine, and once the real vLLM."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.engine.engine import Generation
from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.profile import cut_machine
from pipeline.trial import Replicas
from pipeline.trial import TrialProgress
from pipeline.trial import run_trial
from schemas.errors import EngineDead
from schemas.errors import EngineError
from schemas.errors import EngineStartError
from schemas.job import EngineSpec
from schemas.job import SimulatedOptions
from schemas.sampling import Sampling

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tiny_model: Path) -> Model:
    return resolve_model(str(tiny_model))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert trial_processes() == []


def trial_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "pipeline.trial_worker" in child.cmdline()]


def simulated(replicas: int = 1, environment: dict[str, str] | None = None, **options: Any) -> ReplicaPlan:
    rates = {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, **options}
    return ReplicaPlan(
        profile="simulated", replicas=replicas, options=SimulatedOptions(**rates).model_dump(), environment=environment or {}
    )


def requests_of(num_rows: int, length: int = 8, **sampling: Any) -> list[Request]:
    chosen = Sampling(max_tokens=length, ignore_eos=True, **sampling)
    return [Request(position=100 + row, token_ids=[0, *([10 + row % 200] * (row % 5 + 1))], sampling=chosen) for row in range(num_rows)]


def test_every_row_is_generated_once_as_long_as_it_was_asked_for(model: Model) -> None:
    requests = requests_of(41)
    result = run_trial(simulated(replicas=2), model, "simulated", requests, timeout_s=60, keep=True)
    assert sorted(result.generations) == [request.position for request in requests]
    assert {len(generation.choices[0].token_ids) for generation in result.generations.values()} == {8}
    assert (result.rows, result.output_tokens) == (41, 8 * 41)
    assert result.prompt_tokens == sum(len(request.token_ids) for request in requests)
    assert [replica.rows for replica in result.replicas] == [21, 20]
    assert not result.stopped
    assert result.total_tokens_per_s > result.output_tokens_per_s > 0
    assert max(replica.seconds for replica in result.replicas) <= result.elapsed_s


def test_generations_are_not_carried_around_unless_they_are_wanted(model: Model) -> None:
    assert run_trial(simulated(), model, "simulated", requests_of(5), timeout_s=60).generations == {}


def test_warm_replicas_run_round_after_round_and_repeat_themselves(model: Model) -> None:
    rounds: list[dict[int, Generation]] = []
    with Replicas(simulated(replicas=2), model, "simulated", timeout_s=60) as replicas:
        pids = {process.pid for process in trial_processes()}
        rounds += [replicas.run(requests_of(9), timeout_s=60, keep=True).generations for _ in range(2)]
        assert {process.pid for process in trial_processes()} == pids
        assert set(replicas.infos) == set(replicas.start_seconds) == {"replica-0", "replica-1"}
    assert len(pids) == 2
    assert rounds[0] == rounds[1]


def test_finished_rows_are_handed_on_as_they_come(model: Model) -> None:
    with Replicas(simulated(max_num_seqs=2), model, "simulated", timeout_s=60) as replicas:
        heard: list[list[Generation]] = []
        result = replicas.run(requests_of(10), timeout_s=60, keep=True, on_finished=heard.append)
    assert len(heard) > 1
    assert {item.position: item for items in heard for item in items} == result.generations


def test_sampling_and_seed_reach_the_engine(model: Model) -> None:
    sampled = Request(position=0, token_ids=[0, 9], sampling=Sampling(max_tokens=6, temperature=1.0, n=3, min_tokens=2), seed=5)
    other = Request(position=1, token_ids=[0, 9], sampling=sampled.sampling, seed=6)
    generations = run_trial(simulated(), model, "simulated", [sampled, other], timeout_s=60, keep=True).generations
    assert [len(generations[position].choices) for position in (0, 1)] == [3, 3]
    assert generations[0].choices != generations[1].choices


def test_it_stops_early_and_tells_the_tokens_so_far(model: Model) -> None:
    slow = simulated(decode_tokens_per_s=200, max_num_seqs=4)
    with Replicas(slow, model, "simulated", timeout_s=60) as replicas:
        result = replicas.run(requests_of(8, length=400), timeout_s=60, stop_after_s=1.0)
        assert result.stopped
        assert result.rows == 0
        assert 0 < result.output_tokens < 8 * 400
        assert result.prompt_tokens == sum(len(request.token_ids) for request in requests_of(4))  # the others never began
        again = replicas.run(requests_of(4, length=2), timeout_s=60, keep=True)
    assert (again.rows, again.stopped) == (4, False)
    assert sorted(again.generations) == [100, 101, 102, 103]


def test_whoever_watches_may_stop_it(model: Model) -> None:
    heard: list[TrialProgress] = []

    def watch(progress: TrialProgress) -> bool:
        heard.append(progress)
        return len(heard) < 2

    slow = simulated(replicas=2, decode_tokens_per_s=100)
    with Replicas(slow, model, "simulated", timeout_s=60) as replicas:
        result = replicas.run(requests_of(8, length=400), timeout_s=60, on_progress=watch)
        assert result.stopped
        assert len(heard) == 2
        assert heard[1].output_tokens > 0
        assert replicas.run(requests_of(2, length=1), timeout_s=60).rows == 2


def test_the_plan_is_what_a_replica_is_started_with(model: Model, tmp_path: Path) -> None:
    plan = ReplicaPlan(
        profile="simulated",
        replicas=2,
        options=SimulatedOptions().model_dump(),
        environment={"MALLOC_ARENA_MAX": "7"},
        device_environments=({"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}),
    )
    with Replicas(plan, model, "simulated", timeout_s=60):
        found = [process.environ() for process in trial_processes()]
    assert {environment["MALLOC_ARENA_MAX"] for environment in found} == {"7"}
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in found} == {"3", "5"}


@pytest.mark.parametrize(("bare", "arenas"), [(False, "2"), (True, None)])
def test_a_bare_plan_gets_nothing_of_our_own_environment(model: Model, bare: bool, arenas: str | None) -> None:
    with Replicas(replace(simulated(), bare=bare), model, "simulated", timeout_s=60):
        (process,) = trial_processes()
        assert process.environ().get("MALLOC_ARENA_MAX") == arenas


def test_a_replica_that_does_not_start_is_an_error_with_its_cause(model: Model) -> None:
    plan = ReplicaPlan(profile="simulated", replicas=2, options={"decode_tokens_per_s": -1})
    with pytest.raises(EngineStartError, match=r"(?s)replica-\d: .*decode_tokens_per_s"):
        run_trial(plan, model, "simulated", requests_of(1), timeout_s=60)


def test_a_start_that_takes_too_long_is_an_error(model: Model) -> None:
    with pytest.raises(EngineStartError, match="not ready within the time limit"):
        run_trial(simulated(start_s=60), model, "simulated", requests_of(1), timeout_s=1)


def test_a_replica_that_dies_is_an_error_with_its_cause(model: Model) -> None:
    deadly = [*requests_of(4), Request(position=1, token_ids=[0, 250], sampling=Sampling(max_tokens=4))]
    with pytest.raises(EngineDead, match="replica-0: its process ended with signal SIGABRT"):
        run_trial(simulated(replicas=2, dies_on_token=250), model, "simulated", deadly, timeout_s=60)


def test_a_replica_that_hangs_is_ended_when_the_time_is_over(model: Model) -> None:
    deadly = [Request(position=1, token_ids=[0, 250], sampling=Sampling(max_tokens=4))]
    with (
        Replicas(simulated(hangs_on_token=250), model, "simulated", timeout_s=60) as replicas,
        pytest.raises(EngineDead, match="not done within the time limit"),
    ):
        replicas.run(deadly, timeout_s=5)


def test_a_row_that_the_engine_refuses_is_named(model: Model) -> None:
    too_long = Request(position=77, token_ids=[5] * 600, sampling=Sampling())
    with pytest.raises(EngineError, match="row 77: 600 tokens, limit 511"):
        run_trial(simulated(), model, "simulated", [*requests_of(3), too_long], timeout_s=60)


def test_replicas_end_when_whoever_watches_them_fails(model: Model) -> None:
    def fail(progress: TrialProgress) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_trial(simulated(decode_tokens_per_s=50), model, "simulated", requests_of(4, length=400), timeout_s=60, on_progress=fail)


def test_replicas_end_with_a_process_that_is_killed(model: Model, tmp_path: Path) -> None:
    ready, done = os.pipe()
    child = os.fork()
    if not child:
        try:
            replicas = Replicas(simulated(replicas=2), model, "simulated", timeout_s=60)
            os.write(done, " ".join(str(member.pid) for member in psutil.Process().children()).encode())
            replicas.run(requests_of(4, length=400), timeout_s=600, on_progress=lambda _: None)
            signal.pause()
        finally:
            os._exit(1)
    pids = [int(pid) for pid in os.read(ready, 1000).split()]
    os.close(ready)
    os.close(done)
    processes = [psutil.Process(pid) for pid in pids]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(pids) == 2
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


@pytest.mark.engine
@pytest.mark.long
def test_two_real_engines_generate_what_one_does(model: Model, tmp_path: Path) -> None:
    engine = EngineSpec(options={"max_num_seqs": 8, "max_model_len": 256, "kv_cache_memory_bytes": 32 << 20})
    requests = [
        Request(position=row, token_ids=[0, *(5 + (row * 31 + step * 17) % 250 for step in range(9))], sampling=Sampling(max_tokens=12))
        for row in range(16)
    ]
    two = run_trial(cut_machine(engine, model, replicas=2), model, "vllm", requests, timeout_s=240, keep=True)
    assert (two.rows, len(two.generations), two.stopped) == (16, 16, False)
    assert [replica.engine.kind for replica in two.replicas] == ["vllm", "vllm"]
    with Replicas(cut_machine(engine, model, replicas=1), model, "vllm", timeout_s=240) as replicas:
        begun = replicas.run(requests, timeout_s=60, stop_after_s=0.0)
        assert (begun.stopped, begun.rows) == (True, 0)
        one = replicas.run(requests, timeout_s=60, keep=True)
    assert one.generations == two.generations
