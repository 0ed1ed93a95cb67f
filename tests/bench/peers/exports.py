"""A checkpoint in OpenVINO's format with 4-bit weights, made once by OpenVINO's own exporter in its venv."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def export(python: Path, model: str, folder: Path) -> Path:
    """The exported checkpoint's folder.

    The command is that of OpenVINO GenAI's documentation, its options its defaults.

    But for one: weights share a scale in groups of 128, which does not divide the demo model's 576; with "adjust" the exporter
    takes the largest group that does.
    """
    key = hashlib.sha256(f"{model}:{Path(model, 'config.json').stat().st_mtime_ns}".encode()).hexdigest()[:12]
    target = folder / f"openvino-int4-{key}"
    if target.is_dir():
        return target
    partial = target.with_name(target.name + ".partial")
    command = [
        str(python.with_name("optimum-cli")), "export", "openvino", "--model", model, "--task", "text-generation-with-past",
        "--weight-format", "int4", "--group-size-fallback", "adjust", str(partial),
    ]  # fmt: skip
    print(f"exporting {model} to {target}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return partial.rename(target)
