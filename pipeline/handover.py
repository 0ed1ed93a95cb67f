"""One job's keys, from its driver to its nodes, through a container that is not the output's.

Why through a store, and why a container of its own: Batch shows a task's settings, environment and resource files to
everybody who may look at the job, so keys have no place there; and rights on blobs are given by container, so that who may
read results cannot read these. The driver makes the keys (see pipeline.tls), so that they are on no machine of a person's; a
driver that comes back finds the same ones, and takes them away when the job is over. All three files are one object,
created once: two drivers that start at the same moment come out with one set. Nodes of a cluster of one's own (infra's scale set)
fetch the three files that its operators made and uploaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from pipeline import storage
from pipeline import tls
from schemas.errors import JobError

_NAME = "keys.json"
_FILES = (tls.CA_CERTIFICATE, tls.NODE_CERTIFICATE, tls.NODE_KEY)
_VALID_DAYS = 60
"""Longer than cluster.max_hours (30 days) and a queue before it."""


def is_remote(keys: str) -> bool:
    """Whether these are to be fetched, rather than a folder on this machine."""
    return storage.scheme_of(keys) not in ("file", "local")


def place(keys: str, job_id: str) -> str:
    """Where one job's keys lie in the keys' container."""
    return storage.join(keys, job_id)


def make_or_fetch(uri: str) -> str:
    """A new folder on this machine with the job's keys, which are made where there are none yet. Raises JobError."""
    folder = _new_folder()
    made = tls.make_keys(folder, valid_days=_VALID_DAYS)
    data = json.dumps({name: (made.folder / name).read_text() for name in _FILES}).encode()
    try:
        storage.create_once(storage.join(uri, _NAME), data)
    except FileExistsError:  # an earlier start of this driver, or this one, unheard
        return fetch(uri)
    except OSError as error:
        raise JobError(f"cluster.keys: cannot write to {uri}: {error}") from error
    return str(folder)


def fetch(uri: str) -> str:
    """A new folder on this machine with the keys that lie there: a driver's one object, or what `tokenmill keys` made, uploaded as it is.

    Raises JobError.
    """
    files = _made_by_driver(uri) or _uploaded(uri)
    folder = _new_folder()
    for name in _FILES:
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(files[name])
    tls.read_keys(folder)  # also whether three objects, of which another may be new by now, are of one set
    return str(folder)


def _made_by_driver(uri: str) -> dict[str, str] | None:
    where = storage.join(uri, _NAME)
    data = _read(where)
    if data is None:
        return None
    try:
        files = json.loads(data)
    except ValueError:
        files = None
    if not isinstance(files, dict) or not all(isinstance(files.get(name), str) for name in _FILES):
        raise JobError(f"keys: {where} does not hold {', '.join(_FILES)}; remove it and start the driver again")
    return files


def _uploaded(uri: str) -> dict[str, str]:
    found = {name: _read(storage.join(uri, name)) for name in _FILES}
    missing = [name for name, data in found.items() if data is None]
    if missing:
        raise JobError(
            f"keys: {uri} has no {_NAME}, which a job's driver makes at its start and takes away at its end, and no "
            f"{', '.join(missing)}; for a cluster of your own upload the files that `tokenmill keys` makes"
        )
    return {name: (data or b"").decode(errors="replace") for name, data in found.items()}


def _read(where: str) -> bytes | None:
    """None where there is nothing."""
    try:
        return storage.read_bytes(where)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JobError(f"keys: cannot read {where}: {error}") from error


def take_away(uri: str) -> None:
    """After the job: nobody is to join any more. A store that does not answer now leaves them, to run out by themselves."""
    with contextlib.suppress(OSError):
        storage.remove(storage.join(uri, _NAME))


def _new_folder() -> Path:
    """Only this user's."""
    return Path(tempfile.mkdtemp(prefix="tokenmill-keys-"))
