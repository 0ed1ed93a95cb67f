"""Which nodes are slow: measurements in, findings out, no machine in sight."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.preflight_judge import Expected
from jobs.preflight_judge import busy
from jobs.preflight_judge import exit_code
from jobs.preflight_judge import expected_rates
from jobs.preflight_judge import findings
from jobs.preflight_judge import medians
from jobs.preflight_judge import to_leave_out
from pipeline.hardware import device_of
from pipeline.hardware import find_profile
from schemas.preflight import Failure
from schemas.preflight import Measurement
from schemas.preflight import NodeFacts
from schemas.preflight import NodeReport
from schemas.preflight import Thresholds

FACTS = NodeFacts(
    architecture="x86_64", core_ids=(0, 1), num_cores=2, load=0.1, cpu_name="a CPU", cpu_flags=(), gpus=(), gpu_name="", free_port=1
)
USUAL = Thresholds()


def measured(value: float, name: str = "GEMM bf16 o, decode", **values: Any) -> Measurement:
    defaults = {"pillar": "compute", "group": "GEMM bf16", "name": name, "device": "cpu", "value": value, "unit": "TFLOP/s"}
    return Measurement.model_validate({**defaults, **values})


def node(name: str, *measurements: Measurement, **values: Any) -> NodeReport:
    return NodeReport(**{"name": name, "facts": FACTS, "measurements": measurements, **values})


def test_nodes_that_are_alike_are_fine() -> None:
    reports = [node(name, measured(value)) for name, value in (("a", 1.0), ("b", 0.92), ("c", 1.05))]
    assert findings(reports, {}, USUAL) == []
    assert to_leave_out(reports, []) == []
    assert exit_code(reports, []) == 0


def test_a_node_below_the_median_of_the_others_is_named_with_its_figures() -> None:
    reports = [node(name, measured(value)) for name, value in (("a", 1.0), ("b", 0.5), ("c", 1.1))]
    (finding,) = findings(reports, {}, USUAL)
    assert (finding.node, finding.device, finding.group, finding.share, finding.against) == (
        "b", "cpu", "GEMM bf16", 0.5, "the nodes' median"
    )  # fmt: skip
    assert finding.evidence == "GEMM bf16 o, decode 0.5 TFLOP/s, the nodes' median 1 TFLOP/s"
    assert to_leave_out(reports, [finding]) == ["b"]
    assert exit_code(reports, [finding]) == 1


def test_of_two_nodes_the_slower_one_is_named_and_never_the_quicker_one() -> None:
    reports = [node("a", measured(0.7)), node("b", measured(1.0))]
    assert medians(reports) == {"GEMM bf16 o, decode": 1.0}
    assert [(finding.node, finding.share) for finding in findings(reports, {}, USUAL)] == [("a", 0.7)]


def test_one_gpu_of_a_node_that_is_slower_than_the_seven_others_is_named() -> None:
    gpus = [measured(0.5 if number == 3 else 1.0, device=f"gpu {number}") for number in range(8)]
    (finding,) = findings([node("a", *gpus)], {}, USUAL)
    assert (finding.node, finding.device) == ("a", "gpu 3")


def test_one_figure_that_met_a_bad_moment_names_nobody_but_a_group_does() -> None:
    names = ["GEMM bf16 o", "GEMM bf16 down", "GEMM bf16 gate, up"]
    others = [node(name, *(measured(1.0, each) for each in names)) for name in ("a", "b")]
    unlucky = node("c", *(measured(value, each) for value, each in zip((0.2, 1.0, 0.9), names, strict=True)))
    slow = node("c", *(measured(value, each) for value, each in zip((0.2, 0.6, 0.7), names, strict=True)))
    assert findings([*others, unlucky], {}, USUAL) == []
    (finding,) = findings([*others, slow], {}, USUAL)
    assert (finding.node, finding.share) == ("c", 0.6)
    assert finding.evidence.startswith("GEMM bf16 o 0.2 TFLOP/s, the nodes' median 1 TFLOP/s; GEMM bf16 down 0.6 TFLOP/s")


def test_what_only_one_device_measured_is_held_against_nobody() -> None:
    reports = [node("a", measured(1.0, "store write", group="store write")), node("b", measured(0.1, "disk write", group="disk write"))]
    assert medians(reports) == {}
    assert findings(reports, {}, USUAL) == []


def test_a_figure_below_its_profile_is_named_with_where_the_profile_has_it_from() -> None:
    expected = {"a": {"memory": Expected(value=100.0, source="a data sheet (published)")}}
    slow = measured(60.0, "memory copy", group="memory", unit="GB/s", rate="memory")
    fine = measured(90.0, "memory triad", group="memory", unit="GB/s", rate="memory")
    (finding,) = findings([node("a", slow, fine)], expected, USUAL)
    assert (finding.against, finding.share) == ("the profile", 0.6)
    assert finding.evidence == "memory copy 60 GB/s is 60% of the 100 GB/s expected: a data sheet (published)"


def test_thresholds_decide() -> None:
    reports = [node("a", measured(0.7)), node("b", measured(1.0))]
    assert findings(reports, {}, Thresholds(of_median=0.6)) == []
    expected = {name: {"gemm bf16": Expected(value=1.0, source="x")} for name in ("a", "b")}
    rated = [node("a", measured(0.7, rate="gemm bf16")), node("b", measured(1.0, rate="gemm bf16"))]
    assert {finding.against for finding in findings(rated, expected, USUAL)} == {"the profile", "the nodes' median"}
    assert findings(rated, expected, Thresholds(of_profile=0.6, of_median=0.6)) == []


def test_a_node_that_did_not_answer_or_lacks_a_pillar_that_units_need_is_left_out_but_not_for_its_network() -> None:
    reports = [
        node("mute", facts=None, failures=(Failure(pillar="compute", reason="it gave no answer"),)),
        node("no-store", measured(1.0), failures=(Failure(pillar="storage", reason="refused"),)),
        node("no-peers", measured(1.0), failures=(Failure(pillar="network", reason="timed out"),)),
        node("fine", measured(1.0)),
    ]
    assert to_leave_out(reports, []) == ["mute", "no-store"]
    assert exit_code(reports, []) == 1
    assert exit_code(reports[2:3], []) == 1
    assert exit_code(reports[3:], []) == 0


def test_where_each_node_is_slow_beside_the_other_in_something_all_of_them_stay() -> None:
    disk = {"pillar": "storage", "group": "disk", "name": "disk write", "unit": "GB/s"}
    reports = [node("a", measured(0.7), measured(100.0, **disk)), node("b", measured(1.0), measured(60.0, **disk))]
    found = findings(reports, {}, USUAL)
    assert [finding.node for finding in found] == ["a", "b"]
    assert to_leave_out(reports, found) == []
    assert exit_code(reports, found) == 1
    third = node("c", measured(1.0), measured(100.0, **disk))
    assert to_leave_out([*reports, third], found) == ["a", "b"]
    broken = [node("a", failures=(Failure(pillar="storage", reason="403"),)), reports[1]]
    assert to_leave_out(broken, found) == ["a"]


def test_nodes_that_are_all_below_their_profile_are_all_slow() -> None:
    expected = {"GEMM bf16": Expected(value=2.0, source="a paper")}
    reports = [node(name, measured(1.0, rate="GEMM bf16")) for name in ("a", "b")]
    assert to_leave_out(reports, findings(reports, {"a": expected, "b": expected}, USUAL)) == ["a", "b"]


def test_nodes_where_something_else_computed_are_said() -> None:
    reports = [node("idle"), node("busy", facts=FACTS.model_copy(update={"load": 3.2})), node("mute", facts=None)]
    (only,) = busy(reports)
    assert only.startswith("node busy: the load was 3.2 on 2 cores before anything was measured")


def test_a_profile_says_what_to_expect_of_each_pillar() -> None:
    profile = find_profile("nd96isr-h100-v5")
    device = device_of(profile)
    assert profile.node is not None
    assert device is not None
    alone = expected_rates(profile.node, device, num_nodes=1)
    values = {name: round(rate.value) for name, rate in alone.items()}
    assert values == {"gemm bf16": 692, "gemm int8": 1385, "gemm fp8": 1377, "memory": 2970, "attention": 328, "all-reduce": 479}
    assert alone["gemm fp8"].source.endswith("(measured)")
    assert alone["gemm bf16"].source.startswith("70% (assumed) of the bf16 GEMM peak")
    several = expected_rates(profile.node, device, num_nodes=18)
    assert round(several["link"].value) == 50  # 3,200 Gbit/s over 8 devices
    assert "all-reduce" not in several


@pytest.mark.parametrize("name", ["nd96asr-v4", "nd96amsr-a100-v4", "nd96isr-mi300x-v5", "nd128isr-ndr-gb200-v6", "nd128isr-gb300-v6"])
def test_every_size_has_rates_to_be_held_against(name: str) -> None:
    profile = find_profile(name)
    device = device_of(profile)
    assert profile.node is not None
    assert device is not None
    assert {"gemm bf16", "memory", "attention"} <= set(expected_rates(profile.node, device, num_nodes=1))
