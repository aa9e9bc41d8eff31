"""The engine's knobs, checked once at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sagellm.errors import InvalidArgumentError

Speculation: TypeAlias = "Literal['auto', 'off'] | int"

_GIB = 1 << 30


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
        speculation: Whether tokens are guessed ahead, which changes no output: ``auto`` where it
            pays, ``off``, or that many wherever there is something to guess from.
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
    speculation: Speculation = "auto"

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
        if self.speculation not in ("auto", "off"):
            _require_positive("speculation, if neither 'auto' nor 'off',", self.speculation)

    @property
    def chunk_tokens(self) -> int:
        """Most tokens that one sequence advances by in one step."""
        if self.max_chunk_tokens is None:
            return self.max_batch_tokens
        return min(self.max_chunk_tokens, self.max_batch_tokens)


def engine_config(
    kv_cache_gb: float | None, max_model_len: int | None, options: dict[str, Any]
) -> EngineConfig:
    """The knobs in the terms of ``LLM``: memory in GiB, ``options`` are other fields by name.

    Raises:
        InvalidArgumentError: An unknown option or an illegal value.
    """
    unknown = set(options) - set(EngineConfig.__dataclass_fields__)
    if unknown:
        known = ", ".join(EngineConfig.__dataclass_fields__)
        raise InvalidArgumentError(
            f"unknown option {', '.join(sorted(unknown))}; engine options: {known}"
        )
    if kv_cache_gb is not None:
        if not 0 < kv_cache_gb < 1 << 20:
            raise InvalidArgumentError(f"kv_cache_gb is {kv_cache_gb}; give GiB above 0")
        options = {**options, "kv_cache_bytes": int(kv_cache_gb * _GIB)}
    return EngineConfig(max_model_len=max_model_len, **options)


def parse_speculation(text: str) -> Speculation:
    """Reads the ``--speculate`` of a command line.

    Raises:
        InvalidArgumentError: It is neither auto, off nor a number of at least 1.
    """
    if text == "auto":
        return "auto"
    if text == "off":
        return "off"
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise InvalidArgumentError(
            f"--speculate is {text!r}; give auto, off, or a number of tokens of at least 1"
        )
    return int(text)


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgumentError(f"{name} is {value!r}; give a whole number of at least 1")
