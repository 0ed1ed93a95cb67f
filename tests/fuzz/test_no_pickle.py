"""Nothing that is read from storage is ever executed: no pickle, no eval, no unsafe YAML in the three packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_FILES = sorted(path for package in ("schemas", "pipeline", "jobs") for path in (_ROOT / package).rglob("*.py"))
_MODULES = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
_CALLS = {"eval", "exec", "compile", "__import__"}
_METHODS = {"read_pickle", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}
_ARGUMENTS = {"allow_pickle", "trust_remote_code"}


def unsafe(source: str) -> list[str]:
    """What a file has of them, with the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {alias.name}" for alias in node.names if alias.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in _MODULES or node.module == "distributed.protocol.pickle":
                found.append(f"{node.lineno}: from {node.module}")
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in _CALLS:
                found.append(f"{node.lineno}: {called.id}()")
            if isinstance(called, ast.Attribute) and called.attr in _METHODS:
                found.append(f"{node.lineno}: {called.attr}()")
            if (
                isinstance(called, ast.Attribute)
                and called.attr in ("load", "load_all")
                and getattr(called.value, "id", "") in ("yaml", "torch")
            ):
                found.append(f"{node.lineno}: {ast.unparse(called)}()")
            found += [
                f"{node.lineno}: {argument.arg}"
                for argument in node.keywords
                if argument.arg in _ARGUMENTS and not (isinstance(argument.value, ast.Constant) and argument.value.value is False)
            ]
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(_ROOT)))
def test_nothing_unserialises_code(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "def f():\n    import cloudpickle", "import marshal, json",
        "eval('1')", "exec(text)", "np.load(f, allow_pickle=True)", "pd.read_pickle(f)", "yaml.load(text)", "yaml.unsafe_load(text)",
        "torch.load(f)", "f(trust_remote_code=flag)", "from distributed.protocol.pickle import loads",
    ],
)  # fmt: skip
def test_it_would_be_seen(source: str) -> None:
    """The control."""
    assert len(unsafe(source)) == 1


@pytest.mark.parametrize(
    "source", ["re.compile('x')", "json.load(f)", "yaml.safe_load(t)", "np.load(f, allow_pickle=False)", "model.eval()"]
)
def test_what_is_harmless_is_let_through(source: str) -> None:
    assert unsafe(source) == []
