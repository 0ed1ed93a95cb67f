"""One suite over every store: what pipeline.storage promises of local folders, memory://, az:// and abfss://."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from pipeline import azure_blob
from pipeline import credentials
from pipeline import storage
from schemas.errors import JobError
from schemas.storage import StorageSpec
from tests.azurite import Azurite
from tests.chaos.proxy import before

_ROOT = Path(__file__).resolve().parents[2]
ODD_NAMES = [
    "two words",
    "ünïcödé-名前",
    "100%",
    "a%20b",
    "a+b",
    "a&b=c;d",
    "it's",
    "semi;colon",
    "a#b",
    "x..y",
    "~tilde",
    "(1)",
    "a@b:c",
    "..",
]
"""Names that URLs, shells or path rules could read otherwise. `..` is only ever part of a name here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """An empty folder in a store."""

    kind: str
    root: str
    names: Callable[[], list[str]]
    """Every object below the root, found by other means than pipeline.storage."""

    def at(self, *names: str) -> str:
        return storage.join(self.root, *names)

    def listed(self, uri: str) -> list[str]:
        """What list_objects gives, relative to the root."""
        base = storage.absolute(self.root).rstrip("/") + "/"
        return [item.uri.removeprefix(base) for item in storage.list_objects(uri)]


def _on_fsspec(kind: str, root: str) -> Store:
    def names() -> list[str]:
        fs, path = fsspec.url_to_fs(root)
        fs.invalidate_cache()  # of s3fs, which remembers folders
        return sorted(str(found)[len(path) :].lstrip("/") for found in fs.find(path))

    return Store(kind=kind, root=root, names=names)


S3 = ["s3"] if importlib.util.find_spec("s3fs") and importlib.util.find_spec("moto") else []
"""By moto, where somebody has installed both (pip install s3fs 'moto[server]'); 34 packages are too many for every set-up."""
AZURE = [pytest.param("az", marks=pytest.mark.azurite), pytest.param("abfss", marks=pytest.mark.azurite)]
ALL = ["local", "file-url", "memory", *AZURE, *S3]


def make_store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Of the kind that the test's parameter says."""
    kind, name = request.param, uuid.uuid4().hex
    if kind in ("local", "file-url"):
        folder = request.getfixturevalue("tmp_path")
        yield _on_fsspec(kind, f"file://{folder}" if kind == "file-url" else str(folder))
    elif kind == "memory":
        yield _on_fsspec(kind, f"memory://{name}")
        fs = fsspec.filesystem("memory")
        if fs.exists(f"/{name}"):
            fs.rm(f"/{name}", recursive=True)
    elif kind == "s3":
        root = f"s3://{request.getfixturevalue('s3')}/{name}"
        yield _on_fsspec(kind, root)
    else:
        service: Azurite = request.getfixturevalue("azurite")
        bucket: str = request.getfixturevalue("container")
        root = f"az://{bucket}/folder"
        if kind == "abfss":  # the account's name in the URI, and its place and key from the recipe
            root = f"abfss://{bucket}@{service.account}.dfs.core.windows.net/folder"
            patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
            patch.setenv("THE_KEY", service.key)
            spec = {"account_name": service.account, "endpoint": service.endpoint, "credential": {"kind": "account_key", "env": "THE_KEY"}}
            patch.setenv(credentials.VARIABLE, StorageSpec.model_validate(spec).model_dump_json(exclude_none=True))
        yield Store(kind=kind, root=root, names=lambda: sorted(found.removeprefix("folder/") for found in service.names(bucket)))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An empty bucket of a moto server, which this process, and those it starts, reach as s3://NAME."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(variable, "for-tests-only")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "bucket"
    server.stop()


@pytest.fixture(params=ALL)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Each store in turn."""
    yield from make_store(request)


@pytest.fixture(params=["local", AZURE[0]])
def shared_store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Each store that several processes can reach; abfss is az by another name."""
    yield from make_store(request)


