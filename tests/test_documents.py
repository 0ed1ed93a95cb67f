"""What README, CONTRIBUTING and CHANGELOG say is true of the real commands, files and fields."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import yaml

import jobs
from jobs.cli import main
from schemas.job import parse_job

_ROOT = Path(__file__).resolve().parent.parent
_README, _CONTRIBUTING, _CHANGELOG = _ROOT / "README.md", _ROOT / "CONTRIBUTING.md", _ROOT / "CHANGELOG.md"
_PAGES = [
    _README,
    *(_ROOT / folder / "README.md" for folder in ("jobs", "pipeline", "jobs/cluster", "tests/chaos", "infra", "infra/grafana")),
]
"""What users read: first steps, and a page beside each part."""
_DOCUMENTS = [*_PAGES, _CONTRIBUTING]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"(?<![\w./~$-])((?:schemas|pipeline|jobs|infra|tests|\.ci)/[\w./*-]*)")
_TOP_FILE = re.compile(r"`((?:[A-Z][A-Za-z]*\.md)|LICENSE|Makefile|pyproject\.toml)`")
_LINK = re.compile(r"\]\(([^)#]+)\)")
_POINTER = re.compile(r"\b[Ss]ee ([\w/]*README(?:\.md)?)(?:, ([A-Z][^.;)]*))?")


def blocks(path: Path, language: str | None = None) -> list[str]:
    """The code blocks of a page, or those in one language."""
    return [body for name, body in fences(path.read_text()) if language is None or name == language]


def fences(text: str) -> list[tuple[str, str]]:
    """Language and body of every code block, in order."""
    return [(name, body) for name, body in _FENCE.findall(text)]


def is_of_prometheus(block: str) -> bool:
    """No job, nor part of one; tests/infra/test_grafana.py reads it."""
    return block.startswith("scrape_configs:")


def without_fences(text: str) -> str:
    return _FENCE.sub("", text)


def command_lines(path: Path) -> list[list[str]]:
    """Every `tokenmill ...` of a page's code blocks, as arguments."""
    text = "\n".join(block.replace("\\\n", " ") for block in blocks(path))
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if re.match(r"(\.venv/bin/)?tokenmill\b", line) else []
        stop = next((index for index, word in enumerate(words) if word in ("|", "&&", "||", ";", ">", ">>", "&")), len(words))
        if words:
            found.append(words[1:stop])
    return found


def parse(arguments: list[str]) -> None:
    """Parse with the real command, run nothing. Raises click.UsageError.

    Under its group, always: click keeps in a command the help option that its first parse made, which has `-h` from there.
    """
    with contextlib.suppress(click.exceptions.Exit), main.make_context("tokenmill", list(arguments)) as context:  # Exit: --help
        name, command, rest = main.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        command.make_context(name, rest, parent=context).close()


def all_command_lines() -> list[list[str]]:
    return [line for path in _DOCUMENTS if path.exists() for line in command_lines(path)]


