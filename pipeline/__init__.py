"""What happens on a node: read, render, generate, commit. Knows no cluster, no command line."""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

_HOME = _Path(__file__).resolve().parent.parent

# The packages are named as their folders, and a notebook's own schemas.py or jobs/ is found before them.
for _name in ("schemas", "pipeline", "jobs"):
    _spec = _find_spec(_name)
    _origin = _Path(_spec.origin).resolve() if _spec and _spec.origin else None
    if _origin != _HOME / _name / "__init__.py":
        raise ImportError(
            f"{_origin or 'nothing'} is found as {_name!r}, expected {_HOME / _name / '__init__.py'} of Tokenmill: "
            f"rename the one that shadows it, or take its folder off sys.path"
        )
