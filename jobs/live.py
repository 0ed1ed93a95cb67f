"""A job that moves, for people: one view out of storage, drawn in a terminal, in a notebook, or as a line. Reads, never writes.

The view comes from the driver's last word (status.json, every few seconds) and the listing of parts, so it is the same everywhere.
"""

from __future__ import annotations

import html
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

from pydantic import ValidationError
from rich.console import Console
from rich.console import Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from jobs.progress import seconds_words
from jobs.report import share_of_raw
from jobs.status import GOES_ON
from jobs.status import Status
from pipeline import storage
from schemas import layout
from schemas.ledger import RunAccount

_BAR_CHARACTERS = 40
_LINE_EVERY_S = 10.0
_ADDRESS = re.compile(r"https?://[^\s<>,]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What there is to see of a job at one moment."""

    name: str
    state: str
    rows: int
    rows_done: int
    units: int
    units_done: int
    tokens_per_s: float = 0.0
    """Output tokens of the last half minute."""
    mean_tokens_per_s: float | None = None
    """Since this run began."""
    share_of_raw: float | None = None
    eta_s: tuple[float, float] | None = None
    """By the speed now and by the mean, the sooner first."""
    errors: dict[str, int] = field(default_factory=dict)
    """Rows by kind, of this run."""
    example: str = ""
    usd: float | None = None
    replicas: int = 0
    links: tuple[tuple[str, str], ...] = ()
    """What to open, a name and an address or a place each."""
    age_s: float | None = None
    """Of the driver's last word."""
    canary_over: bool = False
    """Whether the rows that ran first, if any did, can be looked at."""


def view_of(status: Status) -> View:
    """Pure. What the driver said may come from any version of it: what is missing is left out."""
    said = status.said
    running = status.state in GOES_ON
    elapsed_s = _number(said, "updated_at") - _number(said, "began_at")
    mean = (_number(said, "completion_tokens") - _number(said, "reused_tokens")) / elapsed_s if elapsed_s > 0 else None
    now = _number(said, "output_tokens_per_s")
    eta = said.get("eta_s")
    by_speed = None
    if running and isinstance(eta, int | float) and mean and now > 0:
        other = eta * now / mean
        by_speed = (min(eta, other), max(eta, other))
    examples = [each for each in said.get("examples", []) if isinstance(each, dict)]
    example = f"row {examples[0].get('row')}: {examples[0].get('kind')}: {examples[0].get('message')}" if examples else ""
    errors = said.get("errors")
    return View(
        name=status.name,
        state=status.state,
        rows=status.rows,
        rows_done=max(status.rows_done, 0),
        units=status.units,
        units_done=status.units_done,
        tokens_per_s=now if running else 0.0,
        mean_tokens_per_s=mean,
        share_of_raw=_share(said.get("account")),
        eta_s=by_speed,
        errors=dict(errors) if isinstance(errors, dict) else {},
        example=example[:200],
        usd=said.get("usd") if isinstance(said.get("usd"), int | float) else None,
        replicas=len(said.get("replicas", [])) if running else 0,
        links=links_of(status),
        age_s=status.age_s,
        canary_over=said.get("canary") in ("done", "stopped"),
    )


def links_of(status: Status) -> tuple[tuple[str, str], ...]:
    """What serves while the job goes on, and where its report lies once somebody made it."""
    links, served = [], status.said.get("metrics")
    if status.state in GOES_ON and isinstance(dashboard := status.said.get("dashboard"), str):
        links.append(("dashboard", dashboard))
    if status.state in GOES_ON and isinstance(served, list) and served:
        more = f", of replicas up to {served[-1]}" if len(served) > 1 else ""
        links.append(("metrics", f"{served[0]}{more}"))
    return (*links, ("report", f"{storage.join(status.out_uri, layout.REPORT)}, made by `tokenmill report` at any time"))


def facts(view: View) -> list[tuple[str, str]]:
    """The view in words but for its links, a name and a text each."""
    share = view.rows_done / max(1, view.rows)
    found = [
        ("job", f"{view.name}: {view.state}"),
        ("rows", f"{view.rows_done:,} of {view.rows:,} ({share:.0%}) in {view.units_done:,} of {view.units:,} units"),
    ]
    if view.mean_tokens_per_s is not None:
        now = f"{view.tokens_per_s:,.0f} now, " if view.tokens_per_s else ""
        found.append(("output tok/s", f"{now}{view.mean_tokens_per_s:,.0f} on average"))
    if view.share_of_raw is not None:
        found.append(("of raw engine", f"{view.share_of_raw:.1%}"))
    if view.eta_s is not None:
        low, high = (seconds_words(seconds) for seconds in view.eta_s)
        found.append(("time left", low if low == high else f"{low} to {high}"))
    if view.errors:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(view.errors.items()))
        found.append(("error rows", f"{kinds}; {view.example}" if view.example else kinds))
    if view.usd is not None:
        found.append(("cost so far", f"{view.usd:,.2f} USD"))
    if view.replicas:
        found.append(("replicas", f"{view.replicas} alive"))
    if view.age_s is not None and view.replicas and view.age_s > 30:
        found.append(("last heard of", f"{seconds_words(view.age_s)} ago"))
    return found


