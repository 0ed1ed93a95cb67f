"""Document: what a report says, whoever prints it. Plain text throughout; HTML and Markdown escape what they take from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "plain", "bad"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One of the figures at the top."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as text. The first columns are words, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    num_words: int = 1
    """Columns of words."""
    folded: bool = False
    """Whether a page shows it only when asked: a long one."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A picture as inline SVG, whose colours are CSS variables, and what it shows in a sentence."""

    title: str
    says: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """CSS variable and word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One heading and what stands below it, in this order."""

    title: str
    words: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    code: tuple[tuple[str, str], ...] = ()
    """Heading and text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A whole report."""

    name: str
    state: str
    tone: Tone
    so_far: str
    """What is not there yet; empty for a complete job."""
    lead: str
    made: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
