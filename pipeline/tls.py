"""Keys of one cluster: a private CA that signs a single certificate, made here, checked here, and turned into Dask's Security.

Dask does not check host names, so the CA is the whole boundary: whoever holds node.key may join as scheduler, worker or
driver and so run code on every node; nobody else can connect. Hence a CA of its own for each job or cluster, whose key is
forgotten as soon as it has signed, and a folder of keys that never lies in an output, where readers of results would find it.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from pipeline import storage
from schemas.errors import JobError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CA_CERTIFICATE = "ca.pem"
NODE_CERTIFICATE = "node.pem"
NODE_KEY = "node.key"
_LOCAL = ("file", "local")
_CLOCK_SKEW = timedelta(hours=1)
"""Of nodes whose clocks are behind the one that made the keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """A checked folder of keys."""

    folder: Path
    expires_at: datetime

    @property
    def ca_certificate(self) -> str:
        return str(self.folder / CA_CERTIFICATE)

    @property
    def node_certificate(self) -> str:
        return str(self.folder / NODE_CERTIFICATE)

    @property
    def node_key(self) -> str:
        return str(self.folder / NODE_KEY)


def make_keys(folder: str | Path, *, valid_days: int, now: datetime | None = None) -> Keys:
    """Make a CA and a certificate for all nodes; the CA's own key is never written. Raises JobError, also where keys are already."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID
    from cryptography.x509.oid import NameOID

    place, now = _local(folder), now or datetime.now(UTC)
    expires_at = now + timedelta(days=valid_days)

    def certificate(name: str, key: Any, issuer: str, issuer_key: Any, extensions: list[Any]) -> bytes:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(expires_at)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        signed: bytes = builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return signed

    ca_key, node_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = f"tokenmill CA {os.urandom(4).hex()}"
    roles = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    signs_only = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    contents = {
        NODE_KEY: node_key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        CA_CERTIFICATE: certificate(ca_name, ca_key, ca_name, ca_key, [x509.BasicConstraints(ca=True, path_length=0), signs_only]),
        NODE_CERTIFICATE: certificate(
            "tokenmill node", node_key, ca_name, ca_key, [x509.BasicConstraints(ca=False, path_length=None), roles]
        ),
    }
    _write_new(place, contents)
    return read_keys(place, now=now)


def read_keys(folder: str | Path, *, now: datetime | None = None) -> Keys:
    """Check a folder of keys: complete, of one CA, not out of date, and the key for its owner's eyes. Raises JobError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    place, now = _local(folder), now or datetime.now(UTC)
    missing = [name for name in (CA_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY) if not (place / name).is_file()]
    if missing:
        raise JobError(f"keys: {place} has no {', '.join(missing)}; make keys with `tokenmill keys {place}`, or copy the cluster's there")
    mode = (place / NODE_KEY).stat().st_mode & 0o777
    if mode & 0o007:
        raise JobError(f"keys: {place / NODE_KEY} has mode {mode:04o}, so that everybody on this machine may use it; chmod 600 it")
    certificates: list[Certificate] = []
    for name in (CA_CERTIFICATE, NODE_CERTIFICATE):
        try:
            certificates.append(x509.load_pem_x509_certificate((place / name).read_bytes()))
        except (OSError, ValueError) as error:
            raise JobError(f"keys: {place / name} is not a certificate in PEM form: {error}") from None
    ca, node = certificates
    try:
        node.verify_directly_issued_by(ca)
    except Exception:  # ValueError, TypeError or InvalidSignature: the same to us
        raise JobError(
            f"keys: {NODE_CERTIFICATE} in {place} was not signed by {CA_CERTIFICATE} there; copy all three files of one set"
        ) from None
    try:
        key = load_pem_private_key((place / NODE_KEY).read_bytes(), None)
    except (OSError, ValueError, TypeError):  # whose words might show some of it
        raise JobError(f"keys: {place / NODE_KEY} is not a private key in PEM form, without a password") from None
    if key.public_key() != node.public_key():
        raise JobError(f"keys: {NODE_KEY} in {place} is not the key of {NODE_CERTIFICATE} there; copy all three files of one set")
    expires_at = min(ca.not_valid_after_utc, node.not_valid_after_utc)
    if expires_at <= now:
        raise JobError(
            f"keys: those in {place} were good until {expires_at:%Y-%m-%d %H:%M} UTC; make new ones with `tokenmill keys`, "
            "copy them to all nodes and start scheduler and workers again"
        )
    return Keys(folder=place, expires_at=expires_at)


def security(folder: str | None) -> Any:
    """Dask's Security: TLS 1.2 or later in both directions, nothing else accepted. None is plain TCP. Raises JobError."""
    from distributed.security import Security

    if folder is None:
        return Security(require_encryption=False)
    keys = read_keys(folder)
    own = {f"tls_{role}_{part}": path for role in ("client", "scheduler", "worker") for part, path in _pair(keys)}
    return Security(require_encryption=True, tls_ca_file=keys.ca_certificate, tls_min_version=ssl.TLSVersion.TLSv1_2, **own)


def check_apart(keys: str, uris: Iterable[str]) -> None:
    """Keys must not be where results are: whoever may read those could run code on the cluster. Raises JobError."""
    folder = os.path.realpath(_local(keys))
    for uri in uris:
        if storage.scheme_of(uri) not in _LOCAL:
            continue
        other = os.path.realpath(storage.absolute(uri))
        if os.path.commonpath([folder, other]) in (folder, other):
            raise JobError(
                f"keys: {folder} and {other} lie in one another; whoever reads results there could run code on every node. "
                "Move the keys to a folder of their own, outside of it"
            )


def _pair(keys: Keys) -> list[tuple[str, str]]:
    return [("cert", keys.node_certificate), ("key", keys.node_key)]


def _local(folder: str | Path) -> Path:
    if storage.scheme_of(str(folder)) not in _LOCAL:
        raise JobError(f"keys: found {folder}, expected a folder on this machine; keys do not belong into a store")
    return Path(storage.absolute(str(folder)))


def _write_new(folder: Path, contents: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, data in contents.items():
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
    except FileExistsError as error:
        raise JobError(f"keys: {error.filename} is there already; name a new folder, or remove the old keys first") from None
    except OSError as error:
        raise JobError(f"keys: cannot write to {folder}: {error.strerror}") from None
