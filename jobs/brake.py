"""Whether a run must stop because of what comes out of it. Pure; the driver asks."""

from __future__ import annotations

from schemas.job import LimitsSpec
from schemas.manifest import Totals
from schemas.quality import QualitySpec

_WORDS = {
    "errors": "are error rows",
    "truncated": "are cut off at max_tokens",
    "repeated": "repeat themselves",
    "invalid_json": "are no JSON",
}


def tripped(limits: LimitsSpec, totals: Totals, *, however_few: bool = False) -> str | None:
    """Which limit is passed, with figures and rows to look at; None while none is.

    Shares wait for `after_rows`; at a canary's end they count, `however_few` its rows are.
    """
    if limits.error_rows is not None and totals.error_rows > limits.error_rows:
        return f"limits.error_rows is {limits.error_rows}, and {totals.error_rows} rows came out as errors"
    if limits.quality is None:
        return None
    return _tripped(limits.quality, totals, after_rows=1 if however_few else limits.quality.after_rows)


def _tripped(quality: QualitySpec, totals: Totals, *, after_rows: int) -> str | None:
    if totals.rows < after_rows:
        return None
    for flaw, most in quality.judged.items():
        count = totals.error_rows if flaw == "errors" else totals.flaws.get(flaw, 0)
        if count > most * totals.rows:
            rows = [example["row"] for example in totals.examples] if flaw == "errors" else totals.flagged.get(flaw, [])
            seen = f"; look at rows {', '.join(map(str, rows[:5]))} of the input" if rows else ""
            return (
                f"limits.quality.{flaw} is {most:g}, and {count:,} of {totals.rows:,} rows ({count / totals.rows:.1%}) {_WORDS[flaw]}{seen}"
            )
    return None