@pytest.fixture(params=AZURE)
def azure(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Both ways to name Azure."""
    yield from make_store(request)


# Create and read.


@pytest.mark.parametrize("data", [b"", b"x", b"\x00\xff" * 50_000], ids=["empty", "one byte", "100 kB"])
def test_what_is_created_is_read_back(store: Store, data: bytes) -> None:
    uri = store.at("a", "b.bin")
    storage.create_once(uri, data)
    assert storage.read_bytes(uri) == data
    assert storage.exists(uri)
    assert storage.info(uri).size_bytes == len(data)
    assert storage.info(uri).uri == storage.absolute(uri)
    with storage.open_read(uri) as file:
        assert file.read() == data
    assert store.names() == ["a/b.bin"]


@pytest.mark.parametrize("first", [b"", b"first"], ids=["empty", "small"])
def test_a_second_create_fails_and_the_first_bytes_survive(store: Store, first: bytes) -> None:
    uri = store.at("a")
    storage.create_once(uri, first)
    for again in (b"second, and longer", b"", first):
        with pytest.raises(FileExistsError):
            storage.create_once(uri, again)
    assert storage.read_bytes(uri) == first
    assert store.names() == ["a"]


@pytest.mark.slow
def test_a_large_object_is_created_once_and_whole(store: Store) -> None:
    """Above the size of one Put Blob, where Azure takes it in blocks."""
    first, second = os.urandom(65 << 20), b"second"
    storage.create_once(store.at("large"), first)
    with pytest.raises(FileExistsError):
        storage.create_once(store.at("large"), second)
    assert storage.read_bytes(store.at("large")) == first


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads are switched as often as they can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def race(uri: str, num_writers: int, size_bytes: int) -> None:
    """So many threads create one name; one of them wins, whole, and the others are told."""
    outcomes: dict[int, bool] = {}
    start = threading.Barrier(num_writers)

    def write(number: int) -> None:
        start.wait()
        try:
            storage.create_once(uri, bytes([number]) * size_bytes)
            outcomes[number] = True
        except FileExistsError:
            outcomes[number] = False

    threads = [threading.Thread(target=write, args=(number,)) for number in range(num_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, won in outcomes.items() if won]
    assert len(outcomes) == num_writers
    assert len(winners) == 1
    assert storage.read_bytes(uri) == bytes(winners) * size_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_of_32_threads_one_wins_whole(store: Store) -> None:
    if store.kind == "s3":
        pytest.skip("moto looks and writes in two steps, and so lets two win now and then; what S3 itself does is not proven here")
    for number in range(5):
        race(store.at("folder", f"{number:02d}"), 32, 10_000)
    assert store.names() == [f"folder/{number:02d}" for number in range(5)]


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure takes what is larger than 64 KiB in blocks of 16 KiB."""
    monkeypatch.setattr(azure_blob, "_ONE_PUT_BYTES", 64 << 10)
    monkeypatch.setattr(azure_blob, "_BLOCK_BYTES", 16 << 10)
    monkeypatch.setattr(azure_blob, "_made", {})


def test_of_32_threads_one_wins_whole_where_it_takes_many_blocks(azure: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of two writers of one name must not mix."""
    small_blocks(monkeypatch)
    for number in range(2):
        race(azure.at(f"{number:02d}"), 32, 200_000)
    assert azure.names() == [f"{number:02d}" for number in range(2)]


_WRITER = """
import sys, time, pathlib
from pipeline import storage
root, number, rounds, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
storage.exists(storage.join(root, "warm"))
(folder / f"ready-{number}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
for turn in range(rounds):
    try:
        storage.create_once(storage.join(root, f"{turn:03d}"), bytes([number]) * 5000)
        print(turn, flush=True)
    except FileExistsError:
        pass
"""


@pytest.mark.slow
def test_of_several_processes_one_wins_whole(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    num_writers, rounds, signals = 3, 15, tmp_path_factory.mktemp("signals")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, shared_store.root, str(number), str(rounds), str(signals)],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(num_writers)
    ]
    try:
        while len(list(signals.glob("ready-*"))) < num_writers and all(writer.poll() is None for writer in writers):
            time.sleep(0.01)
        (signals / "go").touch()
        won = [[int(line) for line in writer.communicate()[0].split()] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0] * num_writers
    assert sorted(turn for turns in won for turn in turns) == list(range(rounds))
    for number, turns in enumerate(won):
        for turn in turns:
            assert storage.read_bytes(shared_store.at(f"{turn:03d}")) == bytes([number]) * 5000


# Replace, remove, versions.


def test_replacing_writes_over_and_leaves_no_temporary(store: Store) -> None:
    uri = store.at("status", "s.json")
    storage.replace(uri, b"one")
    storage.replace(uri, b"two, longer")
    storage.replace(uri, b"")
    storage.replace(uri, b"three")
    assert storage.read_bytes(uri) == b"three"
    assert store.names() == ["status/s.json"]


def test_a_removed_object_is_gone_and_removing_it_again_is_nothing(store: Store) -> None:
    uri = store.at("a")
    storage.create_once(uri, b"x")
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)
    assert store.names() == []
    storage.create_once(uri, b"again")
    assert storage.read_bytes(uri) == b"again"


def test_a_version_changes_when_the_object_does_and_only_then(store: Store) -> None:
    uri = store.at("a.parquet")
    storage.create_once(uri, b"one")
    before_it = storage.info(uri)
    storage.read_bytes(uri)
    assert storage.info(uri) == before_it
    storage.replace(uri, b"two")  # of the same size
    assert storage.info(uri).version != before_it.version
    assert storage.info(uri).size_bytes == before_it.size_bytes


def test_a_listing_says_what_asking_for_each_object_says(store: Store) -> None:
    """Etags too, whose quotes Azure's listings leave out."""
    for name in ("a.parquet", "sub/b.parquet"):
        storage.create_once(store.at(*name.split("/")), b"x" * len(name))
    for uri in (store.root, store.at("*.parquet"), store.at("**", "*.parquet"), store.at("a.parquet")):
        found = storage.list_objects(uri)
        assert found
        assert found == [storage.info(item.uri) for item in found]


# Reading.


def test_an_opened_object_can_be_read_from_anywhere(store: Store) -> None:
    data = os.urandom(3 << 20)
    storage.create_once(store.at("a"), data)
    with storage.open_read(store.at("a")) as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == data[-3:]
        file.seek(2)
        assert file.read(2) == data[2:4]
        file.seek(1_000_000, os.SEEK_CUR)
        assert file.tell() == 1_000_004
        assert file.read(1_500_000) == data[1_000_004:2_500_004]
        assert file.read() == data[2_500_004:]
        assert file.read(1) == b""
        file.seek(len(data) + 5)
        assert file.read() == b""
        file.seek(0)
        assert file.read() == data


def test_two_readers_of_one_object_do_not_move_each_other(store: Store) -> None:
    storage.create_once(store.at("a"), b"0123456789")
    with storage.open_read(store.at("a")) as first, storage.open_read(store.at("a")) as second:
        assert first.read(4) == b"0123"
        assert second.read(2) == b"01"
        assert first.read(2) == b"45"


def test_a_closed_reader_leaves_the_object_readable(store: Store) -> None:
    storage.create_once(store.at("a"), b"0123456789")
    with storage.open_read(store.at("a")) as first:
        first.read(4)
    with storage.open_read(store.at("a")) as second:
        assert second.read() == b"0123456789"


def test_many_threads_use_a_store_at_once(store: Store) -> None:
    """Units, footers and listings all have threads of their own, which adlfs serves from one event loop."""
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                uri = store.at(f"{number}", f"{turn}.parquet")
                storage.create_once(uri, uri.encode())
                assert storage.read_bytes(uri) == uri.encode()
                assert storage.list_names(store.at(f"{number}")) == {f"{index}.parquet": len(uri) for index in range(turn + 1)}
        except BaseException as error:  # reported by the test's own thread
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(storage.list_objects(store.root)) == 24 * 5


@pytest.mark.parametrize("act", [storage.read_bytes, storage.open_read, storage.info], ids=lambda act: act.__name__)
def test_a_missing_object_is_a_file_not_found(store: Store, act: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError):
        act(store.at("nothing"))
    assert not storage.exists(store.at("nothing"))


def test_a_folder_is_no_object(store: Store) -> None:
    storage.create_once(store.at("folder", "a"), b"x")
    with pytest.raises(IsADirectoryError):
        storage.info(store.at("folder"))
    assert not storage.exists(store.at("folder"))


# Listing.


def test_a_file_names_itself(store: Store) -> None:
    storage.create_once(store.at("a.data"), b"x")
    assert store.listed(store.at("a.data")) == ["a.data"]


def create_all(store: Store, *names: str) -> None:
    for name in names:
        storage.create_once(store.at(*name.split("/")), b"x")


def test_a_folder_gives_its_parquet_files_in_order_without_hidden_ones(store: Store) -> None:
    create_all(
        store, "b.parquet", "a.parquet", "c.pq", "sub/d.parquet", "notes.txt", ".hidden.parquet", "_tokenmill/plan.parquet", "_SUCCESS"
    )
    assert store.listed(store.root) == ["a.parquet", "b.parquet", "c.pq", "sub/d.parquet"]
    assert store.listed(store.root + "/") == store.listed(store.root)


def test_a_folder_whose_name_begins_like_another_is_another(store: Store) -> None:
    create_all(store, "in/a.parquet", "in2/b.parquet", "in-old/c.parquet", "in.parquet")
    assert store.listed(store.at("in")) == ["in/a.parquet"]
    assert store.listed(store.at("in", "*.parquet")) == ["in/a.parquet"]
    assert storage.list_names(store.at("in")) == {"a.parquet": 1}


def test_a_folder_below_a_hidden_one_is_not_hidden_itself(store: Store) -> None:
    create_all(store, "_work/in/a.parquet")
    assert store.listed(store.at("_work", "in")) == ["_work/in/a.parquet"]


def test_a_glob_gives_what_matches_in_order_without_hidden_names(store: Store) -> None:
    create_all(store, "b.parquet", "a.parquet", "c.txt", "_d.parquet", ".e.parquet", "sub/f.parquet")
    assert store.listed(store.at("*.parquet")) == ["a.parquet", "b.parquet"]
    assert store.listed(store.at("[a-b].parquet")) == ["a.parquet", "b.parquet"]
    assert store.listed(store.at("?.parquet")) == ["a.parquet", "b.parquet"]
    assert store.listed(store.at("a*.parquet")) == ["a.parquet"]
    assert store.listed(store.at("*", "*.parquet")) == ["sub/f.parquet"]


def test_a_glob_over_all_folders_does_not_look_into_hidden_ones(store: Store) -> None:
    create_all(store, "sub/part-0.parquet", "sub/_tokenmill/plan.parquet", "sub/.trash/old.parquet")
    assert store.listed(store.at("**", "*.parquet")) == ["sub/part-0.parquet"]


@pytest.mark.parametrize(
    ("name", "message"), [("nothing.parquet", "there is no "), ("*.parquet", "no file matches "), ("folder", "holds no .parquet file")]
)
def test_a_uri_that_names_nothing_is_a_wrong_job(store: Store, name: str, message: str) -> None:
    create_all(store, "folder/a.txt")
    with pytest.raises(JobError, match=f"input.uri: .*{message}"):
        storage.list_objects(store.at(name))


def test_names_and_sizes_are_those_of_the_folder_itself(store: Store) -> None:
    for name in ("a", ".b", "sub/c", "sub/deep/d"):
        storage.create_once(store.at(*name.split("/")), b"xyz")
    assert storage.list_names(store.root) == {"a": 3, ".b": 3}
    assert storage.list_names(store.at("sub")) == {"c": 3}
    assert storage.list_names(store.at("nothing")) == {}


def test_a_listing_is_never_an_old_one(store: Store) -> None:
    for number in range(3):
        create_all(store, f"{number}.parquet")
        assert store.listed(store.root) == [f"{index}.parquet" for index in range(number + 1)]
        assert sorted(storage.list_names(store.root)) == [f"{index}.parquet" for index in range(number + 1)]
    storage.remove(store.at("0.parquet"))
    assert store.listed(store.root) == ["1.parquet", "2.parquet"]


# Odd names.


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_taken_as_it_is_written(store: Store, name: str) -> None:
    odd = f"in {name}" if name == ".." else name
    uri = store.at(odd, f"{odd}.parquet")
    storage.create_once(uri, odd.encode())
    with pytest.raises(FileExistsError):
        storage.create_once(uri, b"other")
    assert storage.read_bytes(uri) == odd.encode()
    assert storage.info(uri).size_bytes == len(odd.encode())
    with storage.open_read(uri) as file:
        assert file.read() == odd.encode()
    assert store.names() == [f"{odd}/{odd}.parquet"]
    assert store.listed(store.root) == [f"{odd}/{odd}.parquet"]
    assert store.listed(store.at("*", "*.parquet")) == [f"{odd}/{odd}.parquet"]
    assert storage.list_names(store.at(odd)) == {f"{odd}.parquet": len(odd.encode())}
    storage.remove(uri)
    assert store.names() == []


@pytest.mark.parametrize("steps", [("..", "a"), ("b", "..", "..", "a"), (".", "a"), ("b", "..")])
def test_a_uri_does_not_step_out_of_its_folder(azure: Store, steps: tuple[str, ...]) -> None:
    """To some stores `..` is a name, to others, and to what lies before them, a step up."""
    for act in (storage.info, storage.read_bytes, storage.open_read, storage.list_objects, storage.list_names, storage.remove):
        with pytest.raises(JobError, match="write the path out"):
            act(azure.at(*steps))
    with pytest.raises(JobError, match="write the path out"):
        storage.create_once(azure.at(*steps), b"x")
    with pytest.raises(JobError, match="write the path out"):
        storage.replace(azure.at(*steps), b"x")
    assert azure.names() == []


# The probe, and containers.


def test_a_probe_passes_and_leaves_no_object(store: Store) -> None:
    storage.probe(store.at("out"))
    assert store.names() == []


@pytest.mark.slow
def test_a_probe_whose_first_acknowledgement_is_lost_passes(azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK asks again, and is told that the name exists: by itself."""
    with before(azurite) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", proxy.service.connection_string)
        proxy.strike("Put Blob", "reset_after")
        storage.probe(f"az://{container}/out")
        assert (proxy.faults, proxy.requests["Put Blob"]) == ({"reset_after": 1}, 3)
    assert azurite.names(container) == []


def test_a_missing_container_is_named(azure: Store, azurite: Azurite) -> None:
    """It is no empty folder: a job that lost its output's container has not simply nothing done."""
    there = azure.root.split("://")[1].split("@")[0].split("/")[0]
    gone = azure.root.replace(there, "no-such-container")
    for act in (storage.list_names, storage.list_objects):
        with pytest.raises(FileNotFoundError, match="there is no container 'no-such-container'; create it"):
            act(gone if act is storage.list_names else f"{gone}/*.parquet")
    with pytest.raises(FileNotFoundError, match="no container 'no-such-container'"):
        storage.create_once(f"{gone}/a", b"x")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{gone}/a")
    with pytest.raises(JobError, match=r"output.uri: cannot write to .*no container 'no-such-container'"):
        storage.probe(gone)
    storage.remove(f"{gone}/a")
    assert there in [found.name for found in azurite.client().list_containers()]


def test_one_commit_is_one_request(azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of up to 64 MiB appears by one Put Blob under a condition: there is no moment at which it is half there."""
    with before(azurite) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", proxy.service.connection_string)
        storage.create_once(f"az://{container}/part", os.urandom(5 << 20))
        assert [(request.operation, request.headers.get("if-none-match")) for request in proxy.seen] == [("Put Blob", "*")]


def test_blocks_become_an_object_under_the_same_condition(azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    with before(azurite) as proxy:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", proxy.service.connection_string)
        storage.create_once(f"az://{container}/part", os.urandom(100_000))
        last = proxy.seen[-1]
        assert (last.operation, last.headers.get("if-none-match")) == ("Put Block List", "*")
        assert {request.operation for request in proxy.seen[:-1]} == {"Put Block"}


def test_fsspecs_exclusive_open_publishes_what_an_exception_cut_short(azure: Store) -> None:
    """Why objects are created by pipe_file(mode="create") and not by open("xb"): both are conditional, but only one is whole."""
    fs, path = azure_blob.filesystem(azure.at("half"), credentials.current())
    with pytest.raises(RuntimeError, match="killed"), fs.open(path, "xb") as file:  # noqa: PT012
        file.write(b"half of it")
        raise RuntimeError("killed")
    assert storage.read_bytes(azure.at("half")) == b"half of it"
