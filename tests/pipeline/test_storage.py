"""What only one kind of storage can do, and what is refused. What all of them do: test_storage_conformance.py."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import ClassVar

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jobs import api
from pipeline import storage
from schemas import layout
from schemas.errors import JobError
from schemas.job import JobSpec


def names_below(root: str) -> list[str]:
    """Every file's name below a folder, hidden ones too."""
    fs, path = fsspec.url_to_fs(root)
    return sorted(str(found)[len(path) :].lstrip("/") for found in fs.find(path))


def found(uri: str, root: str) -> list[str]:
    """The names that a listing gives, relative to the root."""
    base = storage.absolute(root).rstrip("/") + "/"
    return [item.uri.removeprefix(base) for item in storage.list_objects(uri)]


@pytest.mark.parametrize("uri", ["nonsense://bucket/a", "nonsense://bucket/*.parquet"])
def test_an_unknown_kind_of_storage_is_refused(uri: str) -> None:
    with pytest.raises(JobError, match=r"cannot open this kind of storage .*use a path, az://, abfss:// or memory://"):
        storage.list_objects(uri)


@pytest.mark.parametrize(("uri", "package"), [("s3://bucket/out", "s3fs"), ("gs://bucket/out", "gcsfs")])
def test_a_store_whose_package_is_not_installed_says_which_one(uri: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    assert storage.check_can_create(uri) == "put_if_absent"
    for act in (storage.list_objects, storage.list_names, storage.read_bytes):
        with pytest.raises(JobError, match=f"pip install {package}"):
            act(uri)


class PlainFileSystem(MemoryFileSystem):
    """A store of which nobody knows a put-if-absent."""

    protocol = ("plain",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]


@pytest.fixture
def plain() -> Iterator[str]:
    """Its URI. What tests opted into is taken back."""
    fsspec.register_implementation("plain", PlainFileSystem, clobber=True)
    yield f"plain://{uuid.uuid4().hex}"
    PlainFileSystem.store.clear()
    storage.commit_as("put_if_absent")


def test_a_store_without_a_known_put_if_absent_is_refused_for_output(plain: str) -> None:
    with pytest.raises(JobError, match=r"output.uri: no put-if-absent is known for plain://.*output.commit: overwrite"):
        storage.create_once(f"{plain}/a", b"x")
    assert storage.list_names(plain) == {}


def test_who_opts_in_gets_one_object_a_name_and_a_probe_that_asks_no_more(plain: str) -> None:
    storage.commit_as("overwrite")
    assert storage.check_can_create(plain) == "overwrite"
    storage.probe(plain)
    storage.create_once(f"{plain}/a", b"first")
    with pytest.raises(FileExistsError):
        storage.create_once(f"{plain}/a", b"second")
    assert storage.read_bytes(f"{plain}/a") == b"first"


@pytest.mark.parametrize("uri", ["az://container/out", "abfss://c@account.dfs.core.windows.net/out", "memory://out"])
def test_the_weaker_way_is_not_taken_where_the_stronger_one_is_certain(plain: str, uri: str) -> None:
    storage.commit_as("overwrite")
    assert storage.check_can_create(uri) == "put_if_absent"


def test_a_job_that_opts_in_runs_and_says_so_everywhere(plain: str, make_job: Callable[..., JobSpec], write_table: Any) -> None:
    write_table([{"prompt": f"row {number}"} for number in range(40)])
    with pytest.raises(JobError, match="no put-if-absent is known for plain://"):
        api.run(make_job(output={"uri": f"{plain}/out"}))
    said = io.StringIO()
    result = api.run(make_job(output={"uri": f"{plain}/out", "commit": "overwrite"}), stream=said)
    assert api.verify(result.out_uri).complete
    assert "output.commit is overwrite: of two writers of one part at the same moment the last one wins" in said.getvalue()
    parts = [name for name in storage.list_names(result.out_uri) if name.endswith(".parquet")]
    assert parts
    for name in parts:
        metadata = pq.read_metadata(storage.open_read(storage.join(result.out_uri, name))).metadata
        assert json.loads(metadata[b"tokenmill.provenance"])["commit"] == "overwrite"
    manifest = pq.read_metadata(storage.open_read(storage.join(result.out_uri, layout.MANIFEST)))
    assert manifest.metadata[b"tokenmill.commit"] == b"overwrite"


def test_an_output_begun_the_weaker_way_does_not_pass_for_a_strong_one(make_job: Callable[..., JobSpec], write_table: Any) -> None:
    write_table([{"prompt": "row"}])
    api.run(make_job(output={"commit": "overwrite"}))
    with pytest.raises(JobError, match=r"output.commit: .* was begun with overwrite, and its parts may be"):
        api.run(make_job())
    assert api.run(make_job(output={"commit": "overwrite"})).exit_code == 0
    storage.commit_as("put_if_absent")


def test_an_ordinary_job_records_that_its_parts_were_created_once(make_job: Callable[..., JobSpec], write_table: Any) -> None:
    write_table([{"prompt": "row"}])
    result = api.run(make_job())
    part = next(Path(result.out_uri).glob("part-*.parquet"))
    assert json.loads(pq.read_metadata(part).metadata[b"tokenmill.provenance"])["commit"] == "put_if_absent"


def test_a_folder_without_hard_links_is_refused_and_takes_the_weaker_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT, blobfuse and some network mounts answer."""

    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(JobError, match=r"cannot write to .* has no hard links, which put-if-absent needs; .*output.commit: overwrite"):
        storage.probe(str(tmp_path))
    storage.commit_as("overwrite")
    try:
        storage.probe(str(tmp_path))
        storage.create_once(str(tmp_path / "a"), b"x")
    finally:
        storage.commit_as("put_if_absent")
    assert names_below(str(tmp_path)) == ["a"]


def test_a_folder_that_takes_no_writes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for uri in (str(tmp_path / "file"), str(tmp_path / "file" / "out"), "/proc/tokenmill"):
        with pytest.raises(JobError, match=r"output.uri: cannot write to "):
            storage.probe(uri)
    assert names_below(str(tmp_path)) == ["file"]


def test_an_input_below_a_file_is_a_wrong_job(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(JobError, match=r"input.uri: "):
        storage.list_objects(str(tmp_path / "a.parquet" / "b.parquet"))


def test_linked_files_are_input_too(tmp_path: Path) -> None:
    """Hub caches are folders of links; leaving links out would lose rows without a word."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1234").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"x")
    (tmp_path / "in" / "b.parquet").symlink_to(tmp_path / "blobs" / "1234")
    root = str(tmp_path / "in")
    assert (found(root, root), found(f"{root}/*.parquet", root)) == (["a.parquet", "b.parquet"], ["a.parquet", "b.parquet"])