def test_a_wrong_command_line_would_be_found() -> None:
    """The control of the next test."""
    parse(["run", "job.yaml", "--max-tokens", "5"])
    for wrong in (["run", "--max-token-count", "5"], ["fly", "job.yaml"], ["verify"], ["run", "--engine", "steam"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


@pytest.mark.parametrize("arguments", all_command_lines(), ids=shlex.join)
def test_a_command_line_in_the_documents_is_one_of_the_real_command(arguments: list[str]) -> None:
    parse(arguments)


def test_readme_shows_the_commands_in_code() -> None:
    shown = {line[0] for line in command_lines(_README) if line}
    assert {"run", "verify", "plan", "status", "cancel"} <= shown


@pytest.mark.parametrize("name", sorted(main.commands))
def test_a_page_names_every_command(name: str) -> None:
    said = "\n".join(page.read_text() for page in _PAGES)
    assert re.search(rf"\btokenmill {name}\b", said), f"no page mentions `tokenmill {name}`"


def test_readme_opens_with_what_it_is_and_the_two_commands() -> None:
    text = _README.read_text()
    assert text.startswith("# Tokenmill\n")
    (first, *_) = blocks(_README)
    assert [line.split("#")[0].strip() for line in first.splitlines() if line.strip()] == ["make demo", "make test"]


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_files_and_folders_that_are_mentioned_exist(path: Path) -> None:
    text = path.read_text()
    named = {name.rstrip(".,:;") for name in _PATH.findall(text)} | set(_TOP_FILE.findall(text))
    assert named or path.parent.name == "chaos", f"{path} mentions no file"
    assert sorted(name for name in named if not list(_ROOT.glob(name.rstrip("/")))) == []


@pytest.mark.parametrize("path", [*_DOCUMENTS, _CHANGELOG], ids=lambda path: str(path.relative_to(_ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    local = [link for link in _LINK.findall(path.read_text()) if not link.startswith(("http://", "https://", "mailto:"))]
    assert [link for link in local if not (path.parent / link).exists()] == []


def pointers() -> list[tuple[str, str]]:
    """Page and section of every `see PAGE, SECTION` in help texts, messages and docstrings; the section is empty where none is named."""
    files = [path for package in ("schemas", "pipeline", "jobs") for path in (_ROOT / package).rglob("*.py")]
    texts = [node.value for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return [found for text in texts if isinstance(text, str) for found in _POINTER.findall(" ".join(text.split()))]


def sections(page: str) -> list[str]:
    return re.findall(r"^##+ (.*)$", without_fences((_ROOT / page).read_text()), re.MULTILINE) if page.endswith(".md") else []


def test_a_section_that_a_message_names_is_on_its_page() -> None:
    """Exactly as its heading is."""
    assert len(pointers()) >= 3
    assert [(page, section) for page, section in pointers() if section not in sections(page)] == []


def test_a_pointer_to_nothing_would_be_found() -> None:
    """The control of the one above."""
    said = "no TLS; see README, Security. See `tokenmill run --help`; see README. (see jobs/README.md, Reuse)"
    assert _POINTER.findall(said) == [("README", "Security"), ("README", ""), ("jobs/README.md", "Reuse")]
    assert sections("README") == []
    assert "Reuse" in sections("jobs/README.md")


def test_make_targets_that_are_mentioned_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set()
    for path in _DOCUMENTS:
        text = path.read_text()
        mentioned |= set(re.findall(r"`make ([a-z][\w-]*)`", text))
        mentioned |= {line.split()[1] for block in blocks(path) for line in block.splitlines() if line.startswith("make ")}
    assert {"demo", "test"} <= mentioned
    assert mentioned - targets == set()


def test_the_tree_in_contributing_names_what_there_is() -> None:
    """Both ways: no file that is not there, and no module left out."""
    (tree,) = [block for block in blocks(_CONTRIBUTING) if block.startswith("schemas/")]
    missing, named, top = [], set(), _ROOT
    for line in tree.splitlines():
        if line and not line.startswith(" "):
            top = _ROOT / line.split("/")[0]
        inner = re.match(r"  (\w+)/", line)
        for name in re.findall(r"\b\w+\.(?:py|yaml)\b", line):
            places = [top / name, top / inner.group(1) / name] if inner else [top / name]
            named |= {place for place in places if place.exists()}
            missing += [] if any(place.exists() for place in places) else [f"{top.name}: {name}"]
    assert missing == []
    modules = {path for package in ("schemas", "pipeline", "jobs") for path in (_ROOT / package).rglob("*.py")}
    assert sorted(str(path.relative_to(_ROOT)) for path in modules - named if path.name != "__init__.py") == []


def test_markers_that_are_mentioned_exist() -> None:
    options = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    known = {marker.split(":")[0] for marker in options["markers"]}
    mentioned = set(re.findall(r"marker `(\w+)`", _CONTRIBUTING.read_text()))
    assert {"chaos", "engine"} <= mentioned <= known


def test_job_files_in_the_pages_are_accepted() -> None:
    whole = [yaml.safe_load(block) for page in _PAGES for block in blocks(page, "yaml") if not is_of_prometheus(block)]
    jobs = [data for data in whole if "model" in data]
    assert jobs
    base = jobs[0]
    for data in whole:
        parse_job({**base, **data})


def test_python_in_readme_uses_names_that_exist() -> None:
    sources = blocks(_README, "python")
    assert sources
    used = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jobs"
    }
    assert used
    assert [name for name in sorted(used) if not callable(getattr(jobs, name, None))] == []


def test_every_exit_code_is_told() -> None:
    text = "\n".join(page.read_text() for page in _PAGES)
    (said,) = re.findall(r"Exit codes: (.*?)\.\s", text, re.DOTALL)
    assert re.findall(r"\b(?:0|1|2|3|130)\b", said) == ["0", "1", "2", "3", "130"]


def test_the_changelog_has_a_place_for_what_is_new() -> None:
    version = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[([^\]]+)\]", _CHANGELOG.read_text(), re.MULTILINE)
    assert headings
    assert headings[0] in ("Unreleased", version)


def test_the_licence_is_apache_2() -> None:
    text = (_ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
