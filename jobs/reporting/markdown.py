"""A document in, Markdown out, for chats and pull requests: the same words and tables; of plots what they show."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jobs.reporting.document import Document
from jobs.reporting.document import Section
from jobs.reporting.document import Table

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&])")


def to_markdown(document: Document) -> str:
    """Ends in a newline."""
    lines = [f"# {escaped(document.name)}: {escaped(document.state)}", "", escaped(document.lead), ""]
    if document.so_far:
        lines += [f"> {escaped(document.so_far)}", ""]
    tiles = Table(columns=("", "", ""), num_words=3, rows=tuple((tile.label, tile.value, tile.note) for tile in document.tiles))
    lines += [*_table(tiles), ""]
    for section in document.sections:
        lines += _section(section)
    return "\n".join([*lines, escaped(document.made), ""])


def escaped(text: str) -> str:
    """In one line, and nothing in it is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _section(section: Section) -> Iterator[str]:
    yield from (f"## {escaped(section.title)}", "")
    for words in section.words:
        yield from (escaped(words), "")
    if section.facts:
        yield from (*(f"- {escaped(label)}: {escaped(value)}" for label, value in section.facts), "")
    for plot in section.plots:
        yield from (f"**{escaped(plot.title)}.** {escaped(plot.says)}", "")
    for table in section.tables:
        if table.title:
            yield from (f"### {escaped(table.title)}", "")
        yield from (*_table(table), "")
        if table.note:
            yield from (escaped(table.note), "")
    for title, text in section.code:
        longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        yield from (f"### {escaped(title)}", "", fence, text.rstrip("\n"), fence, "")


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(escaped(column) for column in table.columns)} |"
    yield f"|{'|'.join('---' if number < table.num_words else '---:' for number in range(len(table.columns)))}|"
    for row in table.rows:
        yield f"| {' | '.join(escaped(cell) for cell in row)} |"
