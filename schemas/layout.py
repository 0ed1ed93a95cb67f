"""Names inside an output folder. Spelt here once."""

from __future__ import annotations

FOLDER = "_tokenmill"
JOB = f"{FOLDER}/job.json"
PLAN = f"{FOLDER}/plan.parquet"
MANIFEST = f"{FOLDER}/manifest.parquet"
STATUS = f"{FOLDER}/status.json"
RUNS = f"{FOLDER}/runs"
"""What each run came to; see schemas/ledger.py."""
CONTROL = f"{FOLDER}/control"
DRAIN = f"{CONTROL}/drain"
SEGMENTS = f"{FOLDER}/segments"
"""What is known of units that were not finished: rows saved by evicted replicas, and what was in engines that died."""
SUCCESS = "_SUCCESS"
