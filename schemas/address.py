"""A scheduler's address, and what has to protect it. Pure checks; the callers know whose address it is."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_protection(keys: str | None, insecure: bool) -> None:
    """Exactly one of the two. Raises ValueError with the way out."""
    if keys is not None and insecure:
        raise ValueError("keys and insecure exclude each other: drop insecure to use TLS, or keys to go without")
    if keys is None and not insecure:
        raise ValueError(
            "no keys: whoever reaches a scheduler without TLS runs code on every node; make keys with `tokenmill keys DIR` "
            "and name them (keys: DIR, --keys DIR), or say insecure: true (--insecure) where nobody else is on the network"
        )


def check_address(address: str, keys: str | None, insecure: bool, *, any_port: bool = False) -> None:
    """`tls://HOST:PORT` with keys, `tcp://HOST:PORT` only as insecure. Raises ValueError with the way out.

    `any_port`: whether 0 will do, which leaves the choice to the system.
    """
    check_protection(keys, insecure)
    scheme, host, port = split_address(address)
    if port == 0 and not any_port:
        raise ValueError(f"found {address!r}, expected the port that the scheduler listens on")
    if scheme == "tcp" and not insecure:
        raise ValueError(f"found {address!r}, which is not encrypted; use tls://{host}:{port}, or say insecure: true (--insecure)")
    if scheme == "tls" and insecure:
        raise ValueError(f"found {address!r} with insecure: true (--insecure); give keys instead, or use tcp://{host}:{port}")


def split_address(address: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError."""
    wrong = f"found {address!r}, expected tls://HOST:PORT, as in tls://10.0.0.4:8786"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise ValueError(wrong) from None
    if parts.scheme not in ("tls", "tcp") or not parts.hostname or port is None or "@" in parts.netloc or parts.path + parts.query:
        raise ValueError(wrong)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, host, port
