"""datatrove's InferenceRunner as its example shows it: a reader, the runner with a vLLM server of its own, a writer.

From datatrove's examples/inference: a rollout function that posts chat messages, LocalPipelineExecutor with one task.
Concurrency, waits and all else are datatrove's defaults. Each request is an HTTP POST to the `vllm serve` that the runner starts.
"""

from __future__ import annotations

import arguments
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig
from datatrove.pipeline.inference.run_inference import InferenceRunner
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter

options = arguments.read()
engine = {key.replace("_", "-"): value for key, value in options.engine.items()}
context = {"model_max_context": engine.pop("max-model-len")} if "max-model-len" in engine else {}


async def roll_out(document, generate):
    return await generate(
        {"messages": [{"role": "user", "content": document.text}], "temperature": 0.0, "max_tokens": options.max_tokens},
    )


if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(options.input, text_key="question", id_key="id"),
            InferenceRunner(
                rollout_fn=roll_out,
                config=InferenceConfig(server_type="vllm", model_name_or_path=options.model, model_kwargs=engine, **context),
                output_writer=ParquetWriter(options.output, expand_metadata=True),
            ),
        ],
        tasks=1,
    ).run()
