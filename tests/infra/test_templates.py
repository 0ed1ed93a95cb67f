"""infra/*.bicep, read by a real parser and worked out for each environment: what would be created is safe, and whole."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.storage import StorageSpec
from tests.infra import bicep
from tests.infra import invariants
from tests.infra.bicep import BicepError
from tests.infra.deployment import Deployed
from tests.infra.deployment import deploy_file
from tests.infra.deployment import undeclared

pytestmark = pytest.mark.batch
_INFRA = Path(__file__).resolve().parents[2] / "infra"
_TEMPLATES = sorted(_INFRA.rglob("*.bicep"))
_PARAMETERS = sorted(_INFRA.rglob("*.bicepparam"))
_ENVIRONMENT = {"TOKENMILL_BATCH_SERVICE": "0" * 36, "TOKENMILL_OPERATORS": "1" * 36, "TOKENMILL_SSH_PUBLIC_KEY": "ssh-ed25519 AAAA test"}
_OPERATORS = ["203.0.113.7", "198.51.100.0/24"]
_ND_SIZES = [
    "Standard_ND96asr_v4",
    "Standard_ND96amsr_A100_v4",
    "Standard_ND96isr_H100_v5",
    "Standard_ND96isr_H200_v5",
    "Standard_ND96isr_MI300X_v5",
    "Standard_ND128isr_NDR_GB200_v6",
    "Standard_ND128isr_GB300_v6",
]
_VARIANTS: dict[str, dict[str, Any]] = {
    "as it stands": {},
    "operators outside": {"operatorAddressRanges": _OPERATORS},
    "a way out": {"outboundInternet": True},
    "on demand": {"spotWorkers": False},
    **{size: {"workerSize": size, "scaleSetNodes": 2} for size in _ND_SIZES},
}
_CHECKS: dict[str, Callable[[Deployed], list[str]]] = {
    "no keys": invariants.no_keys,
    "identities": invariants.identities,
    "least roles": invariants.least_roles,
    "watched": invariants.watched,
    "private endpoints": invariants.private_endpoints,
    "pools": invariants.pools,
}
_FILE_CHECKS = [invariants.documented, invariants.unused, invariants.no_key_is_asked_for, undeclared]


def made(folder: Path = _INFRA, environment: str = "prod", **instead: Any) -> Deployed:
    return deploy_file(folder / "environments" / f"{environment}.bicepparam", _ENVIRONMENT, **instead)


def problems(folder: Path, **instead: Any) -> list[str]:
    """Everything that all checks find."""
    templates = [bicep.read(path) for path in sorted(folder.rglob("*.bicep"))]
    found = [problem for check in _FILE_CHECKS for template in templates for problem in check(template)]
    deployed = made(folder, **instead)
    found += invariants.no_public_access(deployed, instead.get("operatorAddressRanges", []))
    return found + [problem for check in _CHECKS.values() for problem in check(deployed)]


def test_there_are_templates_and_an_environment_to_try_and_one_to_use() -> None:
    assert {path.name for path in _TEMPLATES} > {"main.bicep", "pool.bicep", "scale-set.bicep"}
    assert {path.stem for path in _PARAMETERS} == {"dev", "prod"}


@pytest.mark.parametrize("check", _FILE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", _TEMPLATES, ids=lambda path: path.stem)
def test_every_file_is_documented_uses_what_it_declares_and_asks_for_no_key(path: Path, check: Callable[[Any], list[str]]) -> None:
    assert check(bicep.read(path)) == []


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_nothing_that_is_created_can_be_reached_from_the_internet(environment: str, variant: str) -> None:
    instead = _VARIANTS[variant]
    assert invariants.no_public_access(made(environment=environment, **instead), instead.get("operatorAddressRanges", [])) == []


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("check", _CHECKS)
def test_what_is_created_holds_to_the_rules(check: str, variant: str) -> None:
    assert _CHECKS[check](made(**_VARIANTS[variant])) == []


def test_every_module_is_used() -> None:
    used = {(path.parent / one.type).resolve() for path in _TEMPLATES for one in bicep.read(path).of("module")}
    assert used == set(_TEMPLATES) - {_INFRA / "main.bicep"}


def test_the_sizes_are_those_of_the_issue() -> None:
    assert _allowed("main.bicep", "workerSize") == _ND_SIZES


def test_arm64_sizes_go_to_the_scale_set_and_all_others_to_batch() -> None:
    arm64 = [size for size in _ND_SIZES if "_GB" in size]
    for size in _ND_SIZES:
        deployed = made(workerSize=size)
        pools = {one.name.split("/")[-1]: one.body["properties"]["vmSize"] for one in deployed.of(invariants.POOL)}
        sets = [one.body["sku"]["name"] for one in deployed.of(invariants.SCALE_SET)]
        assert (pools.get("workers"), sets) == ((None, [size]) if size in arm64 else (size, []))
        assert pools["drivers"].startswith("Standard_D")


@pytest.mark.parametrize(("spot", "target"), [(True, "$TargetLowPriorityNodes"), (False, "$TargetDedicatedNodes")])
def test_workers_are_as_many_as_tasks_wait_or_run_up_to_the_limit(spot: bool, target: str) -> None:
    workers = next(one for one in made(spotWorkers=spot, maxWorkers=7).of(invariants.POOL) if one.name.endswith("/workers"))
    formula = workers.body["properties"]["scaleSettings"]["autoScale"]["formula"]
    assert formula.split("; ")[-2:] == [f"{target} = min(7, max(0, ($tasks + 0) / 1))", "$NodeDeallocationOption = taskcompletion;"]
    assert formula.count("$Target") == 1


def test_a_larger_driver_node_takes_several_jobs() -> None:
    drivers = next(one for one in made().of(invariants.POOL) if one.name.endswith("/drivers"))
    assert drivers.body["properties"]["taskSlotsPerNode"] == 4
    assert (
        "$TargetDedicatedNodes = min(4, max(0, ($tasks + 3) / 4));" in drivers.body["properties"]["scaleSettings"]["autoScale"]["formula"]
    )


@pytest.mark.parametrize("where", ["accountAccess", "nodeManagementAccess"])
def test_where_operators_come_from_outside_batch_lets_in_nobody_else(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "infra"
    shutil.copytree(_INFRA, folder)
    file = folder / "modules" / "batch-account.bicep"
    text = file.read_text()
    begin = text.index(where)
    file.write_text(text[:begin] + text[begin:].replace("defaultAction: 'Deny'", "defaultAction: 'Allow'", 1))
    assert problems(folder) == []
    assert len(problems(folder, operatorAddressRanges=_OPERATORS)) == 1


def test_without_the_batch_services_id_nothing_is_deployed() -> None:
    with pytest.raises(BicepError, match="TOKENMILL_BATCH_SERVICE"):
        deploy_file(_INFRA / "environments" / "prod.bicepparam", {})
    with pytest.raises(BicepError, match="batchServiceObjectId"):
        made(batchServiceObjectId="not-an-id")


@pytest.mark.parametrize("size", _ND_SIZES)
@pytest.mark.parametrize("prefix", ["ab", "abcdefgh"])
def test_the_shortest_and_the_longest_prefix_fit_into_every_name(prefix: str, size: str) -> None:
    deployed = made(namePrefix=prefix, workerSize=size, scaleSetNodes=2)
    for one in deployed.of(invariants.SCALE_SET):
        assert one.name == deployed.outputs["scaleSetName"] == f"{prefix}gb"
        assert len(one.body["properties"]["virtualMachineProfile"]["osProfile"]["computerNamePrefix"]) <= 9


def test_a_drivers_disk_takes_two_checkpoints_of_70_billion_parameters() -> None:
    """In BF16, 141 GB each. The sizes called ds_v5 have 37.5 GiB of local disk a core."""
    (size,) = [one.body["properties"]["vmSize"] for one in made().of(invariants.POOL) if one.name.endswith("/drivers")]
    cores = re.fullmatch(r"Standard_D(\d+)ds_v5", size)
    assert cores is not None
    assert int(cores.group(1)) * 37.5 * 2**30 > 2 * 141e9


def test_a_driver_node_can_be_kept_warm_and_a_gpu_node_cannot() -> None:
    formulas = {
        one.name.split("/")[-1]: one.body["properties"]["scaleSettings"]["autoScale"]["formula"]
        for one in made(warmDriverNodes=1).of(invariants.POOL)
    }
    assert "max(1, " in formulas["drivers"]
    assert "max(0, ($tasks" in formulas["workers"]


def test_the_way_out_is_open_only_where_it_is_asked_for() -> None:
    assert made().of("Microsoft.Network/natGateways") == []
    assert len(made(outboundInternet=True).of("Microsoft.Network/natGateways")) == 1
    for open_, expected in ((False, "Deny"), (True, "Allow")):
        groups = [one for one in made(outboundInternet=open_).of(invariants.RULES) if not one.name.startswith("tkm-prod-endpoint")]
        out = [
            rule["properties"]["access"] for one in groups for rule in one.body["properties"]["securityRules"] if "internet" in rule["name"]
        ]
        assert out == [expected, expected]


def cloud_init() -> dict[str, str]:
    """The files that a scale set's node gets, by path."""
    (nodes,) = made(workerSize="Standard_ND128isr_GB300_v6", scaleSetNodes=2).of(invariants.SCALE_SET)
    text = base64.b64decode(nodes.body["properties"]["virtualMachineProfile"]["osProfile"]["customData"]).decode()
    assert text.startswith("#cloud-config\n")
    return {one["path"]: one["content"] for one in yaml.safe_load(text)["write_files"]}


