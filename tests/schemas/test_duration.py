"""A length of time as people write it."""

from __future__ import annotations

import pytest

from schemas.duration import parse_duration
from schemas.errors import JobError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45), ("2d", 172_800)])
def test_a_number_with_its_unit_is_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "0", "10 minutes", "-5m", "m", "1w", "1e3s", "٣m"])
def test_anything_else_is_refused_naming_the_field(text: str) -> None:
    with pytest.raises(JobError, match=r"limits.deadline: found .*, expected a length of time such as 90s, 10m, 8h or 2d"):
        parse_duration(text, "limits.deadline")
