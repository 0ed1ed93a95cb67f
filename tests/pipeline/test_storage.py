"""Storage on local paths and in memory: one suite for both, and what only one of them can do."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from schemas.errors import JobError


@pytest.fixture(params=["local", "file-url", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty folder's URI."""
    if request.param == "memory":
        name = uuid.uuid4().hex
        yield f"memory://{name}"
        fs = fsspec.filesystem("memory")
        if fs.exists(f"/{name}"):
            fs.rm(f"/{name}", recursive=True)
    else:
        yield f"file://{tmp_path}" if request.param == "file-url" else str(tmp_path)


def names_below(root: str) -> list[str]:
    """Every file's name below a folder, hidden ones too."""
    fs, path = fsspec.url_to_fs(root)
    return sorted(str(found)[len(path) :].lstrip("/") for found in fs.find(path))


def found(uri: str, root: str) -> list[str]:
    """The names that a listing gives, relative to the root."""
    base = storage.absolute(root).rstrip("/") + "/"
    return [item.uri.removeprefix(base) for item in storage.list_objects(uri)]


def test_what_is_created_is_read_back(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    storage.create_once(uri, b"\x00data")
    assert storage.read_bytes(uri) == b"\x00data"
    assert storage.exists(uri)
    assert storage.info(uri).size_bytes == 5


def test_an_empty_object_is_an_object(root: str) -> None:
    storage.create_once(storage.join(root, "empty"), b"")
    assert storage.read_bytes(storage.join(root, "empty")) == b""
    with pytest.raises(FileExistsError):
        storage.create_once(storage.join(root, "empty"), b"x")


def test_a_second_create_fails_and_the_first_bytes_survive(root: str) -> None:
    uri = storage.join(root, "a")
    storage.create_once(uri, b"first")
    with pytest.raises(FileExistsError):
        storage.create_once(uri, b"second, and longer")
    assert storage.read_bytes(uri) == b"first"
    assert names_below(root) == ["a"]


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads are switched as often as they can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty")
def test_of_many_writers_one_wins_whole(root: str) -> None:
    for round_number in range(20):
        uri, outcomes = storage.join(root, "folder", f"{round_number:02d}"), dict[int, bool]()
        start = threading.Barrier(8)

        def write(number: int, uri: str = uri, outcomes: dict[int, bool] = outcomes, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                storage.create_once(uri, bytes([number]) * 10_000)
                outcomes[number] = True
            except FileExistsError:
                outcomes[number] = False

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [number for number, won in outcomes.items() if won]
        assert len(outcomes) == 8
        assert len(winners) == 1
        assert storage.read_bytes(uri) == bytes(winners) * 10_000
    assert names_below(root) == [f"folder/{round_number:02d}" for round_number in range(20)]


def test_a_removed_object_is_gone_and_removing_it_again_is_nothing(root: str) -> None:
    uri = storage.join(root, "a")
    storage.create_once(uri, b"x")
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)
    assert names_below(root) == []


@pytest.mark.parametrize("act", [storage.read_bytes, storage.open_read, storage.info], ids=lambda act: act.__name__)
def test_a_missing_object_is_a_file_not_found(root: str, act: object) -> None:
    assert callable(act)
    with pytest.raises(FileNotFoundError):
        act(storage.join(root, "nothing"))


def test_replacing_writes_over_and_leaves_no_temporary(root: str) -> None:
    uri = storage.join(root, "status", "s.json")
    storage.replace(uri, b"one")
    storage.replace(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert names_below(root) == ["status/s.json"]


def test_a_version_changes_when_the_object_does(root: str) -> None:
    uri = storage.join(root, "a")
    storage.create_once(uri, b"one")
    before = storage.info(uri)
    assert storage.info(uri) == before
    storage.replace(uri, b"three")
    assert storage.info(uri).version != before.version


def test_an_opened_object_can_be_read_from_anywhere(root: str) -> None:
    uri = storage.join(root, "a")
    storage.create_once(uri, b"0123456789")
    with storage.open_read(uri) as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"789"
        file.seek(2)
        assert file.read(2) == b"23"


def test_two_readers_of_one_object_do_not_move_each_other(root: str) -> None:
    uri = storage.join(root, "a")
    storage.create_once(uri, b"0123456789")
    with storage.open_read(uri) as first, storage.open_read(uri) as second:
        assert first.read(4) == b"0123"
        assert second.read(2) == b"01"
        assert first.read(2) == b"45"


def test_a_closed_reader_leaves_the_object_readable(root: str) -> None:
    uri = storage.join(root, "a")
    storage.create_once(uri, b"0123456789")
    with storage.open_read(uri) as first:
        first.read(4)
    with storage.open_read(uri) as second:
        assert second.read() == b"0123456789"


def test_a_probe_passes_and_leaves_no_file(root: str) -> None:
    storage.probe(storage.join(root, "out"))
    assert names_below(root) == []


def test_a_file_names_itself(root: str) -> None:
    storage.create_once(storage.join(root, "a.data"), b"x")
    assert found(storage.join(root, "a.data"), root) == ["a.data"]


def test_a_folder_gives_its_parquet_files_in_order_without_hidden_ones(root: str) -> None:
    for name in ("b.parquet", "a.parquet", "c.pq", "sub/d.parquet", "notes.txt", ".hidden.parquet", "_tokenmill/plan.parquet", "_SUCCESS"):
        storage.create_once(storage.join(root, *name.split("/")), b"x")
    assert found(root, root) == ["a.parquet", "b.parquet", "c.pq", "sub/d.parquet"]
    assert found(root + "/", root) == found(root, root)


def test_a_folder_below_a_hidden_one_is_not_hidden_itself(root: str) -> None:
    storage.create_once(storage.join(root, "_work", "in", "a.parquet"), b"x")
    assert found(storage.join(root, "_work", "in"), root) == ["_work/in/a.parquet"]


def test_a_glob_gives_what_matches_in_order_without_hidden_names(root: str) -> None:
    for name in ("b.parquet", "a.parquet", "c.txt", "_d.parquet", ".e.parquet", "sub/f.parquet"):
        storage.create_once(storage.join(root, *name.split("/")), b"x")
    assert found(storage.join(root, "*.parquet"), root) == ["a.parquet", "b.parquet"]
    assert found(storage.join(root, "[a-b].parquet"), root) == ["a.parquet", "b.parquet"]
    assert found(storage.join(root, "*", "*.parquet"), root) == ["sub/f.parquet"]


def test_a_glob_over_all_folders_does_not_look_into_hidden_ones(root: str) -> None:
    for name in ("sub/part-0.parquet", "sub/_tokenmill/plan.parquet", "sub/.trash/old.parquet"):
        storage.create_once(storage.join(root, *name.split("/")), b"x")
    assert found(storage.join(root, "**", "*.parquet"), root) == ["sub/part-0.parquet"]


@pytest.mark.parametrize(
    ("name", "message"), [("nothing.parquet", "there is no "), ("*.parquet", "no file matches "), ("folder", "holds no .parquet file")]
)
def test_a_uri_that_names_nothing_is_a_wrong_job(root: str, name: str, message: str) -> None:
    storage.create_once(storage.join(root, "folder", "a.txt"), b"x")
    with pytest.raises(JobError, match=f"input.uri: .*{message}"):
        storage.list_objects(storage.join(root, name))


def test_names_and_sizes_are_those_of_the_folder_itself(root: str) -> None:
    for name in ("a", ".b", "sub/c"):
        storage.create_once(storage.join(root, *name.split("/")), b"xyz")
    assert storage.list_names(root) == {"a": 3, ".b": 3}
    assert storage.list_names(storage.join(root, "nothing")) == {}


@pytest.mark.parametrize("uri", ["nonsense://bucket/a", "nonsense://bucket/*.parquet"])
def test_an_unknown_kind_of_storage_is_refused(uri: str) -> None:
    with pytest.raises(JobError, match=r"cannot open this kind of storage .*use a path, az://, abfss:// or memory://"):
        storage.list_objects(uri)


def test_a_store_without_a_known_put_if_absent_is_refused_for_output() -> None:
    with pytest.raises(JobError, match=r"output.uri: no put-if-absent is known for data://"):
        storage.create_once("data://a", b"x")


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
