"""The tiny models on which the reference backend is compared with Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm.backends.interface import ForwardBatch, ModelRunner
from sagellm.kv import KvCache

NUM_TOKENS = 24  # longer than the sliding windows of the cases
GOLDEN_COLUMNS = 64  # of the vocabulary, enough to see any difference


@dataclass(frozen=True, kw_only=True)
class Case:
    arch: str
    seed: int = 7
    dims: dict[str, Any] = field(default_factory=dict)


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "factor": 8.0}

CASES = {
    "llama": Case(arch="llama"),
    "llama_rope_linear": Case(arch="llama", dims={"rope_scaling": _LINEAR}),
    "llama_rope_llama3": Case(arch="llama", dims={"rope_scaling": _LLAMA3, "tie_embeddings": True}),
    "mistral": Case(arch="mistral"),
    "qwen2": Case(arch="qwen2"),
    "qwen2_rope_yarn": Case(
        arch="qwen2", dims={"rope_scaling": _YARN, "tie_embeddings": False, "rope_theta": 500.0}
    ),
    "qwen3": Case(arch="qwen3"),
    "gemma2": Case(arch="gemma2"),
    "gemma2_query_scalar": Case(arch="gemma2", dims={"query_scalar": 20}),
    "gemma3": Case(arch="gemma3"),
    "gemma3_rope_linear": Case(arch="gemma3", dims={"rope_scaling": _LINEAR}),
}


def case_tokens(case: Case) -> NDArray[np.int32]:
    """The input of a case: ids that a multiplicative hash spreads over the vocabulary."""
    return ((np.arange(NUM_TOKENS) * 97 + case.seed * 31) % 320).astype(np.int32)


def make_batch(
    cache: KvCache,
    tokens: dict[int, NDArray[np.int32]],
    chunks: dict[int, tuple[int, int]],
    rows: list[int] | None = None,
) -> ForwardBatch:
    """A step over positions ``begin..end`` of several sequences; by default of all rows."""
    ids = list(chunks)
    starts = np.cumsum([0, *(end - begin for begin, end in chunks.values())])
    for sequence, (_, end) in chunks.items():
        assert cache.reserve(sequence, end)
    return ForwardBatch(
        token_ids=np.concatenate([tokens[s][begin:end] for s, (begin, end) in chunks.items()]),
        positions=np.concatenate(
            [np.arange(begin, end, dtype=np.int32) for begin, end in chunks.values()]
        ),
        query_starts=starts.astype(np.int32),
        block_tables=cache.block_tables(ids),
        block_copies=cache.take_copies(),
        logit_rows=np.asarray(range(starts[-1]) if rows is None else rows, np.int32),
    )


def chunked_logits(
    runner: ModelRunner,
    tokens: NDArray[np.int32],
    chunk: int,
    *,
    block_size: int = 4,
    num_blocks: int = 128,
) -> NDArray[np.float32]:
    """Logits of every position, the sequence fed ``chunk`` tokens at a time."""
    cache = runner.allocate_kv(num_blocks, block_size)
    cache.add(0)
    pieces = []
    for begin in range(0, len(tokens), chunk):
        end = min(begin + chunk, len(tokens))
        batch = make_batch(cache, {0: tokens}, {0: (begin, end)})
        output = runner.step(batch, return_logits=True)
        assert output.logits is not None
        pieces.append(output.logits)
        cache.commit(0, tokens, end)
    return np.concatenate(pieces)
