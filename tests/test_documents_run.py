"""Every command and code block of README and of the pages beside the code is run, from top to bottom, as a reader would.

Shell blocks run one command after the other with bash, in a folder that holds a small table and the page's own job file; Python blocks run
in order, as one script; what YAML a page shows is a job file, or goes into README's. Three tables say all that is otherwise: what does
not run here, what runs with more options than the page gives, what may end with another exit code than 0. A row of theirs that fits no
command any more is an error. Of commands inside sentences and tables, mostly long measurements, it is only seen that there are such.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from schemas.job import parse_job
from tests.azurite import CONNECTION_STRING
from tests.azurite import Azurite
from tests.batch_http import serving
from tests.commands import TOKENMILL
from tests.commands import Command
from tests.test_documents import fences
from tests.test_documents import is_of_prometheus
from tests.test_documents import parse
from tests.test_documents import without_fences

_ROOT = Path(__file__).resolve().parent.parent
_GSM8K = _ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"
_README, _JOBS, _PIPELINE, _CLUSTER, _CHAOS, _INFRA, _GRAFANA = _PAGES = (
    "README.md", "jobs/README.md", "pipeline/README.md", "jobs/cluster/README.md", "tests/chaos/README.md", "infra/README.md",
    "infra/grafana/README.md",
)  # fmt: skip
_ROWS = 18
"""README generates row 17 once more."""
_PATIENCE_S = 600.0
"""Of one command: an engine's start takes 15 s here, and minutes on a machine with other work."""
_SHOWN = 3000

_USERS_CACHE = Path(os.environ.get("TOKENMILL_CACHE") or Path.home() / ".cache" / "tokenmill")
"""Taken before the tests' own: the demo model is made once."""

_AZURE = "asks Azure itself, with a subscription; what it creates is checked offline by tests/infra"
_DOCKER = "builds or runs the worker image: 10 GB from the internet; tests/infra/test_image.py reads its files"
NOT_RUN = {
    (_README, "make demo"): "`bash .ci/run` runs it after all tests",
    (_README, "make test"): "this is part of it",
    (_README, "tokenmill demo --output demo"): "the same as `make demo`",
    (_README, "tokenmill tune job.yaml"): "ten minutes of engines; tests/jobs/test_tune.py has a short search with the real one",
    (_README, "tokenmill model prepare demo"): "minutes; tests/jobs/test_prepare_model.py does it with a tiny model and the real engine",
    (_JOBS, "storage:"): "names an Azure account; tests/pipeline/test_storage_conformance.py has each way in, on Azurite",
    (_INFRA, "az "): _AZURE,
    (_INFRA, "for name in Batch Compute"): _AZURE,
    (_INFRA, "export TOKENMILL_"): "names for the commands after it, two of which Azure says",
    (_INFRA, "registry=$(az"): _AZURE,
    (_INFRA, "tokenmill keys ./keys"): "tests/infra/test_scale_set.py runs it",
    (_INFRA, "tokenmill submit job.yaml"): "its job file is what Azure printed; jobs/cluster/README.md's is run",
    (_INFRA, "tokenmill scheduler"): "tests/infra/test_scale_set.py runs it, on Azurite",
    (_INFRA, "tokenmill run job.yaml"): "tests/infra/test_scale_set.py runs it, on Azurite",
    (_INFRA, "curl "): "asks Azure's price list, in the internet",
    (_INFRA, "docker "): _DOCKER,
    (_GRAFANA, "scrape_configs:"): "is for Prometheus; tests/infra/test_grafana.py reads it",
}
"""By page and how the command begins: why it is not run."""

