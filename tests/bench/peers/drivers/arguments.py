"""What every driver is told, in the same words: where the rows lie, where to write, which checkpoint, how many tokens."""

from __future__ import annotations

import argparse
import json


def read() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input", required=True, help="folder of Parquet files with the columns id and question")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--model", required=True, help="folder with a checkpoint")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--engine", type=json.loads, default={}, help="vLLM's engine arguments as JSON; none: vLLM's defaults")
    return parser.parse_args()