def in_rich(view: View) -> Group:
    """For a terminal."""
    share = view.rows_done / max(1, view.rows)
    bar = "━" * round(share * _BAR_CHARACTERS) + "╌" * (_BAR_CHARACTERS - round(share * _BAR_CHARACTERS))
    table = Table.grid(padding=(0, 2))
    for name, text in (*facts(view), *view.links):
        table.add_row(Text(name, style="dim"), Text(text))
    return Group(Text(bar, style="green"), table)


def in_html(view: View) -> str:
    """For a notebook. Everything that comes from data is escaped."""
    share = view.rows_done / max(1, view.rows)
    cells = [*((name, html.escape(text)) for name, text in facts(view)), *((name, _linked(text)) for name, text in view.links)]
    rows = "".join(
        f'<tr><td style="text-align:left;opacity:.6;padding-right:1em">{html.escape(name)}</td><td style="text-align:left">{text}</td></tr>'
        for name, text in cells
    )
    bar = (
        '<div style="height:8px;max-width:32em;border-radius:4px;background:rgba(127,127,127,.25)">'
        f'<div style="height:8px;width:{share:.1%};border-radius:4px;background:#2e9e5b"></div></div>'
    )
    return f'<div style="font-family:sans-serif">{bar}<table>{rows}</table></div>'


def _linked(text: str) -> str:
    """Escaped; addresses of the web can be followed."""
    return _ADDRESS.sub(r'<a href="\g<0>" target="_blank" rel="noopener">\g<0></a>', html.escape(text))


class Drawing(Protocol):
    """Shows a view, again and again in one place."""

    def update(self, view: View) -> None: ...

    def show(self, rows: object, note: str) -> None:
        """Rows beside it, once; only the note where it is kept in a file."""
        ...

    def close(self) -> None: ...


class Live:
    """The drawing that fits where this runs: a notebook, a terminal, or lines."""

    def __init__(self) -> None:
        self._drawing = _notebook() or (_Terminal() if sys.stderr.isatty() else _Lines())
        self.has_shown = False
        """Whether rows were shown beside it."""

    def update(self, view: View) -> None:
        self._drawing.update(view)

    def show(self, rows: object, note: str) -> None:
        self.has_shown = True
        self._drawing.show(rows, note)

    def close(self) -> None:
        self._drawing.close()


class _Terminal:
    def __init__(self) -> None:
        self._live = RichLive(console=Console(stderr=True), auto_refresh=False)
        self._live.start()

    def update(self, view: View) -> None:
        self._live.update(in_rich(view), refresh=True)

    def show(self, rows: object, note: str) -> None:
        self._live.console.print(repr(rows), markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()


class _Lines:
    """Where output is a file: a line now and then, and whenever the state changes; links when they are others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._next, self._state = clock, 0.0, ""
        self._links: tuple[tuple[str, str], ...] = ()

    def update(self, view: View) -> None:
        if self._clock() >= self._next or view.state != self._state:
            self._next, self._state = self._clock() + _LINE_EVERY_S, view.state
            print("; ".join(text for _, text in facts(view)), file=sys.stderr, flush=True)
        if view.links != self._links:
            self._links = view.links
            print("; ".join(f"{name}: {text}" for name, text in view.links), file=sys.stderr, flush=True)

    def show(self, rows: object, note: str) -> None:
        print(note, file=sys.stderr, flush=True)

    def close(self) -> None:
        return


class _Widget:
    """ipywidgets, which keep their place and last state in a saved notebook."""

    def __init__(self, widgets: Any, display: Callable[..., Any]) -> None:
        self._html, self._display = widgets.HTML(), display
        display(self._html)

    def update(self, view: View) -> None:
        self._html.value = in_html(view)

    def show(self, rows: object, note: str) -> None:
        self._display(rows)

    def close(self) -> None:
        return


class _Output:
    """IPython's own display, where ipywidgets are not installed."""

    def __init__(self, display: Callable[..., Any], as_html: Callable[[str], Any]) -> None:
        self._as_html, self._display = as_html, display
        self._handle = display(as_html(""), display_id=True)

    def update(self, view: View) -> None:
        self._handle.update(self._as_html(in_html(view)))

    def show(self, rows: object, note: str) -> None:
        self._display(rows)

    def close(self) -> None:
        return


def _notebook() -> Drawing | None:
    """None outside a notebook's kernel. Imports nothing that is not there already."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import HTML
    from IPython.display import display

    try:
        import ipywidgets
    except ImportError:
        return _Output(display, HTML)
    return _Widget(ipywidgets, display)


def _number(said: dict[str, Any], key: str) -> float:
    value = said.get(key, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _share(account: Any) -> float | None:
    if not isinstance(account, dict):
        return None
    try:
        return share_of_raw(RunAccount.model_validate_json(json.dumps(account)), once_up=True)
    except ValidationError:
        return None
