"""UnitReport, the manifest's table and the totals."""

from __future__ import annotations

import json
from typing import Any

from schemas.manifest import MANIFEST_SCHEMA
from schemas.manifest import Totals
from schemas.manifest import UnitReport
from schemas.manifest import manifest_table


def report(unit: int, **changes: Any) -> UnitReport:
    values: dict[str, Any] = {
        "unit": unit,
        "fingerprint": "f" * 64,
        "attempt": f"try-{unit}",
        "worker": "w",
        "rows": 10,
        "error_rows": 1,
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "started_at": 1000.0 + unit,
        "finished_at": 1010.0 + unit,
        "finish_reasons": {"stop": 9, "error": 1},
        "errors": {"empty_prompt": 1},
        "examples": [{"row": 10 * unit, "kind": "empty_prompt", "message": "it is null"}],
        "seconds": {"read": 0.5},
    }
    return UnitReport(**{**values, **changes})


def test_a_report_survives_json() -> None:
    assert UnitReport.from_json(report(3).to_json()) == report(3)


def test_a_manifest_is_ordered_by_unit_and_keeps_what_the_reports_say() -> None:
    table = manifest_table([(report(1), "b", 20), (report(0), "a", 10)], {b"k": b"v"})
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table.schema.metadata == {b"k": b"v"}
    rows = table.to_pylist()
    assert [(row["unit"], row["part"], row["size_bytes"], row["rows"]) for row in rows] == [(0, "a", 10, 10), (1, "b", 20, 10)]
    assert json.loads(rows[1]["examples"]) == report(1).examples
    assert json.loads(rows[1]["finish_reasons"]) == report(1).finish_reasons


def test_a_manifest_of_nothing_has_its_columns() -> None:
    assert manifest_table([], {}).schema.equals(MANIFEST_SCHEMA)


def test_totals_are_sums_and_keep_one_example_a_kind() -> None:
    totals = Totals()
    for item in (report(0), report(1), report(2, errors={"bad_text": 2}, examples=[{"row": 21, "kind": "bad_text", "message": "x"}])):
        totals.add(item)
    assert totals == Totals(
        units=3,
        rows=30,
        error_rows=3,
        prompt_tokens=300,
        completion_tokens=150,
        errors={"empty_prompt": 2, "bad_text": 2},
        finish_reasons={"stop": 27, "error": 3},
        seconds={"read": 1.5},
        examples=[{"row": 0, "kind": "empty_prompt", "message": "it is null"}, {"row": 21, "kind": "bad_text", "message": "x"}],
        started_at=1000.0,
        finished_at=1012.0,
    )


def test_adding_does_not_change_the_report() -> None:
    first, totals = report(0), Totals()
    totals.add(first)
    totals.add(report(1))
    assert first == report(0)
