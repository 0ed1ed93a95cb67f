"""A node of the scale set joins and works: its own command, README.md's for keys, scheduler and job, the printed cluster section."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.verify import verify
from pipeline import tls
from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.commands import Command
from tests.infra.deployment import Deployed
from tests.infra.test_templates import cloud_init
from tests.infra.test_templates import made
from tests.test_documents import parse

pytestmark = pytest.mark.batch
_PAGE = Path(__file__).resolve().parents[2] / "infra" / "README.md"
_ENGINE = ["--engine", "simulated", "--set", "engine.options={decode_tokens_per_s: 1000000, prefill_tokens_per_s: 10000000}"]
_ROWS = 40


def told() -> list[list[str]]:
    """The commands of README.md's section, in words."""
    section = _PAGE.read_text().split("## GB200 and GB300")[1].split("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def value_of(option: str, words: list[str]) -> str:
    return words[words.index(option) + 1]


def deployed() -> Deployed:
    return made(workerSize="Standard_ND128isr_GB300_v6", scaleSetNodes=2)


def nodes_command() -> list[str]:
    """What systemd has docker run in the worker image."""
    unit = cloud_init()["/etc/systemd/system/tokenmill-worker.service"].replace("\\\n", " ")
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(line)
    return words[words.index("worker") :]


def test_operators_upload_their_keys_to_where_nodes_fetch_them() -> None:
    keys, upload, scheduler, run = told()
    assert (keys[:2], scheduler[:2], run[:2]) == (["tokenmill", "keys"], ["tokenmill", "scheduler"], ["tokenmill", "run"])
    place = f"az://{value_of('--destination', upload)}/{value_of('--destination-path', upload)}"
    assert place == value_of("--keys", nodes_command())
    folder = keys[2]
    assert value_of("--source", upload) == value_of("--keys", scheduler) == folder == deployed().outputs["cluster"]["keys"]
    rendezvous = value_of("--rendezvous", scheduler)
    assert value_of("--rendezvous", nodes_command()) == rendezvous == deployed().outputs["cluster"]["rendezvous"]


def test_the_node_s_command_is_one() -> None:
    parse(nodes_command())


@pytest.fixture
def containers(azurite: Azurite, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those that infra/ makes, with a table and a model in them."""
    monkeypatch.setenv(CONNECTION_STRING, azurite.connection_string)
    kind = "Microsoft.Storage/storageAccounts/blobServices/containers"
    names = [one.name.split("/")[-1] for one in deployed().of(kind) if not one.existing]
    table = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(_ROWS)), "prompt": [f"question {index}" for index in range(_ROWS)]}), table)
    with azurite.client() as client:
        for name in names:
            client.create_container(name).close()
    put(azurite, "input", "prompts.parquet", table.getvalue())
    for path in tiny_model.iterdir():
        put(azurite, "models", f"llama/{path.name}", path.read_bytes())
    yield
    for name in names:
        azurite.delete_container(name)


def put(azurite: Azurite, container: str, name: str, data: bytes) -> None:
    with azurite.client() as client, client.get_blob_client(container, name) as blob:
        blob.upload_blob(data)


@pytest.mark.azurite
@pytest.mark.slow
def test_a_node_joins_with_the_uploaded_keys_and_runs_the_job(containers: None, azurite: Azurite, tmp_path: Path) -> None:
    keys, upload, scheduler, run = told()
    account = {"account_name": azurite.account, "endpoint": azurite.endpoint, "credential": {"kind": "account_key", "env": "AZURITE_KEY"}}
    job = {
        "model": "az://models/llama",
        "input": {"uri": "az://input/*.parquet", "prompt": "prompt"},
        "output": {"uri": "az://output/night"},
        "sampling": {"max_tokens": 4},
        "engine": {"kind": "simulated"},
        "cluster": deployed().outputs["cluster"],
        "storage": account,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    recipe = [f"endpoint={azurite.endpoint}", "credential.kind=account_key", "credential.env=AZURITE_KEY"]
    here = [word for field in recipe for word in ("--storage", field)] + ["--listen", "tls://127.0.0.1:0", "--dashboard", "none"]
    serve = [word.replace("ACCOUNT", azurite.account) for word in scheduler[1:]] + here
    started: list[Command] = []

    def start(*words: str) -> Command:
        started.append(Command(tmp_path, *words, environment={"AZURITE_KEY": azurite.key}))
        return started[-1]

    try:
        early = start(*nodes_command(), *_ENGINE)
        assert early.end() == 2  # and systemd starts it again
        assert "upload the files that `tokenmill keys` makes" in early.log
        assert start(*keys[1:]).end() == 0
        for path in (tmp_path / value_of("--source", upload)).iterdir():  # as `az` does, which is not here
            put(azurite, value_of("--destination", upload), f"{value_of('--destination-path', upload)}/{path.name}", path.read_bytes())
        assert azurite.names("cluster-keys") == [f"scale-set/{name}" for name in (tls.CA_CERTIFICATE, tls.NODE_KEY, tls.NODE_CERTIFICATE)]
        start(*serve).wait_for("scheduler at ")
        start(*nodes_command(), *_ENGINE).wait_for("joined tls://")
        ended = start(*run[1:])
        assert ended.end() == 0, ended.log
    finally:
        for command in started:
            command.kill()
    verdict = verify("az://output/night")
    assert (verdict.problems, verdict.complete, verdict.rows_proven) == ([], True, _ROWS)
    assert not [name for name in azurite.names("output") if name.endswith((".pem", ".key"))]
