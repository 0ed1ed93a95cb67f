"""A job's keys from its driver to its nodes through a store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline import handover
from pipeline import storage
from pipeline import tls
from schemas.errors import JobError


@pytest.fixture
def place(tmp_path: Path) -> str:
    """As memory:// is in every process of its own, a folder stands for the container here."""
    return str(tmp_path / "keys-container" / "night-1")


def test_a_driver_that_comes_back_has_the_same_keys_and_so_has_every_node(place: str) -> None:
    first, again, node = Path(handover.make_or_fetch(place)), Path(handover.make_or_fetch(place)), Path(handover.fetch(place))
    assert len({first, again, node}) == 3
    for name in (tls.CA_CERTIFICATE, tls.NODE_CERTIFICATE, tls.NODE_KEY):
        assert (first / name).read_bytes() == (again / name).read_bytes() == (node / name).read_bytes()
    assert os.stat(node / tls.NODE_KEY).st_mode & 0o777 == 0o600
    assert os.stat(node).st_mode & 0o777 == 0o700
    tls.read_keys(node)


def test_after_the_job_nobody_can_fetch_them(place: str) -> None:
    handover.make_or_fetch(place)
    handover.take_away(place)
    with pytest.raises(JobError, match=r"has no keys\.json, which a job's driver makes at its start and takes away at its end"):
        handover.fetch(place)
    handover.take_away(place)


@pytest.mark.parametrize("damage", [b"no JSON", b"[]", json.dumps({tls.CA_CERTIFICATE: "x"}).encode()])
def test_what_is_not_a_set_of_keys_is_refused(place: str, damage: bytes) -> None:
    storage.replace(storage.join(place, "keys.json"), damage)
    with pytest.raises(JobError, match=r"does not hold ca\.pem"):
        handover.fetch(place)


def test_a_folder_of_keys_is_told_from_a_store() -> None:
    assert handover.is_remote("az://keys/night-1")
    assert not handover.is_remote("/home/me/cluster-keys")
    assert handover.place("az://keys/", "night-1") == "az://keys/night-1"


def test_keys_that_an_operator_made_and_uploaded_are_fetched_as_they_are(place: str, tmp_path: Path) -> None:
    made = tls.make_keys(tmp_path / "made", valid_days=1).folder
    for path in made.iterdir():
        storage.replace(storage.join(place, path.name), path.read_bytes())
    fetched = Path(handover.fetch(place))
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {path.name: path.read_bytes() for path in made.iterdir()}
    assert os.stat(fetched / tls.NODE_KEY).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", [tls.CA_CERTIFICATE, tls.NODE_CERTIFICATE, tls.NODE_KEY])
def test_files_of_two_sets_as_while_new_ones_are_uploaded_are_refused(place: str, tmp_path: Path, name: str) -> None:
    old, new = (tls.make_keys(tmp_path / which, valid_days=1).folder for which in ("old", "new"))
    for path in old.iterdir():
        storage.replace(storage.join(place, path.name), ((new if path.name == name else old) / path.name).read_bytes())
    with pytest.raises(JobError, match="copy all three files of one set"):
        handover.fetch(place)


def test_a_file_that_was_not_uploaded_is_named(place: str, tmp_path: Path) -> None:
    made = tls.make_keys(tmp_path / "made", valid_days=1).folder
    storage.replace(storage.join(place, tls.CA_CERTIFICATE), (made / tls.CA_CERTIFICATE).read_bytes())
    with pytest.raises(JobError, match=r"and no node\.pem, node\.key; .* upload the files that `tokenmill keys` makes"):
        handover.fetch(place)
