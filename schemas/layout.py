"""Names inside an output folder. Spelt here once."""

from __future__ import annotations

FOLDER = "_tokenmill"
JOB = f"{FOLDER}/job.json"
PLAN = f"{FOLDER}/plan.parquet"
MANIFEST = f"{FOLDER}/manifest.parquet"
STATUS = f"{FOLDER}/status.json"
CONTROL = f"{FOLDER}/control"
DRAIN = f"{CONTROL}/drain"
SUCCESS = "_SUCCESS"
