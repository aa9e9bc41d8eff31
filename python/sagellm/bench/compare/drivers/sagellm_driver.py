"""sagellm: its engine in this process, and ``sagellm run`` for the start to the first token."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from sagellm import __version__
from sagellm.engine.config import EngineConfig
from sagellm.engine.llm import new_request
from sagellm.engine.loading import load_engine
from sagellm.errors import SagellmError
from sagellm.native import load_core

_MIN_PROBE_BYTES = 64 << 20
_PROBE_REPEATS = 9


def start_command(spec: dict[str, Any]) -> list[str]:
    """One token from the command line."""
    command = [sys.executable, "-m", "sagellm.cli", "run", spec["model"], "--raw", "--greedy"]
    return [*command, "-p", "The", "--max-tokens", "1", "--threads", str(spec["threads"])]


def load(spec: dict[str, Any]) -> SagellmEngine:
    """The engine with a KV pool for the largest case."""
    return SagellmEngine(spec)


class SagellmEngine:
    """See ``drive.py``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        streams, tokens = spec["max_streams"], spec["max_tokens"]
        config = EngineConfig(
            max_num_seqs=streams,
            max_batch_tokens=max(512, streams),
            kv_cache_tokens=tokens + 64 * streams,
            speculation="off",  # of random prompts it says nothing
        )
        self.engine = load_engine(spec["model"], config, threads=spec["threads"])
        self.threads = spec["threads"]
        self.runner: Any = self.engine.runner
        self.vocab_size = self.runner.config.vocab_size
        self.weight_bytes: int | None = getattr(self.runner, "weight_bytes_per_token", None)

    def generate(
        self, prompts: list[list[int]], output_tokens: int
    ) -> tuple[float, float, float, int]:
        """See ``drive.py``."""
        start = time.perf_counter()
        sequences = []
        for prompt in prompts:
            request = new_request(max_tokens=output_tokens, ignore_eos=True)
            state = self.engine.prepare(request, np.asarray(prompt, np.int32))
            self.engine.add(state)
            sequences.append(state.sequences[0])
        while any(sequence.first_token_at is None for sequence in sequences):
            self._step()
        first = time.perf_counter()
        before = sum(len(sequence.output_tokens) for sequence in sequences)
        while self.engine.has_work:
            self._step()
        end = time.perf_counter()
        count = sum(len(sequence.output_tokens) for sequence in sequences) - before
        return start, first, end, count

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finished is not None and output.finished.failure is not None:
                raise SagellmError(output.finished.failure.message)

    def bytes_per_token(self, streams: int, context: float) -> float | None:
        """Weights shared by the streams, and K and V of one stream, as ``bench offline`` has it."""
        if self.weight_bytes is None:
            return None
        config = self.runner.config
        per_layer = 4 * config.num_kv_heads * config.head_dim  # K and V, 16 bits
        kv = sum(
            per_layer * (min(context, window) if window else context)
            for window in config.layer_windows
        )
        return self.weight_bytes / streams + float(kv)

    def facts(self) -> dict[str, Any]:
        """Ends with the bandwidth probe: the same minute, and no longer the engine's memory."""
        probe = None
        if self.weight_bytes is not None:
            size = max(self.weight_bytes, _MIN_PROBE_BYTES)
            probe = load_core().runtime.read_bandwidth(self.threads, size, _PROBE_REPEATS) / 1e9
        return {
            "version": __version__,
            "device": self.runner.device,
            "isa": str(getattr(self.runner, "isa", "")),
            "precision": str(getattr(self.runner, "precision", "float32")),
            "probe_gbps": probe,
        }