def test_cloud_init_is_filled_in_and_its_scripts_are_scripts() -> None:
    files = cloud_init()
    assert [path for path, content in files.items() if re.search(r"@[A-Z_]+@", content)] == []
    assert "--rendezvous az://output/cluster --keys az://cluster-keys/scale-set" in files["/etc/systemd/system/tokenmill-worker.service"]
    for path, content in files.items():
        if content.startswith("#!"):
            checked = subprocess.run(["bash", "-n"], input=content, text=True, capture_output=True, check=False)
            assert (checked.returncode, checked.stderr) == (0, ""), path


def test_a_node_of_the_scale_set_reads_storage_as_its_own_identity() -> None:
    lines = cloud_init()["/etc/tokenmill/environment"].splitlines()
    environment = dict(line.split("=", 1) for line in lines)
    recipe = StorageSpec.model_validate_json(environment["TOKENMILL_STORAGE"])
    assert (recipe.credential.kind, recipe.credential.client_id) == ("managed_identity", environment["AZURE_CLIENT_ID"])


def test_a_node_of_the_scale_set_pulls_with_its_identity_and_shows_no_token_to_others(tmp_path: Path) -> None:
    """The real script, with a curl and a docker that write down how they are called."""
    log = tmp_path / "log"
    curl = 'case "$*" in *169.254*) echo \'{"access_token": "entra"}\';; *) cat > /dev/null; echo \'{"refresh_token": "acr"}\';; esac'
    docker = f'[ "$1" != login ] || echo "password $(cat)" >> {log}'
    for name, does in (("curl", curl), ("docker", docker)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\n{does}\n')
        (tmp_path / name).chmod(0o755)
    script = cloud_init()["/usr/local/sbin/tokenmill-pull"]
    subprocess.run(["bash"], input=script, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, text=True, check=True)
    said = log.read_text().splitlines()
    (registry,) = {one.name for one in made().of(invariants.REGISTRY)}
    assert [line.split()[:2] for line in said if line.startswith("docker")] == [
        ["docker", "login"],
        ["docker", "pull"],
        ["docker", "logout"],
    ]
    assert f"docker pull {registry}.azurecr.io/tokenmill:0.1.0" in said
    assert "password acr" in said
    assert [line for line in said if not line.startswith("password") and re.search("entra$|entra |=entra|acr$", line)] == []


_MUTATIONS = [
    ("modules/storage.bicep", "allowSharedKeyAccess: false", "allowSharedKeyAccess: true", "allowSharedKeyAccess is True"),
    ("modules/storage.bicep", "allowBlobPublicAccess: false", "allowBlobPublicAccess: true", "allowBlobPublicAccess is not false"),
    ("modules/storage.bicep", "? 'Disabled' : 'Enabled'", "? 'Enabled' : 'Enabled'", "publicNetworkAccess is Enabled"),
    ("modules/storage.bicep", "defaultAction: 'Deny'", "defaultAction: 'Allow'", "otherwise does Allow"),
    ("modules/storage.bicep", "publicAccess: 'None'", "publicAccess: 'Blob'", "publicAccess is not None"),
    ("modules/registry.bicep", "adminUserEnabled: false", "adminUserEnabled: true", "adminUserEnabled is True"),
    ("modules/registry.bicep", "scope: registry", "", "registries tkmprod"),
    ("modules/batch-account.bicep", "      'AAD'\n", "      'AAD'\n      'SharedKey'\n", "allowedAuthenticationModes"),
    ("modules/vault.bicep", "publicNetworkAccess: 'Disabled'", "publicNetworkAccess: 'Enabled'", "vaults"),
    ("modules/logs.bicep", "disableLocalAuth: true", "disableLocalAuth: false", "disableLocalAuth"),
    ("modules/pool.bicep", "provision: 'NoPublicIPAddresses'", "provision: 'BatchManaged'", "public addresses"),
    ("modules/pool.bicep", "  identity: {\n    type: 'UserAssigned'", "  identity: {\n    type: 'None'", "its identity is"),
    (
        "modules/pool.bicep",
        "  identityReference: {\n    resourceId: identityId\n  }\n",
        "  username: 'me'\n  password: 'x'\n",
        "looks like a secret",
    ),
    ("modules/pool.bicep", "  '2204': 'batch.node.ubuntu 22.04'", "  '2204': 'batch.node.ubuntu 20.04'", "with agent"),
    ("modules/pool.bicep", "var target = spot ?", "var target = !spot ?", "drivers on nodes that may be taken away"),
    ("modules/pool.bicep", "= min(${maxNodes}, ", "= max(1, ", "does not shrink"),
    ("main.bicep", "    minNodes: 0", "    minNodes: 1", "1 GPU nodes stay without work"),
    ("modules/network.bicep", "sourceAddressPrefix: workerPrefix", "sourceAddressPrefix: 'Internet'", "lets in from everywhere"),
    ("modules/network.bicep", "    access: 'Deny'\n", "    access: 'Allow'\n", "does not deny everything"),
    ("modules/network.bicep", "          defaultOutboundAccess: false\n", "", "default way out"),
    ("modules/roles.bicep", "'48e5e92e-a480-4e71-aa9c-2778f4c13781'", "'b24988ac-6180-42a0-ab88-20f7382dd24c'", "expected no such role"),
    ("modules/roles.bicep", "scope: writableContainers[index]", "scope: storage", "is given on Microsoft.Storage/storageAccounts,"),
    ("modules/private-links.bicep", "part: 'nodeManagement'", "part: 'batchAccount'", "lacks private endpoints ['nodeManagement']"),
    ("main.bicep", "@description('Range of the drivers.')\n", "", "driverPrefix is described as ''"),
    ("main.bicep", "    taskSlots: 1", "    taskSlots: 8", "8 slots"),
    ("main.bicep", "output registryServer", "output key string = listKeys(storage.id, '1').keys[0]\noutput registryServer", "listKeys"),
    ("main.bicep", "@minLength(2)\n", "@secure()\n", "takes a secret"),
    ("main.bicep", "maxNodes: maxDriverNodes", "maxNodes: maxWorkers", "maxDriverNodes is not used"),
    ("main.bicep", "vaultId: vault.outputs.vaultId", "vaultId: vault.outputs.vaultIdentity", "has no vaultIdentity"),
    ("main.bicep", "    dailyCapGb: logDailyCapGb\n", "", "dailyCapGb is not given"),
    ("main.bicep", "    dailyCapGb: logDailyCapGb\n", "    dailyCap: logDailyCapGb\n", "has no parameter dailyCap"),
    ("main.bicep", "    dailyCapGb: logDailyCapGb\n", "    dailyCapGb: string(logDailyCapGb)\n", "expected int"),
    ("main.bicep", "module vault 'modules/vault.bicep'", "module vault 'modules/safe.bicep'", "there is no modules/safe.bicep"),
    ("main.bicep", "  scope: subscription()\n", "", "is for a subscription"),
    ("main.bicep", "    networkId: network.outputs.networkId", "    networkId: net.outputs.networkId", "net is not declared"),
    ("main.bicep", "param imageTag string", "param imageTag string =", "is not Bicep"),
    ("modules/batch-account.bicep", "ipRules: operatorRules", "ipRules: [for one in operatorAddressRanges: { value: one }]", "BCP138"),
    ("modules/storage.bicep", "var containers = concat(", "var containers = concat([for one in ['logs']: one], ", "BCP138"),
    ("modules/registry.bicep", "value: addresses", "value: [for one in [addresses]: one]", "BCP138"),
    ("main.bicep", "output storage object = {", "output storage object = {\n  all: [for one in ['a']: one]", "BCP138"),
    ("main.bicep", "maxNodes: maxWorkers", "maxNodes: arm64 ? [for one in [1]: one] : maxWorkers", "BCP138"),
    ("modules/pool.bicep", "  '2404'\n  '2204-rocm'\n", "  '2204-rocm'\n", "(BCP036)"),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "found"), _MUTATIONS, ids=lambda value: value.strip()[:40] if isinstance(value, str) else None
)
def test_each_check_finds_what_it_is_for(tmp_path: Path, file: str, old: str, new: str, found: str) -> None:
    """A check that finds nothing in a broken template proves nothing of a whole one."""
    folder = tmp_path / "infra"
    shutil.copytree(_INFRA, folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    try:
        everything = problems(folder)
    except BicepError as error:
        everything = [str(error)]
    assert [problem for problem in everything if found in problem], everything


def test_nothing_is_found_in_the_templates_as_they_stand() -> None:
    assert problems(_INFRA) == []


@pytest.mark.skipif(shutil.which("bicep") is None, reason="the bicep compiler is not on PATH; it is in no package registry that CI reaches")
@pytest.mark.parametrize("path", [_INFRA / "main.bicep", *_PARAMETERS], ids=lambda path: path.name)
def test_the_compiler_accepts_them(tmp_path: Path, path: Path) -> None:
    command = "build" if path.suffix == ".bicep" else "build-params"
    done = subprocess.run(
        ["bicep", command, str(path), "--outfile", str(tmp_path / "out.json")],
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def _allowed(file: str, name: str) -> list[str]:
    one = bicep.read(_INFRA / file).declarations["param", name]
    return [bicep.literal(item) for item in bicep.items(bicep.items(one.decorators["allowed"])[0])]
