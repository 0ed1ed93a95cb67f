"""The worker image: its Dockerfile linted and held to rules, its packages resolved for both platforms, its small scripts run."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.batch
_ROOT = Path(__file__).resolve().parents[2]
_IMAGE = _ROOT / "infra" / "image"
_DOCKERFILE = _IMAGE / "Dockerfile"
_HADOLINT = Path(sys.executable).with_name("hadolint")
_CHECK = runpy.run_path(str(_IMAGE / "check.py"))


def lint(text: str) -> list[str]:
    """hadolint's rules that the text breaks; it holds a real parser of Dockerfiles."""
    done = subprocess.run([_HADOLINT, "--format", "json", "-"], input=text, capture_output=True, text=True, check=False)
    return [one["code"] for one in json.loads(done.stdout)]


def instructions(text: str) -> list[tuple[str, str]]:
    """Continued lines joined, comments left out."""
    plain = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = [" ".join(line.split()) for line in re.sub(r"\\\n", " ", plain).splitlines() if line.strip()]
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in lines)]


def broken(text: str) -> list[str]:
    """Our own rules."""
    steps = instructions(text)
    arguments = dict(rest.split("=", 1) for word, rest in steps if word == "ARG" and "=" in rest)
    bases = [
        re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match.group(1), ""), rest.split()[0]) for word, rest in steps if word == "FROM"
    ]
    wrong = [f"{base} is not pinned to a version" for base in bases if not re.search(r":\d+\.\d+(\.\d+)?-", base)]
    if len(bases) < 2:
        wrong.append("compilers and caches of the build stay in the image: one stage only")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[-1]):
        wrong.append(f"runs as {users[-1:] or 'root'}, expected a number that is not root's")
    if [rest for word, rest in steps if word == "ENTRYPOINT"] != ['["/usr/bin/tini", "--", "/usr/local/bin/tokenmill"]']:
        wrong.append("its entry point is not tokenmill's")
    wrong += [f"{word} {rest}: fetched from elsewhere" for word, rest in steps if word == "ADD" or "://" in rest]
    wrong += [
        f"{word} {rest}: a secret"
        for word, rest in steps
        if word in ("ARG", "ENV") and re.search(r"(?i)password|token=|secret|_key=", rest)
    ]
    kernels = [index for index, (word, rest) in enumerate(steps) if word == "RUN" and "flashinfer download-kernels" in rest]
    checks = [index for index, (word, rest) in enumerate(steps) if word == "RUN" and "infra/image/check.py" in rest]
    if not kernels or not checks or checks[-1] < kernels[-1]:
        wrong.append("FlashInfer's kernels are not baked in, or that is not checked afterwards")
    return wrong


def ignored(path: str) -> bool:
    """As docker reads .dockerignore: the last line that fits decides, and a folder's line fits what is in it."""
    parts = path.split("/")
    ways = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    out = False
    for line in (_ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            if any(
                fnmatch.fnmatchcase(way, pattern) or ("**/" in line and fnmatch.fnmatchcase(way.split("/")[-1], pattern)) for way in ways
            ):
                out = not line.startswith("!")
    return out


@pytest.mark.slow
def test_the_linter_has_nothing_to_say() -> None:
    assert lint(_DOCKERFILE.read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("FROM python:${PYTHON} AS build", "FROM python:latest AS build", "DL3007"),
        ("--no-install-recommends ", "", "DL3015"),
        ("uv==0.13.9", "uv", "DL3013"),
        ("COPY README.md LICENSE ./", "COPY README.md LICENSE .. && ls", "DL3021"),
        ('CMD ["--help"]', "CMD --help", "DL3025"),
    ],
)
def test_the_linter_says_something_where_there_is_something_to_say(old: str, new: str, code: str) -> None:
    text = _DOCKERFILE.read_text()
    assert old in text
    assert code in lint(text.replace(old, new))


def test_it_holds_to_our_rules() -> None:
    assert broken(_DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("ARG PYTHON=3.12.12-slim-bookworm", "ARG PYTHON=slim", "not pinned"),
        ("USER 10001:10001", "USER root", "runs as"),
        ("USER 10001:10001", "", "runs as"),
        ("-m flashinfer download-kernels", "-m flashinfer show-config", "not baked in"),
        ("/usr/local/bin/tokenmill\"]", "/bin/sh\"]", "entry point"),
        ("COPY schemas schemas", "ADD https://example.org/schemas.tar schemas", "fetched from elsewhere"),
        ("    DO_NOT_TRACK=1", "    REGISTRY_PASSWORD=hunter2", "a secret"),
        ("FROM python:${PYTHON} AS final", "", "one stage"),
    ],
)  # fmt: skip
def test_each_of_our_rules_finds_what_it_is_for(old: str, new: str, found: str) -> None:
    text = _DOCKERFILE.read_text()
    assert old in text
    assert [problem for problem in broken(text.replace(old, new)) if found in problem]


def test_pip_is_there_by_which_flashinfer_fetches_its_kernels() -> None:
    """uv makes environments without it."""
    runs = [rest for word, rest in instructions(_DOCKERFILE.read_text()) if word == "RUN"]
    install, fetch = (
        [words in rest for rest in runs].index(True) for words in ("--requirements infra/image/requirements.in", "download-kernels")
    )
    assert install < fetch
    assert re.search(r"^pip==", (_IMAGE / "requirements.in").read_text(), flags=re.MULTILINE)


