"""Metrics of a replica, and the port on which they are served."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.metrics import ReplicaMetrics
from pipeline.metrics import Server
from pipeline.model import resolve_model
from pipeline.replica import Replica
from schemas.errors import JobError
from schemas.job import ClusterSpec

_READING = {
    "engine": "e", "age_s": 20.0, "start_s": 5.0, "busy_s": 8.0, "starved_s": 3.0, "blocked_s": 0.5, "pending_starved_s": 1.0,
    "pending_blocked_s": 0.25, "working_s": 8.0, "full": True, "rows": 4, "prompt_tokens": 40, "generated_tokens": 90, "busy_tokens": 80,
    "kept_tokens": 60,
}  # fmt: skip


class Fixed:
    """A replica that always says the same."""

    name = 'a"b\\c\nd-0'

    def status(self) -> dict[str, Any]:
        counts = {"rows": 4, "prompt_tokens": 40, "completion_tokens": 90, "in_flight": 7, "window_rows": 64}
        return {**counts, "ledger": _READING, "units": ["u-1", "u-2"]}

    def errors(self) -> dict[str, int]:
        return {"too_long": 3}


def fetched(address: str) -> dict[tuple[str, str], float]:
    """Values by name and kind."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(sample.name, sample.labels.get("kind", "")): sample.value for family in families for sample in family.samples}


def test_what_a_replica_says_is_served() -> None:
    server = Server([ReplicaMetrics(Fixed())], host="127.0.0.1", port=0)
    try:
        values = fetched(server.address)
    finally:
        server.close()
    assert values["tokenmill_replica_rows_total", ""] == 4
    assert values["tokenmill_replica_output_tokens_total", ""] == 90
    assert values["tokenmill_replica_error_rows_total", "too_long"] == 3
    assert values["tokenmill_replica_units_in_flight", ""] == 2
    seconds = {kind: value for (name, kind), value in values.items() if name == "tokenmill_replica_engine_seconds_total"}
    assert seconds == {"start": 5.0, "busy": 8.0, "starved": 4.0, "commit_blocked": 0.75}
    assert values["process_resident_memory_bytes", ""] > 0


def test_a_real_replica_is_asked_when_somebody_looks(tiny_model: Path) -> None:
    options = {"decode_tokens_per_s": 1e6, "prefill_tokens_per_s": 1e7, "max_num_seqs": 4, "start_s": 0.0, "lengths": "max"}
    replica = Replica(name="inline-0", model=resolve_model(str(tiny_model)), kind="simulated", options=options)
    server = Server([ReplicaMetrics(replica)], host="127.0.0.1", port=0)
    try:
        first, second = fetched(server.address), fetched(server.address)
    finally:
        server.close()
        replica.close()
    assert first["tokenmill_replica_rows_total", ""] == 0
    age = [sum(value for (name, _), value in seen.items() if name == "tokenmill_replica_engine_seconds_total") for seen in (first, second)]
    assert 0 < age[0] <= age[1]


@pytest.mark.slow
def test_after_close_the_port_is_free() -> None:
    server = Server([], host="127.0.0.1", port=0)
    port = int(server.address.split(":")[2].split("/")[0])
    server.close()
    Server([], host="127.0.0.1", port=port).close()


def test_a_port_that_is_taken_is_a_clear_refusal() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(JobError, match=r"cluster\.metrics_port: cannot serve metrics on 127\.0\.0\.1:\d+: .*choose another port"):
            Server([], host="127.0.0.1", port=taken.getsockname()[1])


def test_ports_follow_from_one() -> None:
    assert [ClusterSpec(metrics_port=9464).metrics_port_of(replica) for replica in (0, 7)] == [9465, 9472]
    assert ClusterSpec().metrics_port_of(0) is None
    assert ClusterSpec().metrics_host == "127.0.0.1"
