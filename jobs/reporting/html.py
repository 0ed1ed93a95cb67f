"""A document in, one HTML page out that needs nothing else: no script, no font, no picture, no request."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment
from jinja2 import FileSystemLoader
from jinja2 import StrictUndefined
from markupsafe import Markup

from jobs.reporting.document import Document

_FOLDER = Path(__file__).parent


def to_html(document: Document) -> bytes:
    """Everything that comes from data is escaped; plots alone are put in as they are, for this program drew them."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = Markup
    style = Markup((_FOLDER / "report.css").read_text())
    return environment.get_template("report.html.jinja").render(document=document, style=style).encode("utf-8", "replace")
