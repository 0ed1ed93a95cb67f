"""How work is asked for: plan, drive, verify, report. Notebooks call `jobs.run`, `jobs.submit` and `jobs.attach`."""

import typing as _typing
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

if _typing.TYPE_CHECKING:
    from jobs.api import load_job as load_job
    from jobs.handle import Job as Job
    from jobs.notebook import attach as attach
    from jobs.notebook import run as run
    from jobs.notebook import submit as submit
    from schemas.job import JobSpec as JobSpec
    from schemas.job import parse_job as parse_job

_HOME = _Path(__file__).resolve().parent.parent

# The packages are named as their folders, and a notebook's own schemas.py or jobs/ is found before them.
for _name in ("schemas", "pipeline", "jobs"):
    _spec = _find_spec(_name)
    _found = [_spec.origin] if _spec and _spec.origin else list(_spec.submodule_search_locations or ()) if _spec else []
    if [_Path(_path).resolve() for _path in _found] != [_HOME / _name / "__init__.py"]:
        raise ImportError(
            f"{', '.join(_found) or 'nothing'} is found as {_name!r}, expected {_HOME / _name / '__init__.py'} of Tokenmill: "
            f"rename the one that shadows it, or take its folder off sys.path"
        )

_PUBLIC = {
    "Job": "jobs.handle",
    "JobSpec": "schemas.job",
    "attach": "jobs.notebook",
    "load_job": "jobs.api",
    "parse_job": "schemas.job",
    "run": "jobs.notebook",
    "submit": "jobs.notebook",
}
__all__ = ["Job", "JobSpec", "attach", "load_job", "parse_job", "run", "submit"]


def __getattr__(name: str) -> _typing.Any:
    """Public names are loaded when first used, so that `import jobs` stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jobs' has no attribute {name!r}")
    return getattr(_import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """What completion offers, before anything of it is loaded."""
    return list(__all__)
