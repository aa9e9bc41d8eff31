"""The engine's knobs, checked once at start."""

from __future__ import annotations

from dataclasses import dataclass

from sagellm.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine shares a model among requests.

    Attributes:
        max_num_seqs: Sequences that run at once; further ones wait.
        max_batch_tokens: Tokens of one step, over all sequences. At least ``max_num_seqs``, so that
            every running sequence advances in every step.
        max_chunk_tokens: Tokens of one sequence in one step; None is ``max_batch_tokens``. Results
            do not depend on it.
        block_size: Tokens per KV block, a multiple of 16.
        kv_cache_bytes: Memory of the KV pool. None sizes it from free memory (see ``memory.py``).
        kv_cache_tokens: The same in tokens of context; exclusive with ``kv_cache_bytes``.
        enable_prefix_caching: Keep finished blocks and share them among equal prefixes.
        max_model_len: Longest sequence (prompt and output, tokens). None is the model's own limit.
        max_queue: Requests that may wait; beyond it a request is answered ``resource_exhausted``.
        seed: Seed of requests that bring none; the n-th request draws from (seed, n).
    """

    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    max_chunk_tokens: int | None = None
    block_size: int = 32
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    enable_prefix_caching: bool = True
    max_model_len: int | None = None
    max_queue: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_batch_tokens", "block_size", "max_queue"):
            _require_positive(name, getattr(self, name))
        for name in ("max_chunk_tokens", "kv_cache_bytes", "kv_cache_tokens", "max_model_len"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.block_size % 16:
            raise InvalidArgumentError(
                f"block_size is {self.block_size}; choose a multiple of 16, such as 32"
            )
        if self.max_batch_tokens < self.max_num_seqs:
            raise InvalidArgumentError(
                f"max_batch_tokens ({self.max_batch_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}); raise max_batch_tokens or lower max_num_seqs"
            )
        if self.kv_cache_bytes is not None and self.kv_cache_tokens is not None:
            raise InvalidArgumentError("give kv_cache_bytes or kv_cache_tokens, not both")

    @property
    def chunk_tokens(self) -> int:
        """Most tokens that one sequence advances by in one step."""
        if self.max_chunk_tokens is None:
            return self.max_batch_tokens
        return min(self.max_chunk_tokens, self.max_batch_tokens)


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgumentError(f"{name} is {value!r}; give a whole number of at least 1")
