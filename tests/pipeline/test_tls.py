"""Keys of a cluster: what is made, what is refused, and who gets through to whom over real sockets."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from distributed.comm import connect
from distributed.comm import listen
from distributed.security import Security

from pipeline.tls import CA_CERTIFICATE
from pipeline.tls import NODE_CERTIFICATE
from pipeline.tls import NODE_KEY
from pipeline.tls import check_apart
from pipeline.tls import make_keys
from pipeline.tls import read_keys
from pipeline.tls import security
from schemas.errors import JobError

_NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_three_files_are_made_for_their_owners_eyes(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", valid_days=3, now=_NOW)
    assert made.folder == tmp_path / "keys"
    assert made.expires_at == _NOW + timedelta(days=3)
    assert {path.name: path.stat().st_mode & 0o777 for path in made.folder.iterdir()} == {
        CA_CERTIFICATE: 0o600,
        NODE_CERTIFICATE: 0o600,
        NODE_KEY: 0o600,
    }
    assert made.folder.stat().st_mode & 0o777 == 0o700


def test_the_cas_own_key_is_nowhere(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    node_key = serialization.load_pem_private_key((folder / NODE_KEY).read_bytes(), None)
    assert node_key.public_key() == load(folder / NODE_CERTIFICATE).public_key()
    assert node_key.public_key() != load(folder / CA_CERTIFICATE).public_key()
    assert sum(b"PRIVATE" in path.read_bytes() for path in folder.iterdir()) == 1


def test_the_ca_signs_and_the_node_only_joins(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    ca, node = load(folder / CA_CERTIFICATE), load(folder / NODE_CERTIFICATE)
    node.verify_directly_issued_by(ca)
    constraints = [cert.extensions.get_extension_for_class(x509.BasicConstraints).value for cert in (ca, node)]
    assert [(value.ca, value.path_length) for value in constraints] == [(True, 0), (False, None)]
    usage = node.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(JobError, match=rf"{NODE_KEY} is there already"):
        make_keys(folder, valid_days=3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", [CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY])
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path: Path, name: str) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    (folder / name).unlink()
    with pytest.raises(JobError, match=rf"has no {name}; make keys with `tokenmill keys"):
        read_keys(folder)


def test_a_key_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    (folder / NODE_KEY).chmod(0o644)
    with pytest.raises(JobError, match="has mode 0644, so that everybody on this machine may use it; chmod 600 it"):
        read_keys(folder)
    (folder / NODE_KEY).chmod(0o640)
    read_keys(folder)


def test_files_of_two_sets_are_refused(tmp_path: Path) -> None:
    one, two = (make_keys(tmp_path / name, valid_days=3).folder for name in ("one", "two"))
    (one / NODE_CERTIFICATE).write_bytes((two / NODE_CERTIFICATE).read_bytes())
    with pytest.raises(JobError, match=r"was not signed by ca\.pem there; copy all three files of one set"):
        read_keys(one)


def test_a_key_of_another_set_is_refused(tmp_path: Path) -> None:
    one, two = (make_keys(tmp_path / name, valid_days=3).folder for name in ("one", "two"))
    (one / NODE_KEY).write_bytes((two / NODE_KEY).read_bytes())
    with pytest.raises(JobError, match=r"is not the key of node\.pem there; copy all three files of one set"):
        read_keys(one)


def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    (folder / NODE_KEY).write_text("-----BEGIN PRIVATE KEY-----\nhello\n-----END PRIVATE KEY-----\n")
    with pytest.raises(JobError, match="is not a private key in PEM form") as caught:
        read_keys(folder)
    assert "hello" not in str(caught.value)


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    (folder / CA_CERTIFICATE).write_text("hello")
    with pytest.raises(JobError, match=r"ca\.pem is not a certificate in PEM form"):
        read_keys(folder)


def test_keys_out_of_date_are_refused_with_the_date(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3, now=_NOW).folder
    read_keys(folder, now=_NOW + timedelta(days=2, hours=23))
    with pytest.raises(JobError, match="were good until 2026-11-28 12:00 UTC; make new ones"):
        read_keys(folder, now=_NOW + timedelta(days=3))


def test_keys_do_not_belong_into_a_store(tmp_path: Path) -> None:
    for call in (lambda: make_keys("az://container/keys", valid_days=3), lambda: read_keys("memory://keys")):
        with pytest.raises(JobError, match="expected a folder on this machine"):
            call()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"^keys: "):
        make_keys(tmp_path / "file" / "keys", valid_days=3)


@pytest.mark.parametrize(
    ("keys", "out"), [("out/keys", "out"), ("out", "out"), ("keys", "keys/out"), ("out/_tokenmill/keys", "out"), ("link/keys", "out")]
)
def test_keys_and_results_that_lie_in_one_another_are_refused(tmp_path: Path, keys: str, out: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(JobError, match="whoever reads results there could run code on every node"):
        check_apart(str(tmp_path / keys), [str(tmp_path / out)])


def test_keys_elsewhere_are_fine(tmp_path: Path) -> None:
    check_apart(str(tmp_path / "out-keys"), [str(tmp_path / "out"), "az://container/out", f"file://{tmp_path}/other"])


def test_every_role_has_the_same_certificate_and_nothing_older_than_tls_1_2(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", valid_days=3)
    found = security(str(made.folder))
    assert found.require_encryption is True
    for role in ("client", "scheduler", "worker"):
        config = found.get_tls_config_for_role(role)
        assert (config["ca_file"], config["cert"], config["key"]) == (made.ca_certificate, made.node_certificate, made.node_key)
        context = found.get_connection_args(role)["ssl_context"]
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_no_keys_is_plain_tcp() -> None:
    found = security(None)
    assert found.require_encryption is False
    assert found.get_connection_args("client")["ssl_context"] is None


async def _ask(address: str, found: Security) -> str:
    comm = await connect(address, timeout=5, **found.get_connection_args("client"))
    try:
        await comm.write("ping")
        answer: str = await comm.read()
        return answer
    finally:
        await comm.close()


def talk(listens: Security, asks: Security, scheme: str = "tls") -> str:
    """What somebody who connects with `asks` gets to hear from somebody who listens with `listens`."""

    async def answer(comm: Any) -> None:
        await comm.write("pong: " + await comm.read())

    async def both() -> str:
        scheme_there = "tls" if listens.require_encryption else "tcp"
        async with listen(f"{scheme_there}://127.0.0.1:0", answer, **listens.get_listen_args("scheduler")) as listener:
            port = listener.contact_address.rpartition(":")[2]
            return await _ask(f"{scheme}://127.0.0.1:{port}", asks)

    return asyncio.run(both())


MakeSecurity = Callable[..., Security]


@pytest.fixture
def make_security(tmp_path: Path) -> MakeSecurity:
    def make(name: str, **given: Any) -> Security:
        return security(str(make_keys(tmp_path / name, valid_days=3, **given).folder))  # type: ignore[no-any-return]

    return make


def test_holders_of_the_same_keys_understand_each_other(make_security: MakeSecurity) -> None:
    ours = make_security("ours")
    assert talk(ours, ours) == "pong: ping"


def test_a_holder_of_other_keys_is_not_let_in(make_security: MakeSecurity) -> None:
    with pytest.raises(OSError):
        talk(make_security("ours"), make_security("theirs"))


def test_nobody_without_a_certificate_is_let_in(make_security: MakeSecurity, tmp_path: Path) -> None:
    ours = make_security("ours")

    async def both() -> bytes:
        heard: list[str] = []

        async def answer(comm: Any) -> None:
            heard.append(await comm.read())

        async with listen("tls://127.0.0.1:0", answer, **ours.get_listen_args("scheduler")) as listener:
            context = ssl.create_default_context(cafile=str(tmp_path / "ours" / CA_CERTIFICATE))  # it trusts us, and has nothing to show
            context.check_hostname = False
            port = int(listener.contact_address.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            try:
                return await reader.read(1)
            finally:
                writer.close()
                assert heard == []

    with pytest.raises(ssl.SSLError, match=r"(?i)certificate required"):
        asyncio.run(both())


def test_plain_tcp_is_not_let_in_and_not_gone_out_with(make_security: MakeSecurity) -> None:
    ours = make_security("ours")
    with pytest.raises(OSError):
        talk(ours, security(None), scheme="tcp")
    with pytest.raises(RuntimeError, match="encryption required"):
        talk(security(None), ours, scheme="tcp")


def test_messages_do_not_quote_the_key(tmp_path: Path) -> None:
    folder = make_keys(tmp_path / "keys", valid_days=3).folder
    secret = (folder / NODE_KEY).read_text().splitlines()[1]
    (folder / NODE_CERTIFICATE).write_bytes((folder / NODE_KEY).read_bytes())
    with pytest.raises(JobError) as caught:
        read_keys(folder)
    assert secret not in str(caught.value)
    assert os.path.basename(folder) in str(caught.value)
