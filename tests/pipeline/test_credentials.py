"""Azure credentials: a recipe that travels, secrets that do not, and tokens that are renewed. On a real Azurite."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tblib.pickling_support
from azure.core.exceptions import HttpResponseError
from click.testing import CliRunner

from jobs import api
from jobs.accept import accept
from jobs.cli import main
from pipeline import azure_blob
from pipeline import credentials
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import parse_job
from schemas.storage import StorageSpec
from tests.azurite import Azurite
from tests.azurite import running
from tests.azurite import why_not

_ROOT = Path(__file__).resolve().parents[2]
_ID = "12345678-1234-1234-1234-123456789abc"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AZURE_", "IDENTITY_", "TOKENMILL_STORAGE")):
            monkeypatch.delenv(name)
    for name in (credentials.VARIABLE, credentials._OUTER):  # what `use` sets in a test is undone after it
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.fixture
def bucket(azurite: Azurite) -> str:
    """A container that nobody has a credential for yet."""
    return azurite.new_container()


def spec_for(service: Azurite, **credential: Any) -> StorageSpec:
    return StorageSpec.model_validate({"account_name": service.account, "endpoint": service.endpoint, "credential": credential})


def round_trip(uri: str) -> None:
    """Everything that a job does with a store."""
    storage.create_once(uri, b"one")
    with pytest.raises(FileExistsError):
        storage.create_once(uri, b"two")
    assert storage.read_bytes(uri) == b"one"
    with storage.open_read(uri) as file:
        assert file.read() == b"one"
    storage.replace(uri, b"three")
    folder, _, name = uri.rpartition("/")
    assert storage.list_names(folder) == {name: 5}
    assert [item.uri for item in storage.list_objects(uri)] == [uri]
    storage.remove(uri)
    assert not storage.exists(uri)


# The recipe: what it says, and what it never holds.

SIGNATURE = "sv=2025-01-05&sr=c&sp=racwdl&sig=Zm9yIHRlc3RzIG9ubHkgbm90IGEgc2VjcmV0%3D"
KEY = base64.b64encode(bytes(range(64))).decode()
CONNECTION = f"DefaultEndpointsProtocol=https;AccountName=abc;AccountKey={KEY};EndpointSuffix=core.windows.net"


def base_job(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "input": {"uri": "a", "prompt": "p"}, "output": {"uri": "o"}, **changes}


@pytest.mark.parametrize("secret", [SIGNATURE, KEY, CONNECTION], ids=["sas", "key", "connection string"])
@pytest.mark.parametrize(
    "place",
    [
        lambda secret: base_job(storage=secret),
        lambda secret: base_job(storage=[secret]),
        lambda secret: base_job(storage={"credential": secret}),
        lambda secret: base_job(storage={"credential": {"kind": secret}}),
        lambda secret: base_job(storage={"credential": {"kind": "sas", "env": secret}}),
        lambda secret: base_job(storage={"credential": {"kind": "sas", "file": secret}}),
        lambda secret: base_job(storage={"credential": {"kind": "sas", "sas": secret}}),
        lambda secret: base_job(storage={"credential": {secret: "sas"}}),
        lambda secret: base_job(storage={"credential": {"client_id": secret}}),
        lambda secret: base_job(storage={"account_name": secret}),
        lambda secret: base_job(storage={"endpoint": secret}),
        lambda secret: base_job(storage={"endpoint": f"https://a.blob.core.windows.net/?{secret}"}),
        lambda secret: base_job(input=secret),
        lambda secret: base_job(output={"uri": f"az://c/out?{secret}"}),
        lambda secret: base_job(input={"uri": f"az://c/in/*.parquet?{secret}", "prompt": "p"}),
        lambda secret: base_job(input={"uri": ["a", f"az://c/in?{secret}"], "prompt": "p"}),
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(secret: str, place: Callable[[str], dict[str, Any]]) -> None:
    if secret == KEY and "az://" in str(place("x")):
        pytest.skip("an account key alone is no query")
    with pytest.raises(JobError) as refused:
        parse_job(place(secret))
    with pytest.raises(ValueError) as raw:
        JobSpec(**place(secret))
    for piece in (secret, secret[:40], SIGNATURE[-20:], KEY[:20]):
        assert piece not in str(refused.value)
        assert piece not in str(raw.value)


@pytest.mark.parametrize(
    ("credential", "message"),
    [
        ({"kind": "sas"}, "kind sas needs either env or file, found neither"),
        ({"kind": "account_key", "env": "A", "file": "b"}, "kind account_key needs either env or file, found env and file"),
        ({"kind": "default", "env": "A"}, "kind default reads no secret; drop env"),
        ({"kind": "anonymous", "client_id": _ID}, "kind anonymous takes no client_id"),
        ({"kind": "managed_identity", "client_id": "me"}, "client_id: String should match"),
        ({"kind": "password"}, "kind: Input should be 'default', 'managed_identity'"),
        ({"kind": "sas", "env": "two words"}, "env: String should match"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(credential: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_job(base_job(storage={"credential": credential}))


@pytest.mark.parametrize("endpoint", ["http://store.example.com/account", "store", "ftp://a/b", "https://user:pw@host/"])
def test_an_endpoint_is_a_private_place(endpoint: str) -> None:
    with pytest.raises(JobError, match=r"storage.endpoint: "):
        parse_job(base_job(storage={"endpoint": endpoint}))


_KEYED = {"kind": "account_key", "env": "K"}


@pytest.mark.parametrize(
    ("uri", "spec", "expected"),
    [
        ("az://c/a/b", {"account_name": "abc"}, ("abc", "https://abc.blob.core.windows.net", "c/a/b")),
        ("az://c", {"account_name": "abc"}, ("abc", "https://abc.blob.core.windows.net", "c")),
        ("abfss://c@xyz.dfs.core.windows.net/a", {}, ("xyz", "https://xyz.blob.core.windows.net", "c/a")),
        ("abfs://c@xyz.blob.core.windows.net/a/", {}, ("xyz", "https://xyz.blob.core.windows.net", "c/a")),
        ("abfss://c@xyz.dfs.core.chinacloudapi.cn/a", {}, ("xyz", "https://xyz.blob.core.chinacloudapi.cn", "c/a")),
        ("abfss://c@xyz.dfs.core.windows.net/a", {"account_name": "abc"}, ("xyz", "https://xyz.blob.core.windows.net", "c/a")),
        ("az://c/a", {"account_name": "abc", "endpoint": "https://blob.corp.example"}, ("abc", "https://blob.corp.example", "c/a")),
        (
            "abfss://c@abc.dfs.core.windows.net/a",
            {"account_name": "abc", "endpoint": "https://blob.corp.example"},
            ("abc", "https://blob.corp.example", "c/a"),
        ),
        (
            "abfss://c@xyz.dfs.core.windows.net/a",
            {"account_name": "abc", "endpoint": "https://blob.corp.example"},
            ("xyz", "https://xyz.blob.core.windows.net", "c/a"),
        ),
        ("az://c/a?b#c d%20", {"account_name": "abc"}, ("abc", "https://abc.blob.core.windows.net", "c/a?b#c d%20")),
        ("az://c/a", {"credential": {"kind": "connection_string", "env": "C"}}, ("", "", "c/a")),
    ],
)
def test_a_uri_says_where_a_blob_is(uri: str, spec: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert azure_blob.locate(uri, StorageSpec.model_validate(spec)) == expected


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("az://c/a", "which storage account"),
        ("az:///a", "no container"),
        ("abfss://c@evil.example.com/a", "evil.example.com is not ACCOUNT.dfs.core.windows.net"),
        ("abfss://c@xyz.dfs.core.windows.net.evil.example/a", "is not ACCOUNT.dfs.core.windows.net"),
        ("abfss://c@xyz.dfs.evil.example/a", "is not ACCOUNT.dfs.core.windows.net"),
        ("abfss://c@/a", "is not ACCOUNT.dfs.core.windows.net"),
    ],
)
def test_a_token_goes_to_azures_hosts_only(uri: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        azure_blob.locate(uri, StorageSpec())


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, "default"),
        ({"ANON": "true"}, "anonymous"),
        ({"ANON": "false"}, "default"),
        ({"SAS_TOKEN": "s"}, "sas"),
        ({"ACCOUNT_KEY": "k", "SAS_TOKEN": "s"}, "account_key"),
        ({"CONNECTION_STRING": "c", "ACCOUNT_KEY": "k", "SAS_TOKEN": "s", "ANON": "true"}, "connection_string"),
    ],
)
def test_without_a_recipe_adlfs_own_variables_count(variables: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**variables, "ACCOUNT_NAME": "abc"}.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    found = credentials.current()
    assert (found.account_name, found.credential.kind) == ("abc", kind)


def test_a_recipe_reaches_children_and_is_taken_back() -> None:
    before_it = StorageSpec(account_name="before")
    os.environ[credentials.VARIABLE] = before_it.model_dump_json(exclude_none=True)
    storage.use(StorageSpec.model_validate({"account_name": "first", "credential": {"kind": "sas", "file": "token.sas"}}))
    storage.use(StorageSpec.model_validate({"account_name": "second", "credential": {"kind": "sas", "file": "token.sas"}}))
    code = "from pipeline import credentials; print(credentials.current().account_name, credentials.current().credential.file)"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["second", os.path.abspath("token.sas")]
    storage.use(None)
    assert credentials.current() == before_it
    storage.use(None)
    assert credentials.current() == before_it


def test_a_recipe_that_cannot_be_read_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (SIGNATURE, json.dumps({"credential": SIGNATURE}), json.dumps([SIGNATURE])):
        monkeypatch.setenv(credentials.VARIABLE, text)
        with pytest.raises(JobError, match=credentials.VARIABLE) as refused:
            credentials.current()
        assert "sig=" not in str(refused.value)


def test_a_secret_that_is_not_there_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"env": "NO_SUCH_VARIABLE", "file": str(tmp_path / "none")}
    for kind in ("sas", "account_key", "connection_string"):
        for where, name in cases.items():
            spec = StorageSpec.model_validate({"account_name": "abc", "credential": {"kind": kind, where: name}})
            monkeypatch.setenv(credentials.VARIABLE, spec.model_dump_json(exclude_none=True))
            with pytest.raises(JobError, match=f"storage.credential.{where}: .*{name}"):
                storage.read_bytes("az://container/a")
    (tmp_path / "none").write_text("not a connection string")
    with pytest.raises(JobError, match="is not a connection string"):
        storage.read_bytes("az://container/a")


# Real secrets on a real service.


def secret_of(service: Azurite, bucket: str, kind: str) -> str:
    if kind == "sas":
        return service.sas(bucket)
    return service.key if kind == "account_key" else service.connection_string


@pytest.mark.azurite
@pytest.mark.parametrize("where", ["env", "file"])
@pytest.mark.parametrize("kind", ["sas", "account_key", "connection_string"])
def test_each_kind_of_secret_opens_the_store(
    kind: str, where: str, azurite: Azurite, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secret_of(azurite, bucket, kind)
    monkeypatch.setenv("THE_SECRET", secret)
    (tmp_path / "secret").write_text(f"  {'?' if kind == 'sas' else ''}{secret}\n")
    storage.use(spec_for(azurite, kind=kind, **{where: "THE_SECRET" if where == "env" else str(tmp_path / "secret")}))
    round_trip(f"az://{bucket}/a/b.parquet")
    storage.probe(f"az://{bucket}/out")


@pytest.mark.azurite
def test_adlfs_own_variables_open_the_store(azurite: Azurite, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azurite.connection_string)
    round_trip(f"az://{bucket}/a/b.parquet")


@pytest.mark.azurite
@pytest.mark.parametrize("where", ["env", "file"])
def test_a_refused_credential_says_what_to_do(
    where: str, azurite: Azurite, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "THE_SECRET" if where == "env" else str(tmp_path / "secret")
    wrong = {
        "sas": (azurite.sas(bucket, lifetime_s=-10), f"is the SAS expired.*put one that is valid into {name}"),
        "account_key": (KEY, f"was the key rotated.*Put the new one into {name}"),
        "connection_string": (azurite.connection_string.replace(azurite.key, KEY), f"Put the new one into {name}"),
    }
    for kind, (secret, message) in wrong.items():
        monkeypatch.setenv("THE_SECRET", secret)
        (tmp_path / "secret").write_text(secret)
        storage.use(spec_for(azurite, kind=kind, **{where: name}))
        for act in (storage.read_bytes, storage.info, storage.list_names, storage.open_read):
            with pytest.raises(PermissionError, match=f"the store refused the credential .*{message}"):
                act(f"az://{bucket}/a")
        with pytest.raises(PermissionError, match=message):
            storage.create_once(f"az://{bucket}/a", b"x")
        with pytest.raises(JobError, match=f"output.uri: cannot write to .*{message}"):
            storage.probe(f"az://{bucket}/out")


@pytest.mark.azurite
def test_a_private_container_is_closed_to_nobody_in_particular(azurite: Azurite, bucket: str) -> None:
    storage.use(spec_for(azurite, kind="anonymous"))
    with pytest.raises((PermissionError, FileNotFoundError)):
        storage.read_bytes(f"az://{bucket}/a")
    with pytest.raises((PermissionError, FileNotFoundError)):
        storage.create_once(f"az://{bucket}/a", b"x")
    assert azurite.names(bucket) == []


@pytest.mark.azurite
def test_a_sas_that_may_only_create_cannot_change_what_is_there(azurite: Azurite, bucket: str, tmp_path: Path) -> None:
    """The store refuses a name that is taken as an overwrite before it looks at the condition, so that no lost race could be told."""
    (tmp_path / "secret").write_text(azurite.sas(bucket, permission="rcl"))
    storage.use(spec_for(azurite, kind="sas", file=str(tmp_path / "secret")))
    with pytest.raises(JobError, match="does it lack a right"):
        storage.probe(f"az://{bucket}/out")
    storage.create_once(f"az://{bucket}/a", b"first")
    for write in (storage.create_once, storage.replace):
        with pytest.raises(PermissionError):
            write(f"az://{bucket}/a", b"second")
    assert storage.read_bytes(f"az://{bucket}/a") == b"first"


@pytest.mark.azurite
def test_a_writer_of_parts_needs_to_read_create_write_and_list(azurite: Azurite, bucket: str, tmp_path: Path) -> None:
    """Not to delete: then a probe of 16 bytes stays."""
    (tmp_path / "secret").write_text(azurite.sas(bucket, permission="rcwl"))
    storage.use(spec_for(azurite, kind="sas", file=str(tmp_path / "secret")))
    storage.probe(f"az://{bucket}/out")
    storage.create_once(f"az://{bucket}/a", b"first")
    with pytest.raises(FileExistsError):
        storage.create_once(f"az://{bucket}/a", b"second")
    assert storage.read_bytes(f"az://{bucket}/a") == b"first"
    assert storage.list_names(f"az://{bucket}") == {"a": 5}


@pytest.mark.azurite
def test_a_rotated_sas_is_taken_at_once_even_by_a_file_that_is_open(azurite: Azurite, bucket: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(azurite.sas(bucket))
    storage.use(spec_for(azurite, kind="sas", file=str(secret)))
    data = os.urandom(5 << 20)
    storage.create_once(f"az://{bucket}/a", data)
    with storage.open_read(f"az://{bucket}/a") as file:
        assert file.read(2 << 20) == data[: 2 << 20]
        secret.write_text(azurite.sas(bucket, lifetime_s=-10))
        with pytest.raises(PermissionError):
            file.read()
        secret.write_text(azurite.sas(bucket))
        file.seek(2 << 20)
        assert file.read() == data[2 << 20 :]
    assert storage.list_names(f"az://{bucket}") == {"a": len(data)}


@pytest.mark.azurite
@pytest.mark.parametrize("kind", ["account_key", "connection_string"])
def test_a_rotated_key_is_taken_at_once(kind: str, azurite: Azurite, bucket: str, tmp_path: Path) -> None:
    secret, right = tmp_path / "secret", secret_of(azurite, bucket, kind)
    secret.write_text(right.replace(azurite.key, KEY))
    storage.use(spec_for(azurite, kind=kind, file=str(secret)))
    with pytest.raises(PermissionError):
        storage.create_once(f"az://{bucket}/a", b"x")
    secret.write_text(right)
    storage.create_once(f"az://{bucket}/a", b"x")


@pytest.mark.azurite
def test_a_connection_string_is_for_one_account(azurite: Azurite, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_SECRET", azurite.connection_string)
    storage.use(spec_for(azurite, kind="connection_string", env="THE_SECRET"))
    with pytest.raises(JobError, match=f"the connection string is for account {azurite.account}"):
        storage.read_bytes("abfss://c@other.dfs.core.windows.net/a")


# Nothing secret anywhere.


@pytest.mark.azurite
@pytest.mark.parametrize("kind", ["sas", "account_key", "connection_string"])
def test_no_secret_is_in_what_people_and_processes_see(
    kind: str, azurite: Azurite, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in reprs, pickles, logs at their most talkative, messages, or whole tracebacks with what caused what."""
    tblib.pickling_support.install()  # as Dask and vLLM do: pickles of errors then hold what they came from
    secret = tmp_path / "secret"
    right = secret_of(azurite, bucket, kind)
    wrong = azurite.sas(bucket, lifetime_s=-10) if kind == "sas" else right.replace(azurite.key, KEY)
    storage.use(spec_for(azurite, kind=kind, file=str(secret)))
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    for text in (wrong, right):
        secret.write_text(text)
        for act in (storage.read_bytes, storage.info, storage.list_names, storage.list_objects, storage.open_read, storage.probe):
            for uri in (f"az://{bucket}/a", "az://no-such-container/a", f"az://{bucket}/{text}"):
                try:
                    act(uri) if uri != f"az://{bucket}/{text}" else act(f"az://{bucket}/b")
                except Exception as error:
                    shown += ["".join(traceback.format_exception(error)), repr(error), repr(pickle.dumps(error))]
        fs, _ = azure_blob.filesystem(f"az://{bucket}/a", credentials.current())
        shown += [repr(fs), str(fs), repr(pickle.dumps(fs)), fs.to_json(), repr(fs.storage_options), repr(vars(fs).get("credential"))]
        copy = pickle.loads(pickle.dumps(fs))
        if text == right:
            assert copy.exists(f"{bucket}/nothing") is False
        else:
            with pytest.raises(HttpResponseError):
                copy.exists(f"{bucket}/nothing")
    shown += [caplog.text, json.dumps(dict(os.environ))]
    assert len(caplog.records) > 10
    everything = "\n".join(shown)
    signature = parse_qs(right).get("sig", [""])[0] if kind == "sas" else azurite.key
    for piece in {right, wrong, signature, KEY, azurite.key, *(part for part in right.split("&") if part.startswith("sig="))}:
        assert piece not in everything