def test_the_build_gets_what_it_copies_and_nothing_that_lies_about() -> None:
    copied = [rest.split()[:-1] for word, rest in instructions(_DOCKERFILE.read_text()) if word == "COPY" and "--from" not in rest]
    sources = [path for paths in copied for path in paths if not path.startswith("--")]
    assert sources
    assert [path for path in sources if not (_ROOT / path).exists() or ignored(path)] == []
    assert not ignored("pipeline/profiles/local-gpu.yaml")
    outside = [
        ".git/config",
        ".venv/bin/python",
        "tests/conftest.py",
        "infra/main.bicep",
        "key.pem",
        "jobs/__pycache__/api.pyc",
        "demo/out",
    ]
    assert [path for path in outside if not ignored(path)] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["worker", "--name", "a b"], "tokenmill: worker,--name,a b"),
        (["tokenmill", "worker", "job.yaml"], "tokenmill: worker,job.yaml"),
        (["/bin/echo", "hello"], "hello"),
        (["--help"], "tokenmill: --help"),
        ([], "tokenmill: "),
    ],
)
def test_the_entry_point_takes_what_docker_and_batch_give_it(tmp_path: Path, words: list[str], said: str) -> None:
    done = entry(tmp_path, words, {"HOME": str(tmp_path), "USER": "me"})
    assert done.stdout.splitlines()[0] == said


def test_a_user_whom_the_image_does_not_know_has_a_home_and_a_name(tmp_path: Path) -> None:
    done = entry(tmp_path, ["worker"], {"HOME": "/nowhere", "TMPDIR": str(tmp_path)})
    home, user = done.stdout.splitlines()[1].split()
    assert Path(home).parent == tmp_path
    assert user == "tokenmill"
    known = entry(tmp_path, ["worker"], {"HOME": str(tmp_path), "USER": "me"})
    assert known.stdout.splitlines()[1] == f"{tmp_path} me"


def entry(folder: Path, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The script as it is, but for where the image has its command; a stand-in prints what it is given."""
    command = folder / "bin" / "tokenmill"
    command.parent.mkdir(exist_ok=True)
    command.write_text('#!/bin/sh\n(IFS=,; echo "tokenmill: $*")\necho "$HOME $USER"\n')
    command.chmod(0o755)
    script = folder / "script"
    script.write_text((_IMAGE / "tokenmill").read_text().replace("/opt/tokenmill/bin", str(command.parent)))
    script.chmod(0o755)
    return subprocess.run([script, *words], env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, check=True)


def test_the_build_stops_where_a_node_without_internet_would_lack_something(tmp_path: Path) -> None:
    (tmp_path / "nvidia/cu13/bin").mkdir(parents=True)
    (tmp_path / "nvidia/cu13/bin/nvcc").write_text("")
    whole = {
        "flashinfer-python": "0.7.0.post1",
        "flashinfer-cubin": "0.7.0.post1",
        "flashinfer-jit-cache": "0.7.0.post1+cu130",
        "tokenmill": "0.1.0",
        "vllm": "0.32.0",
        "ninja": "1.13",
    }
    problems = _CHECK["problems"]
    assert problems(whole, tmp_path) == []
    assert len(problems(whole | {"flashinfer-cubin": "0.6.13"}, tmp_path)) == 1
    assert len(problems({name: version for name, version in whole.items() if name != "flashinfer-jit-cache"}, tmp_path)) == 1
    assert len(problems({name: version for name, version in whole.items() if name != "ninja"}, tmp_path)) == 1
    assert len(problems(whole, tmp_path / "elsewhere")) == 1
    assert "flashinfer-python is not installed" in problems({}, tmp_path)


def test_constraints_are_exact_versions_and_name_no_address() -> None:
    lines = (_IMAGE / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[a-z0-9.+!]+", line)] == []
    pinned = dict(line.split("==") for line in lines)
    assert {"vllm", "torch", "flashinfer-python", "nvidia-cuda-nvcc", "adlfs", "distributed", "pip"} <= set(pinned)
    asked = re.findall(r"^([\w-]+)==([\d.]+)", (_IMAGE / "requirements.in").read_text(), flags=re.MULTILINE)
    assert [(name, version) for name, version in asked if pinned[name] != version] == []
    python = re.search(r"ARG PYTHON=(\d+\.\d+)", _DOCKERFILE.read_text())
    assert python is not None
    assert f"--python-version {python.group(1)} " in (_IMAGE / "lock").read_text()


def test_the_image_s_packages_can_be_had_for_both_platforms() -> None:
    """A dry run: descriptions are downloaded, no CUDA."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists() and shutil.which("uv") is None:
        pytest.skip("uv is not installed; .ci/setup does that")
    for _ in range(3):  # a registry may hiccup
        done = subprocess.run(
            [_IMAGE / "lock", "--check"],
            env={**os.environ, "UV": str(uv if uv.exists() else "uv")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            break
    if re.search(
        "error sending request|Failed to fetch|Failed to download|timed out|50[234]|dns error|No route", done.stderr
    ) and not os.environ.get("CI"):
        pytest.skip(f"no package registry can be reached: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["x86_64", "aarch64"]
