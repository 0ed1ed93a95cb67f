"""Our engines alone on the bench's rows: Parquet in, Parquet and a line with seconds and tokens out. No Dask, no commit.

python tests/bench/peers/raw.py --input in/ --output out/ --model demo --max-tokens 128

With --defaults one engine as somebody has it who gives vLLM the model alone, and a cache that fits beside other processes.
--settings is over what our profile says: {"replicas": 2, "options": {"block_size": 64}, "environment": {"GLIBC_TUNABLES": ""}}.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.engine import Request
from pipeline.model import Model
from pipeline.model import resolve_model
from pipeline.profile import ReplicaPlan
from pipeline.profile import cut_machine
from pipeline.prompts import read_prompts
from pipeline.render import Renderer
from pipeline.render import load_tokenizer
from pipeline.trial import run_trial
from schemas.job import EngineSpec
from schemas.job import parse_job

_TIMEOUT_S = 3600.0
_AS_THE_PROFILE: dict[str, Any] = {"replicas": None, "options": {}, "environment": {}}
_DEFAULTS = ReplicaPlan(profile="defaults", replicas=1, options={"kv_cache_memory_bytes": 4 << 30}, bare=True)


def _plan(engine: EngineSpec, model: Model, *, replicas: int | None, options: dict[str, Any], environment: dict[str, str]) -> ReplicaPlan:
    cut = cut_machine(engine.model_copy(update={"options": options}), model, replicas=replicas)
    return replace(cut, environment={**cut.environment, **environment})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    job = parse_job(
        {
            "name": "raw",
            "model": options.model,
            "input": {"uri": options.input, "prompt": "question"},
            "output": {"uri": str(options.output)},
            "sampling": {"max_tokens": options.max_tokens, "temperature": 0},
        }
    )
    model = resolve_model(job.model)
    tokenizer = load_tokenizer(model.path)
    table = pq.read_table(options.input).combine_chunks()
    renderer = Renderer(tokenizer, job, max_model_len=model.max_position_embeddings, seed_base="raw")
    rendered = renderer.render(read_prompts(table.to_batches()[0], 0, job))
    requests = [item for item in rendered if isinstance(item, Request)]
    plan = _DEFAULTS if options.defaults else _plan(job.engine, model, **{**_AS_THE_PROFILE, **options.settings})
    result = run_trial(plan, model, job.engine.kind, requests, timeout_s=_TIMEOUT_S, keep=True)
    generations = [result.generations[request.position] for request in requests]
    ids = [generation.choices[0].token_ids for generation in generations]
    options.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "id": table.column("id"),
                "completion": tokenizer.batch_decode(ids, skip_special_tokens=True),
                "num_tokens": list(map(len, ids)),
            }
        ),
        options.output / "00.parquet",
    )
    said = {"seconds": result.elapsed_s, "output_tokens": result.output_tokens, "replicas": plan.replicas, "options": plan.options}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