def test_a_live_sas_is_not_pickled(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SIGNATURE)
    spec = StorageSpec.model_validate({"credential": {"kind": "sas", "file": str(tmp_path / "secret")}}).credential
    made = credentials.sas(spec)
    assert made.signature == SIGNATURE
    assert "sig=" not in repr(made)
    with pytest.raises(TypeError, match="build it from its recipe"):
        pickle.dumps(made)


# Whole jobs.


@pytest.mark.azurite
def test_a_job_with_a_recipe_runs_on_workers_and_stores_no_secret(
    azurite: Azurite, bucket: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.sas"
    secret.write_text(azurite.sas(bucket))
    spec = spec_for(azurite, kind="sas", file=str(secret))
    storage.use(spec)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": [f"row {number}" for number in range(60)]}), sink)
    storage.create_once(f"az://{bucket}/in/a.parquet", sink.getvalue().to_pybytes())
    storage.use(None)
    job = parse_job(
        {
            "model": str(tiny_model),
            "input": {"uri": f"az://{bucket}/in/*.parquet", "prompt": "prompt"},
            "output": {"uri": f"az://{bucket}/out"},
            "sampling": {"max_tokens": 4},
            "engine": {"kind": "simulated"},
            "cluster": {"kind": "local", "replicas": 2},
            "storage": spec.model_dump(exclude_none=True),
        }
    )
    result = api.run(job)
    assert (result.exit_code, result.totals.rows) == (0, 60)
    storage.use(None)
    options = [f"--storage={field}" for field in (f"account_name={azurite.account}", f"endpoint={azurite.endpoint}")]
    options += ["--storage=credential.kind=sas", f"--storage=credential.file={secret}"]
    shown = CliRunner().invoke(main, ["verify", result.out_uri, *options])
    assert (shown.exit_code, "complete: 60 of 60 rows" in shown.output) == (0, True), shown.output
    assert CliRunner().invoke(main, ["status", result.out_uri, *options]).exit_code == 0
    record = storage.read_bytes(f"az://{bucket}/out/{layout.JOB}")
    assert str(secret) in record.decode()
    with azurite.client() as client:
        for name in azurite.names(bucket):
            data = client.get_blob_client(bucket, name).download_blob().readall()
            assert b"sig=" not in data
            assert azurite.key.encode() not in data


def test_cli_takes_no_secret_as_a_storage_option() -> None:
    for option in (f"credential.env={SIGNATURE}", f"credential={SIGNATURE}", f"account_name={KEY}", SIGNATURE):
        shown = CliRunner().invoke(main, ["verify", "az://c/out", "--storage", option])
        assert shown.exit_code == 2
        assert "sig=" not in shown.output
        assert KEY not in shown.output
    shown = CliRunner().invoke(main, ["run", "--model", "demo", "--set", f"storage.credential.env={SIGNATURE}"])
    assert (shown.exit_code, "sig=" in shown.output) == (2, False)


def test_how_storage_is_reached_does_not_change_what_a_job_is(make_job: Callable[..., JobSpec], write_table: Any) -> None:
    write_table([{"prompt": "row"}])
    plain, with_recipe = make_job(), make_job(storage={"account_name": "abc", "credential": {"kind": "managed_identity"}})
    assert accept(plain).record.fingerprint == accept(with_recipe).record.fingerprint


# Tokens, from a small issuer of our own; Azurite checks their times, issuer and audience.


class Issuer:
    """Plays the App Service's managed identity and Entra's token endpoint, over https. Counts who asked for what."""

    def __init__(self, context: ssl.SSLContext, *, lifetime_s: int) -> None:
        self.asked: Counter[str] = Counter()
        self.tokens: list[str] = []
        self.broken = False
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                if self.headers.get("X-IDENTITY-HEADER") != "identity-header" or query["resource"] != ["https://storage.azure.com"]:
                    return self._answer(400, {"error": "wrong header or resource"})
                issuer.asked[f"managed identity {query.get('client_id', ['system'])[0]}"] += 1
                until = str(int(time.time()) + lifetime_s)
                values = {"access_token": issuer.make(), "expires_on": until, "resource": query["resource"][0], "token_type": "Bearer"}
                self._answer(200, values)

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                if form.get("client_assertion") != ["federated-token"]:
                    return self._answer(400, {"error": "invalid_client"})
                issuer.asked[f"workload identity {form['client_id'][0]}"] += 1
                self._answer(200, {"access_token": issuer.make(), "expires_in": lifetime_s, "token_type": "Bearer"})

            def _answer(self, status: int, values: dict[str, Any]) -> None:
                if issuer.broken:
                    status, values = 403, {"error": "identity is gone"}
                body = json.dumps(values).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"

    def make(self) -> str:
        """A token that the store takes for ten minutes, whatever lifetime is announced; its signature Azurite does not check."""
        now = int(time.time())
        claims = {
            "aud": "https://storage.azure.com", "iss": "https://sts.windows.net/11111111-1111-1111-1111-111111111111/",
            "iat": now - 60, "nbf": now - 60, "exp": now + 600, "sub": f"number-{len(self.tokens)}",
        }  # fmt: skip
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "RS256", "typ": "JWT"}, claims)
        ]
        self.tokens.append(".".join([*parts, base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("=")]))
        return self.tokens[-1]