ADDED = {
    (_README, "tokenmill plan job.yaml"): ("--engine simulated --output planned/", "spares an engine's start"),
    (_README, "tokenmill bench engine job.yaml"): ("--engine simulated --rounds 1", "spares an engine's start and two rounds"),
    (_README, "tokenmill rehearse"): ("--nodes 1 --engines 1 --rows 200 --max-tokens 8", "a quarter of an hour otherwise"),
    (_README, "tokenmill run --model demo --input 'in/*.parquet' --prompt 'Answer"): ("--engine simulated", "spares an engine's start"),
    (_CLUSTER, "tokenmill scheduler"): ("--listen tls://127.0.0.1:0 --dashboard none", "whatever port is free"),
    (_CLUSTER, "tokenmill worker"): ("--engine simulated --replicas 1", "spares an engine's start"),
    (_CLUSTER, "tokenmill run job.yaml"): ("--engine simulated", "as its workers"),
    (_CLUSTER, "tokenmill preflight"): ("--seconds 4 --skip network", "half a minute otherwise"),
    (_CLUSTER, "tokenmill rehearse --nodes 2"): ("--engines 1 --rows 200 --max-tokens 8", "minutes otherwise"),
    (_CLUSTER, "tokenmill rehearse"): ("--nodes 1 --engines 1 --rows 200 --max-tokens 8", "a quarter of an hour otherwise"),
}
"""What a command gets beside what the page says, or instead (the last of two `--rows` counts), and why."""

ALSO_ENDS_WITH = {
    (_README, "tokenmill replay"): (1, "16-bit arithmetic: alone, a row may come out otherwise than it did in a batch"),
    (_CLUSTER, "tokenmill preflight"): (1, "a machine with other work is slow"),
}

STAYS = {
    (_CLUSTER, "tokenmill scheduler"): "scheduler at tls://",
    (_CLUSTER, "tokenmill worker"): "joined tls://",
}
"""Commands that run until they are stopped, and what they say once they are up."""

_Table = dict[tuple[str, str], Any]


def shell_commands(block: str) -> list[str]:
    """One by one: a loop, or a line that goes on in the next one, is one command."""
    found, open_lines = [], ""
    for line in block.splitlines():
        open_lines += line.removeprefix("$ ") + "\n"
        whole = (
            not line.endswith("\\")
            and subprocess.run(["bash", "-n"], input=open_lines, text=True, stderr=subprocess.DEVNULL).returncode == 0
        )
        if whole:
            found += [open_lines.strip()] if open_lines.strip() and not open_lines.lstrip().startswith("#") else []
            open_lines = ""
    return [*found, open_lines.strip()] if open_lines.strip() else found


def sections_of(page: str) -> list[list[tuple[str, str]]]:
    """Language and text of every block, in order, by the page's headings."""
    return [fences(section) for section in re.split(r"^## ", (_ROOT / page).read_text(), flags=re.MULTILINE)]


def of_page(page: str) -> list[tuple[str, str]]:
    return [block for section in sections_of(page) for block in section]


def commands_of(page: str) -> list[str]:
    return [command for language, block in of_page(page) if language == "sh" for command in shell_commands(block)]


def row_of(table: _Table, page: str, text: str) -> Any:
    """What the table says of it: the row with the longest beginning that fits, or None."""
    fitting = [(len(prefix), row) for (where, prefix), row in table.items() if where == page and text.startswith(prefix)]
    return max(fitting, key=lambda each: each[0])[1] if fitting else None


def with_added(page: str, command: str) -> str:
    """As it is run: with what ADDED has for it, before a comment or what follows."""
    added = row_of(ADDED, page, command)
    return re.sub(r"\s+#\s.*$", "", command) + f" {added[0]}" if added else command


def job_file(page: str = _README) -> dict[str, Any]:
    """The whole job file that a page shows."""
    (found,) = [data for data in map(yaml.safe_load, yaml_blocks(page)) if "model" in data]
    assert isinstance(found, dict)
    return found


