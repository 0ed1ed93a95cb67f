"""Which nodes of a preflight are slow, and by what evidence. Pure: measurements and a profile in, findings out."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from schemas.errors import EXIT_COMPLETE
from schemas.errors import EXIT_UNITS_FAILED
from schemas.hardware import ATTENTION_SHARE_OF_BF16_PEAK
from schemas.hardware import BANDWIDTH_SHARE_OF_PEAK
from schemas.hardware import GEMM_SHARE_OF_PEAK
from schemas.hardware import Device
from schemas.hardware import Figure
from schemas.hardware import Node
from schemas.hardware import Rate
from schemas.preflight import Finding
from schemas.preflight import Measurement
from schemas.preflight import NodeReport
from schemas.preflight import Thresholds

_SHOWN = 3
_NEEDED = ("compute", "memory", "storage")
"""Pillars without which a node runs no units. Units need no network among nodes, but for a few bytes to the driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a profile lets expect, in a measurement's unit."""

    value: float
    source: str


def expected_rates(node: Node, device: Device, *, num_nodes: int) -> dict[str, Expected]:
    """By the name that measurements give as their `rate`."""
    found = {
        f"gemm {precision}": _of_rate(rate, 1.0, GEMM_SHARE_OF_PEAK, f"{precision} GEMM") for precision, rate in device.gemm_tflops.items()
    }
    found["memory"] = _of_rate(device.bandwidth_tb_per_s, 1e3, BANDWIDTH_SHARE_OF_PEAK, "memory bandwidth")
    if device.attention_tflops is not None:
        found["attention"] = _of_figure(device.attention_tflops, 1.0)
    elif "bf16" in device.gemm_tflops:
        source = f"{ATTENTION_SHARE_OF_BF16_PEAK:.0%} of the bf16 peak (assumed)"
        found["attention"] = Expected(value=device.attention_flops / 1e12, source=source)
    if num_nodes == 1 and device.peer_gb_per_s is not None:
        found["all-reduce"] = _of_figure(device.peer_gb_per_s, 1.0)
    link = node.fabric_gbit_per_s or node.network_gbit_per_s
    if num_nodes > 1 and link is not None:  # each device talks to one of another node, all at the same time
        found["link"] = _of_figure(link, 1 / 8 / node.devices)
    return found


def _of_rate(rate: Rate, unit: float, share: float, what: str) -> Expected:
    if rate.measured is not None:
        return _of_figure(rate.measured, unit)
    assert rate.peak is not None
    return Expected(value=share * rate.peak.value * unit, source=f"{share:.0%} (assumed) of the {what} peak, {rate.peak.source}")


def _of_figure(figure: Figure, unit: float) -> Expected:
    return Expected(value=figure.value * unit, source=f"{figure.source} ({figure.basis})")


def medians(reports: Sequence[NodeReport]) -> dict[str, float]:
    """By a measurement's name, over all devices of all nodes; of an even number the upper of the two in the middle.

    So of two nodes the quicker one counts: half the speed of the other is half, not two thirds, of the usual.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for _, measurement in _all(reports):
        values[measurement.name].append(measurement.value)
    return {name: statistics.median_high(found) for name, found in values.items() if len(found) > 1}


def findings(reports: Sequence[NodeReport], expected: Mapping[str, Mapping[str, Expected]], thresholds: Thresholds) -> list[Finding]:
    """What is slow, node by node. `expected` is by node.

    A figure is held against the profile by itself, for those are ceilings and steady; against the other nodes by groups, a group's
    share being the median of its figures' shares: one figure alone may have met a moment in which something else ran.
    """
    found = []
    for node, measurement in _all(reports):
        of_profile = expected.get(node, {}).get(measurement.rate or "")
        if of_profile is not None and measurement.value < thresholds.of_profile * of_profile.value:
            share = measurement.value / of_profile.value
            evidence = f"{said(measurement)} is {share:.0%} of the {of_profile.value:,.4g} {measurement.unit} expected: {of_profile.source}"
            found.append(_finding(node, measurement, share, "the profile", evidence))
    usual = medians(reports)
    groups: dict[tuple[str, str, str], list[Measurement]] = defaultdict(list)
    for node, measurement in _all(reports):
        if measurement.name in usual:
            groups[node, measurement.device, measurement.group].append(measurement)
    for (node, _, _), members in groups.items():
        share = statistics.median(member.value / usual[member.name] for member in members)
        if share < thresholds.of_median:
            worst = sorted(members, key=lambda member: member.value / usual[member.name])[:_SHOWN]
            evidence = "; ".join(f"{said(member)}, the nodes' median {usual[member.name]:,.4g} {member.unit}" for member in worst)
            found.append(_finding(node, members[0], share, "the nodes' median", evidence))
    return sorted(found, key=lambda finding: (finding.node, finding.share))


def _finding(node: str, measurement: Measurement, share: float, against: str, evidence: str) -> Finding:
    values = {"node": node, "device": measurement.device, "group": measurement.group, "share": share, "against": against}
    return Finding.model_validate({**values, "evidence": evidence})


def said(measurement: Measurement) -> str:
    return f"{measurement.name} {measurement.value:,.4g} {measurement.unit}"


def to_leave_out(reports: Sequence[NodeReport], found: Sequence[Finding]) -> list[str]:
    """The nodes that are slow, or did not measure what running units needs.

    That each node is slow beside the others, one in this and one in that, says nothing of any: then only the other reasons count.
    """
    failed = {report.name for report in reports if report.facts is None or any(failure.pillar in _NEEDED for failure in report.failures)}
    by_itself = failed | {finding.node for finding in found if finding.against == "the profile"}
    slow = by_itself | {finding.node for finding in found}
    return sorted(slow if len(slow) < len(reports) else by_itself)


def busy(reports: Iterable[NodeReport]) -> list[str]:
    """Of nodes on which something else computed before anything was measured: what they are slow by may be that."""
    return [
        f"node {report.name}: the load was {report.facts.load:.1f} on {report.facts.num_cores} cores before anything was measured; "
        "see what runs there"
        for report in reports
        if report.facts is not None and report.facts.load > report.facts.num_cores
    ]


def exit_code(reports: Sequence[NodeReport], found: Sequence[Finding]) -> int:
    """0 where every pillar of every node was measured and none is slow."""
    whole = all(report.facts is not None and not report.failures for report in reports)
    return EXIT_COMPLETE if whole and not found else EXIT_UNITS_FAILED


def _all(reports: Sequence[NodeReport]) -> list[tuple[str, Measurement]]:
    return [(report.name, measurement) for report in reports for measurement in report.measurements]