def test_a_failed_local_create_leaves_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        storage.create_once(str(tmp_path / "a"), "text, not bytes")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_local_object_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power after a commit was acknowledged must not lose the part, or leave half of it under its name."""
    told: list[tuple[str, str]] = []
    fsync, link = os.fsync, os.link

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        told.append(("fsync", "folder" if path == tmp_path else f"{path.name[:5]} of {path.stat().st_size}"))

    def linked(source: Path, target: Path) -> None:
        link(source, target)
        told.append(("link", target.name))

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.link", linked)
    storage.create_once(str(tmp_path / "part"), b"twelve bytes")
    assert told == [("fsync", ".tmp- of 12"), ("link", "part"), ("fsync", "folder")]


def test_a_full_disk_is_no_object() -> None:
    with pytest.raises(OSError):
        storage.create_once("/dev/full/a", b"x")


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1234").write_bytes(b"half")
    (tmp_path / "part.parquet").write_bytes(b"whole")
    storage.sweep_temporaries(str(tmp_path))
    assert os.listdir(tmp_path) == ["part.parquet"]


def test_a_half_written_local_file_is_no_input_and_no_part(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1234").write_bytes(b"half")
    (tmp_path / "a.parquet").write_bytes(b"x")
    assert found(str(tmp_path), str(tmp_path)) == ["a.parquet"]


def test_a_relative_path_is_named_so_that_others_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("in/*.parquet") == f"{tmp_path}/in/*.parquet"
    assert storage.absolute("file:///data/in/") == "/data/in"
    assert storage.absolute("~/in") == "/home/someone/in"
    assert storage.absolute("az://container/in/") == "az://container/in"
    assert storage.absolute("memory://in") == "memory://in"


@pytest.mark.parametrize(
    ("uri", "scheme"), [("/a/b", "file"), ("a:b/c", "file"), ("file:///a", "file"), ("memory://a", "memory"), ("abfss://c@a.b/d", "abfss")]
)
def test_a_plain_path_is_a_file(uri: str, scheme: str) -> None:
    assert storage.scheme_of(uri) == scheme


def test_joining_does_not_double_slashes() -> None:
    assert storage.join("memory://a/", "b", "c") == "memory://a/b/c"


def test_no_name_from_inputs_or_job_fields_leads_out_of_the_output(
    tmp_path: Path, make_job: Callable[..., JobSpec], write_table: Any
) -> None:
    """Names of parts are ours alone; odd names of files, columns and fields stay what they are: data. (A leading dot hides a file.)"""
    write_table([{"prompt": "a", "../../column": "x"}], name="in/x..parquet")
    write_table([{"prompt": "b", "../../column": "y"}], name="in/a/b../%2e%2e%2f.parquet")
    write_table([{"prompt": "c", "../../column": "z"}], name="in/a/ .. /x\\..\\y.parquet")
    job = make_job(name="a..b", input={"uri": str(tmp_path / "in")}, output={"uri": str(tmp_path / "out"), "prefix": "../../"})
    before = set(tmp_path.rglob("*"))
    assert api.run(job).exit_code == 0
    new = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - {path.relative_to(tmp_path) for path in before}
    assert {path.parts[0] for path in new} == {"out"}
    assert all(path.name.startswith("part-") or path.parts[1] in ("_tokenmill", "_SUCCESS") for path in new if len(path.parts) > 1)
    assert api.verify(str(tmp_path / "out")).rows_proven == 3
