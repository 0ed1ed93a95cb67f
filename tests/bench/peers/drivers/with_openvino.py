"""OpenVINO GenAI's continuous-batching pipeline on 4-bit weights: all rows in one call. Prints seconds and tokens of that call alone.

From OpenVINO GenAI's documentation: ContinuousBatchingPipeline(models_path, SchedulerConfig, "CPU"); weights exported by
`optimum-cli export openvino --weight-format int4`. cache_size is in GB; the scheduler's other numbers are OpenVINO's defaults.
The chat template is the checkpoint's own, as on every other side.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import arguments
import openvino_genai
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

options = arguments.read()
table = pq.read_table(options.input)
tokenizer = AutoTokenizer.from_pretrained(options.model)
prompts = [
    tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    for question in table.column("question").to_pylist()
]

scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = 4
for name, value in options.engine.items():
    setattr(scheduler, name, value)
pipeline = openvino_genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU")
ids = [pipeline.get_tokenizer().encode(prompt, add_special_tokens=False).input_ids for prompt in prompts]
config = pipeline.get_config()
config.max_new_tokens = options.max_tokens
config.do_sample = False

began = time.perf_counter()
results = pipeline.generate(ids, [config] * len(ids))
seconds = time.perf_counter() - began

tokens = [list(result.m_generation_ids[0]) for result in results]
Path(options.output).mkdir(parents=True)
texts = [pipeline.get_tokenizer().decode(one) for one in tokens]
pq.write_table(
    pa.table({"id": table.column("id"), "completion": texts, "num_tokens": [len(one) for one in tokens]}), f"{options.output}/00.parquet"
)
print(json.dumps({"seconds": seconds, "output_tokens": sum(map(len, tokens))}))
