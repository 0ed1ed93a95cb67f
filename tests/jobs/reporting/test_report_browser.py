"""The page in a real browser: laptop and phone, light and dark; nothing is fetched, nothing complains, nothing sticks out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.reporting.evidence import gather
from jobs.reporting.html import to_html
from jobs.reporting.sections import document
from tests.bench.report import build

_CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; run `make setup`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_CHROMIUM is None, reason="no chromium here; run `bash .ci/setup-chromium`"),
]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    out = build(folder, units=40, rows=16, replicas=40, done=31)
    path = folder / "report.html"
    path.write_bytes(to_html(document(gather(str(out)))))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_looks_right(browser: Any, page_path: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert (complaints, requests) == ([], [page_path.as_uri()])
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sticking_out = """width => [...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, pre') &&
        one.getBoundingClientRect().right > width + 0.5).map(one => one.tagName + ' ' + one.textContent.slice(0, 40))"""
    assert page.evaluate(sticking_out, width) == []
    ink, background = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert (_brightness(ink) < _brightness(background)) is (scheme == "light")
    texts, ground = page.evaluate(
        "[[...new Set([...document.querySelectorAll('svg text')].map(one => getComputedStyle(one).fill))],"
        " getComputedStyle(document.querySelector('section')).backgroundColor]"
    )
    assert texts
    assert all(abs(_brightness(text) - _brightness(ground)) > 150 for text in texts), "words of plots can be read"
    bars = page.evaluate("[...new Set([...document.querySelectorAll('svg path')].map(one => getComputedStyle(one).fill))]")
    assert len([fill for fill in bars if fill != "none" and abs(_brightness(fill) - _brightness(ground)) > 40]) >= 6
    context.close()


def _brightness(colour: str) -> float:
    """Of `rgb(1, 2, 3)`, 0 to 255."""
    red, green, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return 0.299 * red + 0.587 * green + 0.114 * blue
