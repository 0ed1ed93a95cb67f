"""The report as a page and as Markdown, of outputs that the real writers made: done, under way, damaged, hostile."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.api import run
from jobs.cli import main
from jobs.reporting import plots
from jobs.reporting.document import Document
from jobs.reporting.document import Section
from jobs.reporting.evidence import gather
from jobs.reporting.evidence import read_lengths
from jobs.reporting.html import to_html
from jobs.reporting.markdown import escaped
from jobs.reporting.markdown import to_markdown
from jobs.reporting.sections import balance
from jobs.reporting.sections import document
from jobs.reporting.sections import ledger
from jobs.reporting.sections import so_far
from jobs.reporting.sections import throughput
from jobs.reporting.write import write_report
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.ledger import KINDS
from tests.bench.report import build

_HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror="alert(2)">$\\frac{1}{2}$'


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("done"), units=24, rows=16, replicas=10)


@pytest.fixture(scope="module")
def under_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("under-way"), units=20, rows=16, replicas=2, done=9, limits={"usd_per_hour": 12.0})


@pytest.fixture(scope="module")
def made(done: Path) -> Document:
    return document(gather(str(done)))


@pytest.fixture(scope="module")
def made_so_far(under_way: Path) -> Document:
    return document(gather(str(under_way)))


def page_of(made: Document) -> Page:
    return Page(to_html(made).decode())


def test_the_page_has_everything_that_was_asked_for(made: Document) -> None:
    page = page_of(made)
    for words in (
        "complete", "Summary", "Throughput over time", "Engine seconds", "Balance between nodes", "Prompt lengths", "Completion lengths",
        "Finish reasons", "Error rows by kind", "Examples", "Repeated work", "Cost", "Provenance and how to reproduce",
        "tokenmill run job.yaml", "tokenmill verify", "max_tokens",
        "Tokenmill 0.1.0", "98.32 USD per node and hour", "nd96isr-h100-v5", "weights, sha256",
    ):  # fmt: skip
        assert words in page.text, words
    assert {"min", "max", "mean", "median", "sum", *(kind.replace("_", "-") for kind in KINDS)} <= set(page.text.split())
    assert page.tags.count("svg") == 6
    assert "So far" not in page.text


def test_the_page_loads_nothing_and_runs_nothing(made: Document) -> None:
    page = page_of(made)
    assert {address for address in page.addresses if not address.startswith("#")} == {"data:,"}
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    style = re.findall(r"url\(([^)]*)\)|@import", to_html(made).decode())
    assert all(address.startswith("#") for address in style)


def test_no_prompt_and_no_completion_is_in_the_page(made: Document) -> None:
    text = page_of(made).text
    assert "question" not in text
    assert "yes yes" not in text


def test_totals_are_those_of_the_parts(done: Path) -> None:
    found = gather(str(done))
    assert (len(found.units), sum(unit.rows for unit in found.units)) == (24, 384)
    assert found.status.state == "complete"
    assert found.lengths.completion.size == 384 - sum(unit.error_rows for unit in found.units)
    good = sum(unit.completion_tokens for unit in found.units)
    assert int(found.lengths.completion.sum()) == good


def test_the_manifest_and_the_footers_say_the_same(done: Path, tmp_path: Path) -> None:
    from_manifest = gather(str(done)).units
    copy = tmp_path / "out"
    shutil.copytree(done, copy)
    (copy / layout.MANIFEST).unlink()
    assert gather(str(copy)).units == from_manifest
    (copy / layout.MANIFEST).write_bytes(b"PAR1 damaged")
    assert gather(str(copy)).units == from_manifest


def test_an_unfinished_job_is_reported_so_far(made_so_far: Document) -> None:
    found = made_so_far
    assert (found.state, found.tone) == ("running", "plain")
    assert found.so_far.startswith("So far: 144 of 320 rows (45.0%) are committed. The job goes on")
    text = page_of(made_so_far).text
    assert "144 of 320 in 9 of 20 units" in text
    assert "12.00 USD per node and hour" in text


def test_the_price_of_a_node_may_be_said_for_a_page(done: Path, under_way: Path, tmp_path: Path) -> None:
    """Whatever the job, its runs and their profile said."""
    for out in (done, under_way):
        assert set(gather(str(out), usd_per_hour=3.5).usd_per_hour.values()) == {3.5}
    write_report(str(done), html=str(tmp_path / "r.html"), usd_per_hour=3.5)
    assert "3.50 USD per node and hour" in Page((tmp_path / "r.html").read_text()).text


def test_a_run_costs_what_it_knew_before_what_the_job_was_begun_with(under_way: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(under_way, out)
    said = json.loads((out / layout.STATUS).read_text())
    said["account"]["usd_per_hour"] = 20.0
    (out / layout.STATUS).write_text(json.dumps(said))
    assert list(gather(str(out)).usd_per_hour.values()) == [20.0]
    assert list(gather(str(under_way)).usd_per_hour.values()) == [12.0]


def test_tokens_that_were_copied_or_saved_are_named_with_the_speed_and_reused_ones_are_not_in_it(done: Path) -> None:
    found = gather(str(done))
    units = tuple(
        replace(unit, copied_tokens=10, resumed_tokens=0, reused_tokens=unit.completion_tokens * index // 23)
        for index, unit in enumerate(found.units)
    )
    section = throughput(replace(found, units=units))
    assert section is not None
    assert "Among them are 240 that were copied from identical rows." in section.plots[0].says
    assert (
        f"The {sum(unit.reused_tokens for unit in units):,} tokens of rows reused from earlier outputs are not in it."
        in section.plots[0].says
    )


def test_a_job_whose_rows_were_all_reused_has_rows_over_time_and_no_speed(done: Path) -> None:
    found = gather(str(done))
    section = throughput(replace(found, units=tuple(replace(unit, reused_tokens=unit.completion_tokens) for unit in found.units)))
    assert section is not None
    assert [plot.title for plot in section.plots] == ["Rows committed"]
    assert balance(replace(found, units=tuple(replace(unit, reused_tokens=unit.completion_tokens) for unit in found.units))) is not None


def test_a_job_whose_driver_is_silent_is_interrupted(under_way: Path) -> None:
    found = gather(str(under_way), now=4e9)
    assert found.status.state == "interrupted"
    assert "No run is at work; the same command again goes on from here." in so_far(found)


def test_what_comes_from_data_is_escaped(under_way: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(under_way, out)
    said = json.loads((out / layout.STATUS).read_text())
    said["account"] |= {"host": _HOSTILE, "profile": _HOSTILE, "engine": {"kind": _HOSTILE, "options": {"x": _HOSTILE}}}
    said["account"]["versions"] = {_HOSTILE: _HOSTILE}
    said["account"]["replicas"][0]["name"] = _HOSTILE
    said["failed_units"] = {"3": _HOSTILE}
    (out / layout.STATUS).write_text(json.dumps(said))
    made = document(gather(str(out)))
    page = Page(to_html(made).decode())
    assert not {"script", "img"} & set(page.tags)
    assert page.handlers == []
    assert page.text.count(_HOSTILE) >= 5
    assert "<script" not in to_markdown(made).replace("\\<", "")


def test_markdown_says_the_same_in_text(made: Document) -> None:
    text = to_markdown(made)
    assert text.startswith("# tickets: complete\n")
    assert "| replica | seconds | start | busy | starved | commit-blocked | tail | lost |" in text
    assert "## Cost" in text
    assert "```\ntokenmill run job.yaml" in text
    assert "<svg" not in text


@pytest.mark.parametrize(
    ("text", "expected"), [("a|b", "a\\|b"), ("<b>", "\\<b\\>"), ("a\nb", "a b"), ("`x`", "\\`x\\`"), ("*_[]", "\\*\\_\\[\\]")]
)
def test_markdown_has_no_markup_from_data(text: str, expected: str) -> None:
    assert escaped(text) == expected


def test_a_code_block_with_fences_in_it_stays_one() -> None:
    page = Document(
        name="n",
        state="s",
        tone="plain",
        so_far="",
        lead="l",
        made="m",
        tiles=(),
        sections=(Section(title="t", code=(("job", "a\n````\nb"),)),),
    )
    assert "\n`````\na\n````\nb\n`````\n" in to_markdown(page)


def test_of_many_parts_a_sample_is_read_with_both_ends(done: Path) -> None:
    names = sorted(path.name for path in done.glob("part-*"))
    found = read_lengths(str(done), names, prefix="", most=3)
    assert (found.num_parts, found.of_parts) == (3, 24)
    assert found.completion.size < 3 * 16
    assert read_lengths(str(done), [], prefix="").completion.size == 0


def test_colours_are_the_pages_own_and_text_is_text() -> None:
    svg = plots.stacked({"node-$x$": {"busy": 3.0, "lost": 1.0}})
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "var(--busy)" in svg
    assert "node-$x$" in svg
    assert "DejaVu" not in svg


@pytest.mark.parametrize(("name", "expected"), [("local-0", "local-0"), ("tvmps_0123456789abcdef_d-3", "tvmps_0…cdef_d-3")])
def test_long_names_keep_both_ends(name: str, expected: str) -> None:
    assert plots.shortened(name) == expected


@pytest.mark.slow
def test_the_command_writes_the_page_beside_the_job(done: Path) -> None:
    (done / layout.REPORT).unlink(missing_ok=True)
    ran = CliRunner().invoke(main, ["report", str(done)])
    assert ran.exit_code == 0, ran.output
    assert f"report: {done / layout.REPORT}" in ran.output
    assert (done / layout.REPORT).read_bytes().startswith(b"<!doctype html>")
    assert CliRunner().invoke(main, ["status", str(done)]).exit_code == 0  # it is nobody's part


@pytest.mark.slow
def test_the_command_writes_where_it_is_told(done: Path, tmp_path: Path) -> None:
    (done / layout.REPORT).unlink(missing_ok=True)
    ran = CliRunner().invoke(main, ["report", str(done), "--html", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "r.md").read_text().startswith("# tickets")
    assert not (done / layout.REPORT).exists()


def test_json_alone_writes_nothing(done: Path) -> None:
    (done / layout.REPORT).unlink(missing_ok=True)
    ran = CliRunner().invoke(main, ["report", str(done), "--json"])
    assert json.loads(ran.output)["num_requests"] == 384
    assert not (done / layout.REPORT).exists()


@pytest.mark.slow
def test_json_with_markdown_writes_that_alone(done: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, ["report", str(done), "--json", "--markdown", str(tmp_path / "r.md")])
    assert json.loads(ran.stdout)["num_requests"] == 384
    assert (tmp_path / "r.md").exists()
    assert not (done / layout.REPORT).exists()


@pytest.mark.slow
def test_a_place_that_cannot_be_written_to_is_named(done: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"--html: cannot write .*file/r\.html.*name another place with --html PATH"):
        write_report(str(done), html=str(tmp_path / "file" / "r.html"))


def test_a_long_table_is_folded_and_its_statistics_are_not(tmp_path: Path) -> None:
    many = ledger(gather(str(build(tmp_path, units=30, rows=16, replicas=30))))
    assert {table.title: table.folded for table in many.tables} == {"Over replicas": False, "Each replica": True}
    assert "Of 30 replicas the 12 least and the 12 most busy are drawn" in many.plots[0].says


def test_a_real_run_in_memory_has_its_page_there(
    make_job: Callable[..., JobSpec], write_table: Callable[..., Path], tmp_path: Path
) -> None:
    write_table([{"prompt": f"question {index}"} for index in range(40)] + [{"prompt": None}])
    out = f"memory://{tmp_path.name}-page"
    assert run(make_job(output={"uri": out, "prefix": "tm_"}), stream=io.StringIO()).state == "complete"
    assert write_report(out) == [f"{out}/{layout.REPORT}"]
    page = Page(storage.read_bytes(f"{out}/{layout.REPORT}").decode())
    assert "41 of 41 in" in page.text
    assert "Of all 40 committed rows that have a completion." in page.text
    assert "Not known: nobody has said what a node of profile simulated costs." in page.text
    assert "question" not in page.text
