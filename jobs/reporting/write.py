"""Write: a job's report into storage, beside the job or wherever it is asked for."""

from __future__ import annotations

from jobs.report import Report
from jobs.reporting.evidence import gather
from jobs.reporting.html import to_html
from jobs.reporting.markdown import to_markdown
from jobs.reporting.sections import document
from pipeline import storage
from schemas import layout
from schemas.errors import JobError


def write_report(
    out_uri: str,
    *,
    account: Report | None = None,
    html: str | None = None,
    markdown: str | None = None,
    page: bool = True,
    usd_per_hour: float | None = None,
) -> list[str]:
    """Where it lies: the page at `html`, by default in the output, unless no `page` is wanted; and Markdown where that is named.

    A node costs what was known in each run, unless `usd_per_hour` says it.

    Raises JobError where there is no job, or a place cannot be written to.
    """
    out_uri = storage.absolute(out_uri)
    made = document(gather(out_uri, account=account, usd_per_hour=usd_per_hour))
    written = []
    if page:
        written.append(_put("--html", storage.absolute(html) if html else storage.join(out_uri, layout.REPORT), to_html(made)))
    if markdown is not None:
        written.append(_put("--markdown", storage.absolute(markdown), to_markdown(made).encode("utf-8", "replace")))
    return written


def _put(option: str, uri: str, data: bytes) -> str:
    try:
        storage.replace(uri, data)
    except OSError as error:
        raise JobError(f"{option}: cannot write {uri}: {error}; name another place with {option} PATH") from None
    return uri