@contextmanager
def serving(issuer: Issuer) -> Iterator[Issuer]:
    thread = threading.Thread(target=issuer.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        issuer.server.shutdown()
        issuer.server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Azurite, ssl.SSLContext, Path]]:
    """Azurite over https that takes tokens, a server's TLS context, and the authority to trust."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    trustme = pytest.importorskip("trustme")
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=number > 0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    with running(cert=folder / "cert.pem", key=folder / "key.pem", oauth=True) as service:
        yield service, context, folder / "ca.pem"


_WORK = """
import logging, os, pathlib, sys, time
logging.basicConfig(level=logging.DEBUG)
from pipeline import azure_blob, credentials, storage
uri, lifetime_s, rounds = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
for turn in range(rounds):
    if turn:
        time.sleep(lifetime_s + 1)
    name = f"{uri}/{turn}.parquet"
    try:
        storage.create_once(name, b"one")
        assert storage.read_bytes(name) == b"one"
        assert len(storage.list_objects(uri)) == turn + 1
        print("done", turn, flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
fs, _ = azure_blob.filesystem(uri, credentials.current())
import pickle
print(repr(pickle.dumps(fs)), fs, fs.credential, file=sys.stderr)
"""


def work(service: Azurite, issuer: Issuer, authority: Path, credential: dict[str, Any], rounds: int, lifetime_s: int) -> tuple[str, str]:
    """A process of its own: what it printed, and all that it logged. aiohttp looks for trusted authorities once, when imported."""
    spec = {"account_name": service.account, "endpoint": service.endpoint, "credential": credential}
    token_file = authority.parent / "federated"
    token_file.write_text("federated-token")
    environment = {
        **os.environ,
        "SSL_CERT_FILE": str(authority),
        credentials.VARIABLE: json.dumps(spec),
        "IDENTITY_ENDPOINT": f"{issuer.url}/msi/token",
        "IDENTITY_HEADER": "identity-header",
    }
    if credential["kind"] == "workload_identity":
        environment |= {
            "AZURE_AUTHORITY_HOST": issuer.url,
            "AZURE_TENANT_ID": "11111111-1111-1111-1111-111111111111",
            "AZURE_CLIENT_ID": _ID,
            "AZURE_FEDERATED_TOKEN_FILE": str(token_file),
        }
    with service_client(service, authority) as client:
        name = f"oauth-{os.urandom(4).hex()}"
        client.create_container(name).close()
    arguments = [f"az://{name}/folder", str(lifetime_s), str(rounds)]
    done = subprocess.run(
        [sys.executable, "-c", _WORK, *arguments], cwd=_ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout, done.stderr


def service_client(service: Azurite, authority: Path) -> Any:
    from azure.storage.blob import BlobServiceClient

    return BlobServiceClient.from_connection_string(service.connection_string, connection_verify=str(authority), retry_total=0)


@pytest.mark.azurite
@pytest.mark.parametrize(
    ("credential", "asks_as"),
    [
        ({"kind": "managed_identity", "client_id": _ID}, f"managed identity {_ID}"),
        ({"kind": "managed_identity"}, "managed identity system"),
        ({"kind": "workload_identity"}, f"workload identity {_ID}"),
        ({"kind": "default", "client_id": _ID}, f"managed identity {_ID}"),
    ],
    ids=["user-assigned", "system-assigned", "workload", "default"],
)
def test_tokens_are_renewed_before_they_end(credential: dict[str, Any], asks_as: str, https: tuple[Azurite, ssl.SSLContext, Path]) -> None:
    service, context, authority = https
    with serving(Issuer(context, lifetime_s=1)) as issuer:
        printed, logged = work(service, issuer, authority, credential, rounds=2, lifetime_s=1)
        assert printed.split() == ["done", "0", "done", "1"], (printed, logged[-3000:])
        assert issuer.asked[asks_as] >= 2, issuer.asked
        print(f"\n{credential}: {issuer.asked[asks_as]} tokens in 2 rounds")
        assert len(logged) > 1000
        for token in issuer.tokens:
            assert token not in logged
            assert token.split(".")[2] not in logged


@pytest.mark.azurite
def test_one_token_serves_all_threads_and_requests_while_it_lasts(https: tuple[Azurite, ssl.SSLContext, Path]) -> None:
    service, context, authority = https
    with serving(Issuer(context, lifetime_s=3600)) as issuer:
        printed, logged = work(service, issuer, authority, {"kind": "managed_identity"}, rounds=2, lifetime_s=0)
        assert printed.split() == ["done", "0", "done", "1"], logged[-3000:]
        assert issuer.asked.total() == 1


@pytest.mark.azurite
def test_an_identity_that_gives_no_token_says_what_to_do(https: tuple[Azurite, ssl.SSLContext, Path]) -> None:
    service, context, authority = https
    with serving(Issuer(context, lifetime_s=60)) as issuer:
        issuer.broken = True
        printed, _ = work(service, issuer, authority, {"kind": "managed_identity"}, rounds=1, lifetime_s=0)
        assert printed.startswith("PermissionError: ")
        assert "managed_identity): give the identity the role Storage Blob Data Contributor" in printed
