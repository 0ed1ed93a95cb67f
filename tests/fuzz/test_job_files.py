"""Whatever a job file holds: a JobSpec or a JobError, in a message of bounded length that repeats no secret."""

from __future__ import annotations

import copy
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jobs.api import load_job
from schemas.errors import JobError
from schemas.job import JobSpec
from schemas.job import json_schema
from schemas.job import parse_job
from tests.fuzz.conftest import examples

_MAX_MESSAGE = 20_000
_SECRET = "s3cr3tS3CR3T+/==" * 2
_SECRET_KEYS = (
    "account_key", "AccountKey", "api_key", "client_secret", "connection_string", "credential", "key", "password", "sas", "sas_token",
    "secret", "storage_options", "token",
)  # fmt: skip
_VALID: dict[str, Any] = {
    "name": "fuzz",
    "model": "model",
    "input": {"uri": "in/*.parquet", "prompt": "prompt"},
    "output": {"uri": "out"},
    "sampling": {"max_tokens": 4, "temperature": 0.5, "stop": ["x"]},
    "engine": {"kind": "simulated", "options": {"decode_tokens_per_s": 1000.0}},
    "cluster": {"kind": "inline"},
    "limits": {"attempts": 2},
}


def known_words() -> list[str]:
    """Every key and every constant of the job file's schema: random text alone would hardly get past the first check."""
    words: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            words.update(node.get("properties", {}))
            words.update(value for value in node.get("enum", []) if isinstance(value, str))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(yaml.safe_load(json_schema()))
    return sorted(words)


