"""A process that says something and then hangs, for test_child."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from pipeline.child import serve


def main(order: dict[str, Any], _: object) -> dict[str, Any]:
    if "answer" in order:
        return {"answer": order["answer"]}
    print(order["words"], file=sys.stderr, flush=True)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    time.sleep(3600)
    return {}


if __name__ == "__main__":
    serve(main)
