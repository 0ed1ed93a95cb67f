"""Ray Data LLM as its guide shows it: read_parquet, build_processor, write_parquet.

From the guide's quick start (Ray's documentation, "Working with LLMs"): concurrency=1, batch_size=32. All else is Ray's default,
its stages too (without those that tokenise and decode, 16 rows took 118 s instead of 121 on a busy machine), but for what a
machine without a GPU needs:
* placement_group_config: without one the engine asks for one GPU, and waits for it for ever.
* num_cpus: Ray counts an actor as one CPU. Four stages and the tasks that read and write do not fit into two cores' count, and would wait
  for ever; the number is Ray's bookkeeping and limits no thread.
* log_engine_metrics=False: the metrics need ray[default], whose other packages nothing here uses.
"""

from __future__ import annotations

import arguments
import ray
from ray.data.llm import build_processor
from ray.data.llm import vLLMEngineProcessorConfig

options = arguments.read()
ray.init(num_cpus=8, include_dashboard=False)
config = vLLMEngineProcessorConfig(
    model_source=options.model,
    engine_kwargs=options.engine,
    concurrency=1,
    batch_size=32,
    placement_group_config={"bundles": [{"CPU": 1}]},
    log_engine_metrics=False,
)
processor = build_processor(
    config,
    preprocess=lambda row: {
        "messages": [{"role": "user", "content": row["question"]}],
        "sampling_params": {"temperature": 0.0, "max_tokens": options.max_tokens},
        "id": row["id"],
    },
    postprocess=lambda row: {"id": row["id"], "completion": row["generated_text"], "num_tokens": row["num_generated_tokens"]},
)
processor(ray.data.read_parquet(options.input)).write_parquet(options.output)
