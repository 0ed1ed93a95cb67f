"""Daft's prompt function with its in-process vLLM provider: read_parquet, with_column, write_parquet.

Daft's provider applies no chat template and takes texts alone, so the template is applied here, by the checkpoint's own
tokenizer, in a column before it. Prefix routing is on, as by default.
"""

from __future__ import annotations

import arguments
import daft
from daft.functions import prompt
from transformers import AutoTokenizer
from vllm import SamplingParams

options = arguments.read()
tokenizer = AutoTokenizer.from_pretrained(options.model)


@daft.func
def render(question: str) -> str:
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)


if __name__ == "__main__":  # vLLM starts its engine by spawning, which imports this file again
    rows = daft.read_parquet(f"{options.input}/*.parquet")
    rows = rows.with_column("rendered", render(rows["question"]))
    rows = rows.with_column(
        "completion",
        prompt(
            rows["rendered"],
            provider="vllm-prefix-caching",
            model=options.model,
            engine_args=options.engine,
            generate_args={"sampling_params": SamplingParams(temperature=0.0, max_tokens=options.max_tokens)},
        ),
    )
    rows.select("id", "completion").write_parquet(options.output)
