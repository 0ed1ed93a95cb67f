"""A preflight's figures as tables: what the nodes are, and what they measured, a line for each figure over all nodes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from jobs.preflight_judge import Expected
from schemas.preflight import Measurement
from schemas.preflight import NodeReport

_STYLE = {"title_justify": "left", "box": None, "padding": (0, 2, 0, 0)}


def machines(reports: Sequence[NodeReport]) -> Table:
    """A line for each node."""
    table = Table("node", "device", "cores", "load", "profile", "Azure", title="Nodes", **_STYLE)  # type: ignore[arg-type]
    for report in reports:
        facts = report.facts
        if facts is None:
            table.add_row(Text(report.name), "did not answer")
            continue
        device = f"{len(facts.gpus)} x {facts.gpu_name or 'GPU'}" if facts.gpus else facts.cpu_name or facts.architecture
        table.add_row(
            Text(report.name), Text(device), str(facts.num_cores), f"{facts.load:.1f}", Text(report.profile or "none"), Text(azure(report))
        )
    return table


def azure(report: NodeReport) -> str:
    """What its metadata service says, in words."""
    node = report.facts.azure if report.facts is not None else None
    if node is None:
        return "no answer"
    events = "events not known" if node.events is None else ", ".join(node.events) or "no events"
    return ", ".join(word for word in (node.vm_size, node.priority, node.location, node.zone and f"zone {node.zone}", events) if word)


def figures(reports: Sequence[NodeReport], expected: Mapping[str, Mapping[str, Expected]]) -> Table:
    """A line for each figure: of one device its value and sizes, of several the lowest, where that was, the median and the highest."""
    by_name: dict[str, list[tuple[str, Measurement]]] = defaultdict(list)
    for report in reports:
        for measurement in report.measurements:
            by_name[measurement.name].append((report.name, measurement))
    several = any(len(found) > 1 for found in by_name.values())
    table = Table(title="Figures", **_STYLE)  # type: ignore[arg-type]
    table.add_column("figure", no_wrap=True)
    for column in ("lowest", "of", "median", "highest") if several else ("value",):
        table.add_column(column, justify="left" if column == "of" else "right", no_wrap=True)
    table.add_column("")
    for column in ("of ceiling", "of profile"):
        table.add_column(column, justify="right")
    if not several:
        table.add_column("what")
    for name, found in by_name.items():
        node, lowest = min(found, key=lambda one: one[1].value)
        values = [measurement.value for _, measurement in found]
        cells = [Text(f"{lowest.value:,.4g}")]
        if several:
            device = "" if lowest.device == "node" else f" {lowest.device}"
            cells += [Text(f"{node}{device}"), Text(f"{statistics.median_high(values):,.4g}"), Text(f"{max(values):,.4g}")]
        rate = expected.get(node, {}).get(lowest.rate or "")
        detail = [] if several else [Text(lowest.detail)]
        shares = [lowest.of_ceiling, None if rate is None else lowest.value / rate.value]
        table.add_row(Text(name), *cells, lowest.unit, *("" if share is None else f"{share:.0%}" for share in shares), *detail)
    return table