WORDS = known_words()
KEYS = st.one_of(st.sampled_from(WORDS), st.sampled_from(_SECRET_KEYS), st.text(max_size=8))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(WORDS), st.binary(max_size=8), st.dates(),
    st.sampled_from(["az://c/in", "memory://x", "s3://b/x", "abfss://c@a/x", "file:///x", "{", "{a!r}", "x" * 5000, "\ud800", "\0"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=12
)


@st.composite
def damaged_jobs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid job with a few places changed, added or taken away."""
    data = copy.deepcopy(_VALID)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = data
        while draw(st.booleans()):
            inner = [key for key, value in place.items() if isinstance(value, dict)]
            if not inner:
                break
            place = place[draw(st.sampled_from(sorted(inner, key=repr)))]
        key = draw(st.one_of(st.sampled_from(sorted(place, key=repr)), KEYS)) if place else draw(KEYS)
        if key in place and draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(VALUES)
    return data


def accept_or_refuse(read: Callable[[Any], JobSpec], given: Any) -> tuple[JobSpec | None, str]:
    """The job, or in which words it was refused; the words stay short, whatever was found."""
    try:
        job, refused = read(given), ""
    except JobError as error:
        job, refused = None, str(error)
    assert (job is None) == (0 < len(refused) < _MAX_MESSAGE)
    return job, refused


@settings(max_examples=examples(100))
@given(VALUES)
@example({})
@example([])
@example({1: 2})
@example({"model": {}, "input": {}, "output": {}})
def test_any_value_is_a_job_or_refused(data: Any) -> None:
    accept_or_refuse(parse_job, data)


@settings(max_examples=examples(300))
@given(damaged_jobs())
def test_a_damaged_job_is_a_job_or_refused(data: dict[str, Any]) -> None:
    job, _ = accept_or_refuse(parse_job, data)
    if job is not None:  # what was accepted can be written down and read again: it is how workers hear of it
        assert parse_job(job.model_dump(by_alias=True, exclude_unset=True, mode="json")) == job


def test_the_job_that_is_damaged_is_whole() -> None:
    """The control."""
    assert accept_or_refuse(parse_job, _VALID)[0] is not None


@st.composite
def jobs_with_a_secret(draw: st.DrawFn) -> dict[str, Any]:
    """A damaged job with a secret under a key where people put them, or inside a URI."""
    data = draw(damaged_jobs())
    value = draw(st.sampled_from([_SECRET, [_SECRET], {"value": _SECRET}]))
    sections = [data, *(section for section in data.values() if isinstance(section, dict))]
    place = draw(st.sampled_from(sections))
    place[draw(st.sampled_from(_SECRET_KEYS))] = value
    return data


@settings(max_examples=examples(300))
@given(jobs_with_a_secret())
@example({"input": {"account_key": _SECRET}, "model": "m", "output": {"uri": "out"}})
@example({"storage": {"connection_string": _SECRET}})
@example({**_VALID, "output": {"sas_token": _SECRET}})
@example({**_VALID, "input": {"prompt": "p", "credential": {"value": _SECRET}}})
def test_no_refusal_repeats_a_secret(data: dict[str, Any]) -> None:
    _, refused = accept_or_refuse(parse_job, data)
    assert _SECRET[:12] not in refused


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "job.yaml"


def load_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    job, refused = accept_or_refuse(load_job, path)
    assert job is not None or str(path) in refused


@settings(max_examples=examples(100))
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_job_file_or_refused(job_file: Path, content: bytes) -> None:
    load_or_refuse(job_file, content)


@settings(max_examples=examples(100))
@given(content=st.text(alphabet=string.printable + "äß\u2028\ufeff", max_size=200))
def test_any_text_is_a_job_file_or_refused(job_file: Path, content: str) -> None:
    load_or_refuse(job_file, content.encode())


@settings(max_examples=examples(200))
@given(data=st.one_of(VALUES, damaged_jobs()), cut=st.integers(0, 400))
def test_any_yaml_whole_or_cut_is_a_job_file_or_refused(job_file: Path, data: Any, cut: int) -> None:
    try:
        content = yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    load_or_refuse(job_file, content)
    load_or_refuse(job_file, content[:cut])


HOSTILE = {
    "nested lists": b"[" * 100_000,
    "nested mappings": b"{a: " * 50_000,
    "nested blocks": b"- " * 50_000,
    "a date that is none": b"name: 2001-13-45\n",
    "a time that is none": b"name: 2001-12-14t21:59:43.10-99:99\n",
    "a huge integer": b"limits: {attempts: " + b"9" * 10_000 + b"}\n",
    "a list in itself": b"&a [*a]\n",
    "a mapping in itself": b"input: &a {uri: x, prompt: *a}\nmodel: m\noutput: {uri: out}\n",
    "options in themselves": b"model: m\ninput: {uri: x, prompt: p}\noutput: {uri: out}\nengine: &a {options: *a}\n",
    "options in a list in themselves": b"model: m\ninput: {uri: x, prompt: p}\noutput: {uri: out}\nengine: {options: &a {b: [*a]}}\n",
    "a billion laughs": b"a: &a [l,l,l,l,l,l,l,l,l]\n" + b"".join(
        b"%c: &%c [%s]\n" % (new, new, b",".join([b"*%c" % old] * 9)) for old, new in zip(b"abcdefgh", b"bcdefghi", strict=True)
    ) + b"input: *i\n",
    "a python object": b"model: !!python/object/apply:os.system [exit]\n",
    "a key that is a list": b"? [a, b]\n: c\n",
    "a key that is a mapping": b"{{a: b}: c}\n",
    "two documents": b"a: b\n---\nc: d\n",
    "a null byte": b"model: \"\\0\"\n",
    "a control character": b"model: \x07\n",
    "half a surrogate pair": b'model: "\\ud800"\n',
    "latin-1": "name: ä\n".encode("latin-1"),
    "utf-16": "name: x\n".encode("utf-16"),
    "no value": b"",
    "a merge of nothing": b"<<: 1\n",
    "a set": b"!!set {a, b}\n",
    "pairs": b"!!omap [a: b]\n",
    "binary that is none": b"model: !!binary '*'\n",
    "an integer that is none": b"model: !!int 'x'\n",
    "a float that is none": b"model: !!float 'x'\n",
    "sexagesimals": b"limits: {attempts: 1:2:3}\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_job_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(HOSTILE[kind])
    job, _ = accept_or_refuse(load_job, path)
    if job is not None:
        parse_job(job.model_dump(by_alias=True, exclude_unset=True, mode="json"))
