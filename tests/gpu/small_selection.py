"""A few steps of a tiny model with random weights, for compute-sanitizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpu.benchmark import Decode
from gpu.measure import llama_8b, random_checkpoint
from sagellm import _cuda as cuda
from sagellm.backends.cuda import CudaRunner
from sagellm.backends.interface import ForwardBatch, SamplingRow
from sagellm.checkpoint.config import RopeConfig


def main() -> None:
    cuda.use_device(0)
    config = llama_8b(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        rope=RopeConfig(theta=500000.0, dim=64),
        attention_scale=0.125,
    )
    runner = CudaRunner(random_checkpoint(config), max_batch_tokens=256, cublas=False)
    decode = Decode(runner, 3)
    prompt = ForwardBatch(
        token_ids=np.arange(80, dtype=np.int32),
        positions=np.arange(80, dtype=np.int32),
        query_starts=np.array([0, 80], np.int32),
        block_tables=np.ascontiguousarray(decode.tables[:, :1]),
        block_copies=np.array([[9, 10]], np.int32),
        logit_rows=np.array([79], np.int32),
    )
    drawn = SamplingRow(temperature=0.8, top_k=20, top_p=0.9, num_logprobs=2, seed=1)
    print(runner.step(prompt, (drawn,), return_logits=True, return_hidden=True).rows)
    for step in range(3):
        print(runner.step(decode.batch(3, 1024 + step), (SamplingRow(), drawn, drawn)).rows)
    rows = (SamplingRow(), drawn, drawn)
    runner.launch(decode.batch(3, 1027), rows)
    for step in range(3):
        sources = np.arange(3, dtype=np.int32)
        runner.launch(replace(decode.batch(3, 1028 + step), token_sources=sources), rows)
        print(runner.finish().rows)
    print(runner.finish().rows)
    print(f"graphs and replays: {runner.graph_counts}")
    runner.close()


if __name__ == "__main__":
    main()
