"""infra/ and jobs/ agree: what the templates print is a job file's cluster, and what submit then asks for is what they have made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.submission import requests_of
from pipeline import storage
from pipeline import tls
from schemas.job import JobSpec
from schemas.job import parse_job
from tests.infra.deployment import Deployed
from tests.infra.deployment import deploy_file
from tests.infra.invariants import POOL
from tests.infra.invariants import ROLES
from tests.infra.invariants import SCALE_SET

pytestmark = pytest.mark.batch
_ROOT = Path(__file__).resolve().parents[2]
_VALUES = {"TOKENMILL_BATCH_SERVICE": "0" * 36, "TOKENMILL_OPERATORS": "1" * 36, "TOKENMILL_SSH_PUBLIC_KEY": "ssh-ed25519 AAAA test"}
_NOW = 1_800_000_000.0


def made(environment: str = "prod", **instead: Any) -> Deployed:
    return deploy_file(_ROOT / "infra" / "environments" / f"{environment}.bicepparam", _VALUES, **instead)


def job_on(deployed: Deployed) -> JobSpec:
    """As README.md there has it: the two printed sections, and the containers that were made."""
    return parse_job(
        {
            "name": "nightly",
            "model": "az://models/llama",
            "input": {"uri": "az://input/*.parquet", "prompt": "question"},
            "output": {"uri": "az://output/nightly"},
            "cluster": deployed.outputs["cluster"],
            "storage": deployed.outputs["storage"],
        }
    )


def asked(deployed: Deployed) -> dict[str, Any]:
    try:
        return requests_of(job_on(deployed), _NOW)
    finally:
        storage.use(None)


def bodies(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from bodies(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from bodies(inner)


def may(deployed: Deployed, principal: str) -> set[tuple[str, str]]:
    """Roles of an identity, each with the last name of what it is on."""
    given = [one for one in deployed.of("Microsoft.Authorization/roleAssignments") if one.body["properties"]["principalId"] == principal]
    return {(ROLES[one.body["properties"]["roleDefinitionId"].rsplit("/", 1)[-1]][0], one.scope.rsplit("/", 1)[-1]) for one in given}


@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_a_job_with_the_printed_sections_is_accepted(environment: str) -> None:
    cluster = job_on(made(environment)).cluster
    assert (cluster.kind, cluster.driver_pool, cluster.worker_pool) == ("azure-batch", "drivers", "workers")


def test_the_printed_cluster_of_arm64_nodes_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = made(workerSize="Standard_ND128isr_GB300_v6")
    monkeypatch.chdir(tmp_path)
    tls.make_keys("keys", valid_days=1)
    job = job_on(deployed)
    keys, rendezvous = str(job.cluster.keys), str(job.cluster.rendezvous)
    assert job.cluster.kind == "address"
    tls.check_apart(keys, [job.output.uri, rendezvous])  # what `tokenmill run` does with them first
    assert tls.security(keys).require_encryption
    assert deployed.outputs["scaleSetName"] == deployed.of(SCALE_SET)[0].name


@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_submit_asks_for_pools_images_and_identities_that_there_are(environment: str) -> None:
    deployed = made(environment)
    pools = {one.name.split("/")[-1]: one.body for one in deployed.of(POOL)}
    requests = asked(deployed)
    everything = list(bodies([requests["sent_by_submit"], requests["sent_by_driver"]]))
    assert {one["poolInfo"]["poolId"] for one in everything if "poolInfo" in one} == set(pools)
    identities = {one["identityReference"]["resourceId"] for one in everything if "identityReference" in one}
    images = {one["containerSettings"]["imageName"] for one in everything if "containerSettings" in one}
    for pool in pools.values():
        assert identities == set(pool["identity"]["userAssignedIdentities"])
        machine = pool["properties"]["deploymentConfiguration"]["virtualMachineConfiguration"]
        assert images == set(machine["containerConfiguration"]["containerImageNames"])
    slots = [one["requiredSlots"] for one in everything if "requiredSlots" in one]
    assert max(slots) <= min(pool["properties"]["taskSlotsPerNode"] for pool in pools.values())


def test_submit_asks_for_no_more_nodes_than_the_pool_may_have() -> None:
    deployed = made(maxWorkers=3)
    tasks = [one for one in bodies(asked(deployed)["sent_by_driver"]) if str(one.get("id", "")).startswith("node-")]
    workers = next(one for one in deployed.of(POOL) if one.name.endswith("/workers"))
    assert f"min({len(tasks)}, max(0, " in workers.body["properties"]["scaleSettings"]["autoScale"]["formula"]


def test_tasks_find_the_disk_that_the_start_task_makes() -> None:
    deployed = made(scratch="/mnt/fast")
    mounts = {one["containerRunOptions"] for one in bodies(asked(deployed)) if "containerRunOptions" in one}
    assert all("--volume /mnt/fast:/mnt/fast" in options for options in mounts)
    assert {one.body["properties"]["startTask"]["commandLine"] for one in deployed.of(POOL)} == {"tokenmill node-start /mnt/fast"}


def test_every_container_that_is_asked_for_is_there_and_the_nodes_may_use_it() -> None:
    deployed = made()
    account = deployed.outputs["storage"]["account_name"]
    there = {
        one.name.split("/")[-1] for one in deployed.of("Microsoft.Storage/storageAccounts/blobServices/containers") if not one.existing
    }
    asked_for = set(re.findall(rf"az://([\w-]+)|https://{account}\.blob\.core\.windows\.net/([\w-]+)", str(asked(deployed))))
    assert {first or second for first, second in asked_for} == there
    (identity,) = [one for one in deployed.of("Microsoft.ManagedIdentity/userAssignedIdentities") if one.name.endswith("-nodes")]
    principal = next(one for one in roles_of(deployed) if ("AcrPull", account) in may(deployed, one))
    assert may(deployed, principal) == {
        ("Storage Blob Data Reader", "input"),
        ("Storage Blob Data Reader", "models"),
        ("Storage Blob Data Contributor", "output"),
        ("Storage Blob Data Contributor", "keys"),
        ("AcrPull", account),
        ("Azure Batch Job Submitter", account),
    }
    assert identity.id == deployed.outputs["cluster"]["identity"]


def test_who_submits_jobs_cannot_read_their_keys() -> None:
    roles = may(made(), _VALUES["TOKENMILL_OPERATORS"])
    assert ("Azure Batch Job Submitter", made().outputs["storage"]["account_name"]) in roles
    assert [role for role in roles if role[1] == "keys"] == []


def test_operators_hand_out_keys_only_where_there_is_a_scale_set() -> None:
    operators = _VALUES["TOKENMILL_OPERATORS"]
    with_set, without = (may(made(workerSize=size), operators) for size in ("Standard_ND128isr_GB300_v6", "Standard_ND96isr_H100_v5"))
    assert with_set - without == {("Storage Blob Data Contributor", "cluster-keys")}
    assert [role for role in with_set if role[1] == "keys"] == []


def test_workers_of_a_scale_set_submit_nothing_and_write_only_completions() -> None:
    deployed = made(workerSize="Standard_ND128isr_GB300_v6")
    (of_set,) = [roles for one in roles_of(deployed) if ("Storage Blob Data Reader", "cluster-keys") in (roles := may(deployed, one))]
    assert {role for role in of_set if role[1] == "keys"} == set()  # those are jobs'
    assert {role for role in of_set if role[0] == "Storage Blob Data Contributor"} == {("Storage Blob Data Contributor", "output")}
    assert not [role for role in of_set if "Batch" in role[0]]


def roles_of(deployed: Deployed) -> set[str]:
    return {one.body["properties"]["principalId"] for one in deployed.of("Microsoft.Authorization/roleAssignments")}


def test_every_profile_of_an_nd_size_can_be_deployed_and_each_size_has_one() -> None:
    nodes = [yaml.safe_load(path.read_text()).get("node") for path in sorted((_ROOT / "pipeline" / "profiles").glob("nd*.yaml"))]
    sizes = {node["vm_size"]: node["architecture"] for node in nodes}
    assert len(sizes) == 7
    for size, architecture in sizes.items():
        deployed = made(workerSize=size)
        assert bool(deployed.of(SCALE_SET)) == (architecture != "x86_64"), size
    with pytest.raises(Exception, match="allowed are") as refused:
        made(workerSize="Standard_ND96isr_H100_v6")
    assert set(re.findall(r"Standard_\w+", str(refused.value))) - {"Standard_ND96isr_H100_v6"} == set(sizes)