def yaml_blocks(page: str) -> list[str]:
    return [block for language, block in of_page(page) if language == "yaml"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Somebody at a terminal, in a folder with a table."""

    folder: Path
    environment: dict[str, str]

    def has(self, job: dict[str, Any]) -> None:
        (self.folder / "job.yaml").write_text(yaml.safe_dump(job))

    def types(self, page: str, command: str) -> str:
        """Run it to its end, as the tables have it. What it said; fails where it does."""
        typed = with_added(page, command)
        done = self._run(["bash", "-c", typed])
        also = row_of(ALSO_ENDS_WITH, page, command)
        said = done.stdout[-_SHOWN:]
        assert done.returncode in {0, also[0] if also else 0}, f"{page}: {typed}\nended with {done.returncode}:\n{said}"
        assert "Traceback (most recent call last)" not in done.stdout, f"{page}: {typed}\n{said}"
        return done.stdout

    def executes(self, page: str, source: str) -> None:
        """A script of a page's Python blocks."""
        done = self._run([sys.executable, "-c", source])
        assert done.returncode == 0, f"{page}:\n{source}\nended with {done.returncode}:\n{done.stdout[-_SHOWN:]}"

    def reads(self, page: str, here: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
        """Everything on the page that runs here, from top to bottom; commands that stay are stopped at the end.

        A section's YAML is its job file, or goes into README's. `here` makes of it what it has to be on this machine.
        """
        python = [block for language, block in of_page(page) if language == "python"]
        with contextlib.ExitStack() as stack:
            for section in sections_of(page):
                told = [yaml.safe_load(block) for language, block in section if language == "yaml"]
                for data in told:
                    self.has(here(data if "model" in data else {**job_file(), **data}))
                for command in (each for language, block in section if language == "sh" for each in shell_commands(block)):
                    if row_of(NOT_RUN, page, command) is None:
                        self.starts_or_types(stack, page, command)
            if python:
                self.executes(page, "\n".join(python))

    def starts_or_types(self, stack: contextlib.ExitStack, page: str, command: str) -> None:
        up = row_of(STAYS, page, command)
        if up is None:
            self.types(page, command)
            return
        words = [word.replace("~", self.environment["HOME"]) for word in with_added(page, command).split()]
        stays = Command(self.folder / "logs", *words[1:], environment=self.environment)
        stack.callback(stays.kill)
        stays.wait_for(up)

    def _run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        began = time.monotonic()
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, text=True, errors="replace", timeout=_PATIENCE_S,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(f"{time.monotonic() - began:6.1f} s  {words[-1]}")  # seen with pytest -rP
        return done


def _questions() -> list[dict[str, str]]:
    """Rows with `question` and `answer`: GSM8K's, or the demo's prompts where it is not at hand."""
    if _GSM8K.is_file():
        return [json.loads(line) for line in _GSM8K.read_text().splitlines()[:_ROWS]]
    lines = (_ROOT / "jobs" / "demo_prompts.jsonl").read_text().splitlines()[:_ROWS]
    return [{"question": json.loads(line)["prompt"], "answer": "42"} for line in lines]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """With a home and a cache of its own, in which the demo model is the user's."""
    models = _USERS_CACHE / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder, cache, home = (tmp_path / name for name in ("work", "cache", "home"))
    for path in (folder / "in", cache, home):
        path.mkdir(parents=True)
    (cache / "models").symlink_to(models)
    pq.write_table(pa.Table.from_pylist(_questions()), folder / "in" / "gsm8k.parquet")
    programs = f"{Path(TOKENMILL).parent}{os.pathsep}{os.environ['PATH']}"
    yield Reader(folder=folder, environment={**os.environ, "PATH": programs, "HOME": str(home), "TOKENMILL_CACHE": str(cache)})
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def azure_reader(reader: Reader, azurite: Azurite) -> Reader:
    """The same, for whom az:// is Azurite with the containers that pages name."""
    with azurite.client() as client:
        there = {each.name for each in client.list_containers()}
        for name in {"runs", "input", "output", "models", "keys", "rehearsals"} - there:
            client.create_container(name).close()
    return Reader(folder=reader.folder, environment={**reader.environment, CONNECTION_STRING: azurite.connection_string})


# What is on the pages, and in the tables.


def test_a_loop_is_one_command_and_comments_are_none() -> None:
    block = "# first\na --b  # c\nfor x in 1 2; do\n    echo $x\ndone\n\nd \\\n  e\n"
    assert shell_commands(block) == ["a --b  # c", "for x in 1 2; do\n    echo $x\ndone", "d \\\n  e"]


@pytest.mark.parametrize("page", _PAGES)
def test_every_block_says_in_which_language_it_is(page: str) -> None:
    """`text` is for drawings."""
    assert {language for language, _ in of_page(page)} <= {"sh", "python", "yaml", "text"}


def test_only_the_drawing_in_readme_is_text() -> None:
    drawings = [(page, block) for page in _PAGES for language, block in of_page(page) if language == "text"]
    assert [(page, "──▶" in block) for page, block in drawings] == [(_README, True)]


@pytest.mark.parametrize("table", [NOT_RUN, ADDED, ALSO_ENDS_WITH, STAYS], ids=["NOT_RUN", "ADDED", "ALSO_ENDS_WITH", "STAYS"])
def test_every_row_of_the_tables_is_about_a_command_on_its_page(table: _Table) -> None:
    stale = [
        (page, prefix) for page, prefix in table if not any(text.startswith(prefix) for text in [*commands_of(page), *yaml_blocks(page)])
    ]
    assert stale == []


@pytest.mark.parametrize("table", [ADDED, ALSO_ENDS_WITH, STAYS], ids=["ADDED", "ALSO_ENDS_WITH", "STAYS"])
def test_what_is_not_run_is_not_changed_either(table: _Table) -> None:
    changed = [(page, prefix) for page, prefix in table if all(row_of(NOT_RUN, page, c) for c in commands_of(page) if c.startswith(prefix))]
    assert changed == []


_OF_JOBS = [(page, block) for page in _PAGES for block in yaml_blocks(page) if not is_of_prometheus(block)]


@pytest.mark.parametrize(("page", "block"), _OF_JOBS)
def test_yaml_on_a_page_is_a_job_or_part_of_one(page: str, block: str) -> None:
    parse_job({**job_file(), **yaml.safe_load(block)})


def test_a_command_that_fails_is_found(reader: Reader) -> None:
    """The control of all that follows."""
    reader.types(_README, "tokenmill --version")
    with pytest.raises(AssertionError, match="ended with 2"):
        reader.types(_README, "tokenmill verify --no-such-option out/")
    with pytest.raises(AssertionError, match="ended with 1"):
        reader.executes(_README, "import jobs\njobs.no_such_function()")


# The pages.


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.azurite  # for `doctor az://...`
@pytest.mark.timeout(1800)
def test_readme_runs_with_the_demo_model_on_the_real_engine(azure_reader: Reader) -> None:
    azure_reader.reads(_README)
    said = azure_reader.types(_README, "tokenmill verify out/")
    assert f"complete: {_ROWS} of {_ROWS} rows" in said
    part = next((azure_reader.folder / "out").glob("part-*.parquet"))
    assert "vllm" in str(pq.read_metadata(part).metadata)
    assert all(pq.read_table(part)["completion"].to_pylist())


_FRAGMENTS = [
    (page, block) for page in (_JOBS, _PIPELINE, _CHAOS, _GRAFANA) for block in yaml_blocks(page) if row_of(NOT_RUN, page, block) is None
]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("page", "block"), _FRAGMENTS, ids=[f"{page}:{block.split(':')[0]}" for page, block in _FRAGMENTS])
def test_a_section_runs_in_readmes_job_file_on_the_simulated_engine(page: str, block: str, reader: Reader) -> None:
    reader.has({**job_file(), "engine": {"kind": "simulated"}, **yaml.safe_load(block)})
    reader.types(page, "tokenmill run job.yaml")
    assert f"complete: {_ROWS} of {_ROWS} rows" in reader.types(page, "tokenmill verify out/")


_IDENTITY = job_file(_CLUSTER)["cluster"]["identity"]


@pytest.mark.long
@pytest.mark.batch
@pytest.mark.azurite
@pytest.mark.timeout(900)
def test_the_page_on_clusters_runs_on_azurite_and_the_tests_own_batch_service(
    azure_reader: Reader, azurite: Azurite, tiny_model: Path
) -> None:
    """Simulated engines; a tiny model in the place of the one that the page names."""
    folder = azure_reader.folder
    with azurite.client() as client:
        for path in tiny_model.iterdir():
            client.get_blob_client("models", f"llama-3.3-70b/{path.name}").upload_blob(path.read_bytes(), overwrite=True)
        table = (folder / "in" / "gsm8k.parquet").read_bytes()
        client.get_blob_client("input", "gsm8k.parquet").upload_blob(table, overwrite=True)
    with serving(folder / "batch", azurite) as site:
        site.service.add_pool("drivers", nodes=1, identity=_IDENTITY, slots=4)
        site.service.add_pool("workers", nodes=4, identity=_IDENTITY)

        def here(job: dict[str, Any]) -> dict[str, Any]:
            if job["cluster"]["kind"] != "azure-batch":
                return job
            cluster = {**job["cluster"], "endpoint": site.endpoint, "nodes": 4, "scratch": str(folder / "scratch")}
            kept = {name: value for name, value in job.items() if name != "storage"}  # Azurite's account is in the environment
            return {**kept, "engine": {"kind": "simulated"}, "cluster": cluster}

        token = {name: value for name, value in site.environment.items() if name.startswith(("REQUESTS_", "IDENTITY_"))}
        Reader(folder=folder, environment={**azure_reader.environment, **token}).reads(_CLUSTER, here)
        for output in ("out/", "az://output/night"):
            assert f"complete: {_ROWS} of {_ROWS} rows" in azure_reader.types(_CLUSTER, f"tokenmill verify {output}")


@pytest.mark.parametrize("page", [_JOBS, _PIPELINE, _CHAOS, _INFRA, _GRAFANA])
def test_pages_without_a_test_of_their_own_have_no_command_that_runs_here(page: str) -> None:
    assert [command for command in commands_of(page) if row_of(NOT_RUN, page, command) is None] == []
    assert [language for language, _ in of_page(page) if language == "python"] == []


# Commands inside sentences and tables.


def in_sentences(*beginnings: str) -> list[str]:
    """Those that begin so and have arguments, on all pages, once each."""
    spans = [span for page in _PAGES for span in re.findall(r"`([^`\n]+)`", without_fences((_ROOT / page).read_text()))]
    return sorted({span for span in spans if span.startswith(beginnings)})


@pytest.mark.parametrize("command", [each for each in in_sentences("tokenmill ") if " --" in each])
def test_a_command_in_a_sentence_is_one_of_the_real_command(command: str) -> None:
    parse(shlex.split(command)[1:])


@pytest.mark.long
@pytest.mark.parametrize("command", in_sentences("python -m tests.", ".venv/bin/python -m tests."))
def test_a_measurement_that_is_named_has_these_options(command: str) -> None:
    words = shlex.split(command)
    module = words[2]
    said = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert [word for word in words[3:] if word.startswith("--") and word not in said] == []


@pytest.mark.long
@pytest.mark.parametrize("command", in_sentences("pytest ", "TOKENMILL_PAIRS="))
def test_tests_that_are_named_are_found(command: str) -> None:
    words = [word for word in shlex.split(command) if "=" not in word]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--collect-only", "-q"], cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-_SHOWN:]  # 5 where nothing is selected
