"""The dashboard asks for metrics and labels that drivers and replicas really serve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.metrics import Snapshot
from jobs.metrics import run_families
from pipeline.metrics import replica_families
from schemas.job import ClusterSpec
from tests.test_documents import fences

_DASHBOARD = Path(__file__).resolve().parents[2] / "infra" / "grafana" / "tokenmill.json"
_PAGE = _DASHBOARD.with_name("README.md")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STRING = re.compile(r'"[^"]*"')
_FUNCTIONS = {"sum", "rate", "increase", "or", "and", "by", "on", "vector", "label_values"}
_OF_PROMETHEUS = {"instance", "job", "process_resident_memory_bytes"}
_READING = {
    "engine": "e", "age_s": 1.0, "start_s": 1.0, "busy_s": 0.0, "starved_s": 0.0, "blocked_s": 0.0, "pending_starved_s": 0.0,
    "pending_blocked_s": 0.0, "working_s": 0.0, "full": False, "rows": 0, "prompt_tokens": 0, "generated_tokens": 0, "busy_tokens": 0,
    "kept_tokens": 0,
}  # fmt: skip
_SAID = {"rows": 1, "prompt_tokens": 1, "completion_tokens": 1, "in_flight": 1, "window_rows": 1, "units": [1], "ledger": _READING}


def served() -> tuple[set[str], set[str]]:
    """Names of samples, and of labels."""
    told = Snapshot(state="running", rows=1, prompt_tokens=1, output_tokens=1, errors={"k": 1}, engine_seconds={"busy": 1.0}, usd=1.0)
    families = [*run_families("j", told), *replica_families("r", _SAID, {"k": 1})]
    samples = [sample for family in families for sample in family.samples]
    assert len({family.name for family in families}) == len(families)
    return {sample.name for sample in samples}, {label for sample in samples for label in sample.labels}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_DASHBOARD.read_text())
    return loaded


def queries() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return found + [one["query"]["query"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]


def unknown(query: str) -> set[str]:
    """Words of a query that are neither served nor part of the language."""
    names, labels = served()
    text = re.sub(r"\[[^\]]*\]", "", _STRING.sub("", query))
    return set(_WORD.findall(text)) - names - labels - _FUNCTIONS - _OF_PROMETHEUS


@pytest.mark.parametrize("query", queries())
def test_a_query_names_only_what_is_served(query: str) -> None:
    assert unknown(query) == set()


def test_a_query_of_something_else_would_be_found() -> None:
    """The control of the one above."""
    assert unknown("sum(tokenmill_run_rows) by (node)") == {"tokenmill_run_rows", "node"}


def test_everything_that_is_served_of_a_run_is_shown_or_left_out_on_purpose() -> None:
    names, _ = served()
    shown = {word for query in queries() for word in _WORD.findall(query)}
    left_out = {
        "tokenmill_run_rows_total", "tokenmill_run_prompt_tokens_total", "tokenmill_run_output_tokens_total",
        "tokenmill_run_units_done", "tokenmill_run_units_planned", "tokenmill_replica_units_in_flight",
        "tokenmill_replica_error_rows_total",
    }  # fmt: skip
    assert names - shown == left_out


def test_panels_have_places_of_their_own_and_names() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard()["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["title"] and panel["datasource"] == {"type": "prometheus", "uid": "${source}"} for panel in dashboard()["panels"])


@pytest.mark.parametrize("panel", dashboard()["panels"], ids=lambda panel: panel["title"])
def test_a_panel_shows_the_chosen_jobs_or_says_that_it_is_of_replicas(panel: dict[str, Any]) -> None:
    """What replicas serve has no job."""
    chosen = ['{job_name=~"$job_name"}' in target["expr"] for target in panel["targets"]]
    assert all(chosen) or "replica" in panel["title"]
    assert not any(chosen) or not any("tokenmill_replica_" in target["expr"] for target in panel["targets"])


def test_the_page_has_prometheus_ask_a_driver_and_the_replicas_of_a_node() -> None:
    job, prometheus = (yaml.safe_load(block) for name, block in fences(_PAGE.read_text()) if name == "yaml")
    cluster = ClusterSpec(**job["cluster"])
    (config,) = prometheus["scrape_configs"]
    (targets,) = [one["targets"] for one in config["static_configs"]]
    assert targets == [f"{cluster.metrics_host}:{port}" for port in (cluster.metrics_port, *map(cluster.metrics_port_of, range(8)))]
