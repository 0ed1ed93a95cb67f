"""What a job file may say of Azure Batch."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from schemas.batch import ScheduleSpec
from schemas.batch import check_endpoint
from schemas.batch import container_of
from schemas.batch import duration
from schemas.errors import JobError
from schemas.job import parse_job
from tests.jobs.batch_jobs import batch_job


def refusal(**sections: Any) -> str:
    with pytest.raises(JobError) as refused:
        parse_job(batch_job(**sections))
    return str(refused.value)


def test_a_whole_job_is_accepted() -> None:
    job = parse_job(batch_job(schedule={"every": "1d", "first": "2026-12-01T02:30:00+01:00"}))
    assert job.cluster.nodes == 2
    assert job.schedule is not None
    assert parse_job(job.model_dump(by_alias=True, exclude_unset=True, mode="json")) == job  # as it lies in the output


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"cluster": {"image": None, "keys": None}}, "kind azure-batch also needs image, keys"),
        ({"cluster": {"replicas": 8}}, "takes as many replicas as the nodes run"),
        ({"cluster": {"address": "tls://10.0.0.4:8786"}}, "address: only kind: address takes it, found kind: azure-batch"),
        ({"cluster": {"insecure": True}}, "insecure: only kind: address takes it"),
        ({"cluster": {"driver_pool": "a b"}}, "cluster.driver_pool"),
        ({"cluster": {"identity": "nodes"}}, "cluster.identity"),
        ({"cluster": {"nodes": 0}}, "cluster.nodes"),
        ({"cluster": {"max_hours": 1000}}, "cluster.max_hours"),
        ({"cluster": {"endpoint": "https://evil.example"}}, "expected https://ACCOUNT.REGION.batch.azure.com"),
        ({"cluster": {"pool": "x"}}, "cluster.pool: unknown key"),
        ({"cluster": {"keys": "az://results/keys"}}, "whoever may read that could run code on every node"),
        ({"cluster": {"keys": "/home/me/keys"}}, "nodes of Azure Batch do not have this machine's files"),
        ({"input": {"uri": "in/*.parquet"}}, "input.uri is in/*.parquet: nodes of Azure Batch do not have"),
        ({"output": {"uri": "s3://x/y"}}, "output.uri is s3://x/y"),
        ({"model": "models/llama"}, "model is models/llama"),
        ({"storage": {"credential": {"kind": "account_key", "env": "KEY"}}}, "nodes of Azure Batch have an identity and no keys"),
        ({"schedule": {"every": "30s"}}, "expected minutes, hours or days of at least one minute"),
        ({"schedule": {"every": "1h", "window": "2h"}}, "longer than every"),
        ({"schedule": {"every": "1h", "first": "tomorrow"}}, "expected a moment with its time zone"),
        ({"schedule": {"every": "1h", "first": "2026-12-01T02:30:00"}}, "schedule.first"),
        ({"schedule": {"every": "1h", "first": "2026-12-01T02:30:00Z", "until": "2026-12-01T02:00:00Z"}}, "nothing would ever run"),
        ({"schedule": {"cron": "0 3 * * *"}}, "schedule.cron: unknown key"),
    ],
)
def test_what_cannot_work_is_refused(sections: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**sections)


def test_a_path_of_the_image_and_the_demo_are_models_too() -> None:
    assert parse_job(batch_job(model="/models/llama")).model == "/models/llama"
    assert parse_job(batch_job(model="demo")).model == "demo"


def test_other_kinds_take_none_of_it() -> None:
    with pytest.raises(JobError, match="nodes: only kind: azure-batch takes it, found kind: local"):
        parse_job({"model": "m", "input": {"uri": "a", "prompt": "b"}, "output": {"uri": "c"}, "cluster": {"nodes": 2}})


@pytest.mark.parametrize("host", ["mill.westeurope.batch.azure.com", "mill.chinaeast2.batch.chinacloudapi.cn", "127.0.0.1:8443"])
def test_tokens_go_to_azure_batch_alone(host: str) -> None:
    assert check_endpoint(f"https://{host}/") == f"https://{host}"


@pytest.mark.parametrize(
    "url",
    ["http://mill.westeurope.batch.azure.com", "https://batch.azure.com.evil.example", "https://a@mill.westeurope.batch.azure.com", "x"],
)
def test_any_other_place_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected https://ACCOUNT"):
        check_endpoint(url)


def test_containers_are_told_apart() -> None:
    assert container_of("az://results/night") == "/results"
    assert container_of("abfss://results@mill.dfs.core.windows.net/night") == "mill/results"
    assert container_of("/results/night") is None


def test_lengths_of_time() -> None:
    assert [duration(text) for text in ("30m", "6h", "1d")] == [timedelta(minutes=30), timedelta(hours=6), timedelta(days=1)]
    assert ScheduleSpec(every="1d").first is None
