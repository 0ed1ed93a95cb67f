"""A scheduler's address, and the cluster part of a job: what is refused, and that the way out is said."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.address import check_address
from schemas.address import check_protection
from schemas.address import split_address
from schemas.job import ClusterSpec


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tls://10.0.0.4:8786", ("tls", "10.0.0.4", 8786)),
        ("tcp://node-1.internal:40000", ("tcp", "node-1.internal", 40000)),
        ("tls://[fd00::4]:8786", ("tls", "[fd00::4]", 8786)),
    ],
)
def test_an_address_has_scheme_host_and_port(address: str, parts: tuple[str, str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    [
        "",
        "10.0.0.4:8786",
        "tls://10.0.0.4",
        "tls://:8786",
        "http://10.0.0.4:8786",
        "tls://a:b@host:1",
        "tls://host:8786/x",
        "tls://host:99999",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected tls://HOST:PORT, as in tls://10\.0\.0\.4:8786"):
        split_address(address)


def test_tls_needs_keys_and_tcp_needs_to_be_asked_for() -> None:
    check_address("tls://host:8786", "keys", False)
    check_address("tcp://host:8786", None, True)
    with pytest.raises(ValueError, match="use tls://host:8786, or say insecure: true"):
        check_address("tcp://host:8786", "keys", False)
    with pytest.raises(ValueError, match="give keys instead, or use tcp://host:8786"):
        check_address("tls://host:8786", None, True)


def test_neither_keys_nor_insecure_is_refused_with_both_ways_out() -> None:
    with pytest.raises(ValueError, match=r"`tokenmill keys DIR`.*--keys DIR.*--insecure"):
        check_protection(None, False)
    with pytest.raises(ValueError, match="exclude each other"):
        check_protection("keys", True)


def test_port_0_is_for_listening_only() -> None:
    check_address("tls://host:0", "keys", False, any_port=True)
    with pytest.raises(ValueError, match="expected the port that the scheduler listens on"):
        check_address("tls://host:0", "keys", False)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "local", "replicas": 2},
        {"kind": "address", "address": "tls://host:8786", "keys": "k"},
        {"kind": "address", "rendezvous": "az://runs/a", "keys": "k"},
        {"kind": "address", "address": "tcp://host:8786", "insecure": True},
        {"kind": "address", "rendezvous": "az://runs/a", "insecure": True},
    ],
)
def test_a_cluster_that_is_whole_is_accepted(fields: dict[str, Any]) -> None:
    assert ClusterSpec(**fields).model_dump(exclude_unset=True) == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "address", "keys": "k"}, "needs either address or rendezvous to find the scheduler, found neither"),
        ({"kind": "address", "keys": "k", "address": "tls://h:1", "rendezvous": "az://runs/a"}, "found both"),
        ({"kind": "address", "address": "tls://h:1"}, "no keys"),
        ({"kind": "address", "rendezvous": "az://runs/a"}, "no keys"),
        ({"kind": "address", "address": "tcp://h:1", "keys": "k"}, "not encrypted"),
        ({"kind": "address", "address": "h:1", "keys": "k"}, "expected tls://HOST:PORT"),
        ({"kind": "address", "address": "tls://h:1", "keys": "k", "replicas": 2}, "leave replicas out"),
        ({"kind": "local", "address": "tls://h:1", "keys": "k"}, "address: only kind: address takes it, found kind: local"),
        ({"kind": "local", "keys": "k"}, "keys: only kind: address or kind: azure-batch takes it, found kind: local"),
        ({"kind": "inline", "insecure": True}, "insecure: only kind: address takes it, found kind: inline"),
    ],
)
def test_a_cluster_that_is_not_is_refused_with_the_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClusterSpec(**fields)
