"""Plots: numbers in, inline SVG out. Colours are CSS variables, so that light and dark are the page's matter; text takes its font."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from matplotlib.ticker import MaxNLocator

from jobs.reporting.figures import Numbers
from schemas.ledger import KINDS
from schemas.ledger import Kind

_WIDTH = 440
"""Points: text stays readable where a phone shrinks it to 350 pixels, and two stand side by side on a laptop."""
_HEIGHT = 230
_INK, _GRID, _MAIN, _OTHER = "#a1b0c1", "#a1b0c2", "#a1b0c3", "#a1b0c4"
_OF_KIND = {kind: f"#a1b0d{number}" for number, kind in enumerate(KINDS)}
_VARIABLES = {_INK: "ink", _GRID: "grid", _MAIN: "main", _OTHER: "other", **{colour: kind for kind, colour in _OF_KIND.items()}}
"""Colours that nobody would choose, each standing for a variable of the page's style."""
_NAME_CHARACTERS = 16
_BAR_POINTS = 17
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are data
    "font.family": "DejaVu Sans",  # comes with matplotlib; what is measured, and nearly what is shown
    "font.size": 11.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_DROPPED = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL)
_GROUP_ID = re.compile(r'<g id="[^"]*">')
_FONT = re.compile(r"font-size: [\d.]+px; font-family: [^;\"]*; ?")
_SPACE = re.compile(r">\s+<")
_LONG_DECIMALS = re.compile(r"(\d+\.\d{2})\d+")


def rate(edges_s: Numbers, values: Numbers, marks_s: Sequence[float], *, unit: str) -> str:
    """In steps, over seconds; a line at each mark."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes, scale = _over_time(edges_s, marks_s, unit)
        axes.stairs(values, edges_s / scale, fill=True, color=_MAIN, alpha=0.25)
        axes.stairs(values, edges_s / scale, color=_MAIN, linewidth=1.4, baseline=None)
        axes.set_ylim(0, max(float(values.max(initial=0.0)), 1e-3) * 1.06)
        return _svg(figure)


def growth(edges_s: Numbers, values: Numbers, goal: float, marks_s: Sequence[float], *, unit: str) -> str:
    """What there is at each moment, towards a goal."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes, scale = _over_time(edges_s, marks_s, unit)
        axes.plot(edges_s / scale, values, color=_OTHER, linewidth=1.8)
        axes.axhline(goal, color=_INK, linewidth=1.2, linestyle=(0, (1.5, 2)))
        axes.set_ylim(0, goal * 1.05)
        return _svg(figure)


def _over_time(edges_s: Numbers, marks_s: Sequence[float], unit: str) -> tuple[Figure, Axes, float]:
    """With the seconds of one unit on the time axis."""
    figure, axes = _figure(_HEIGHT)
    scale, word = (3600.0, "hours") if edges_s[-1] > 3 * 3600 else (60.0, "minutes") if edges_s[-1] > 180 else (1.0, "seconds")
    for mark_s in marks_s:
        axes.axvline(mark_s / scale, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(0, edges_s[-1] / scale)
    axes.set_xlabel(f"{word} under way")
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y")
    return figure, axes, scale


def stacked(seconds: Mapping[str, Mapping[Kind, float]]) -> str:
    """One bar a name, cut by kind of second."""
    with matplotlib.rc_context(_SETTINGS):
        names = list(seconds)
        figure, axes = _bars(names)
        left = [0.0] * len(names)
        for kind in KINDS:
            widths = [seconds[name].get(kind, 0.0) for name in names]
            axes.barh(range(len(names)), widths, left=left, color=_OF_KIND[kind], height=0.74)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_xlabel("seconds")
        axes.set_xlim(0, max([*left, 1e-3]))
        return _svg(figure)


def bars(values: Mapping[str, float], *, unit: str, mean: bool = False) -> str:
    """One bar a name; with the mean of all as a line."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _bars(list(values))
        axes.barh(range(len(values)), list(values.values()), color=_MAIN, height=0.74)
        if mean and values:
            axes.axvline(sum(values.values()) / len(values), color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel(unit)
        axes.set_xlim(0, max([*values.values(), 1e-3]) * 1.02)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _svg(figure)


def histogram(edges: Sequence[int], rows: Sequence[int], *, unit: str) -> str:
    """Rows by tokens, in bins that end before the next edge."""
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _figure(_HEIGHT)
        axes.stairs(rows, edges, fill=True, color=_OTHER)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(unit)
        axes.set_ylabel("rows")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y")
        return _svg(figure)


def shortened(name: str) -> str:
    """Both ends of a long one: nodes of a pool begin alike, and replicas end in their number."""
    half = _NAME_CHARACTERS // 2
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: half - 1]}…{name[-half:]}"


def _figure(height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def _bars(names: Sequence[str]) -> tuple[Figure, Axes]:
    figure, axes = _figure(max(110, 55 + _BAR_POINTS * len(names)))
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="x")
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return tidied(buffer.getvalue())


def tidied(svg: str) -> str:
    """Fit to stand in a page: no header, no ids that repeat, no fonts and colours of its own, two decimals."""
    svg = _DROPPED.sub("", svg)
    svg = _GROUP_ID.sub("<g>", svg)
    svg = _FONT.sub("", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    return _SPACE.sub("><", _LONG_DECIMALS.sub(r"\1", svg)).strip()
