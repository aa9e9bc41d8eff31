"""Ascend's fused paged attention, through torch_npu, for sequences that decode one token.

Written to the documentation of ``torch_npu.npu_fused_infer_attention_score`` and tested with a
strict stand-in on the CPU; **it has not run on Ascend hardware**. For that reason the operator is
tried once against plain attention before it is used, and a device where the trial fails decodes
with plain attention, which the log says.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sagellm.backends.array_ops import Array, ArrayOps
from sagellm.checkpoint.config import ModelConfig

logger = logging.getLogger(__name__)

# Limits that the operator's documentation states for one query token per sequence.
_MAX_HEADS = 256
_MAX_HEADS_PER_KV_HEAD = 64
_MAX_HEAD_DIM = 512
_MAX_PAGE_ROW = 65536  # kv_heads * head_dim
_MAX_LENGTH = 262144
_MAX_BLOCK_SIZE = 512
_MAX_ELEMENTS = 2**31 - 1  # of one page tensor

_TRIAL_BLOCK_SIZE = 32
_TRIAL_LENGTHS = (5, 32, 600)
_TRIAL_TOLERANCE = 0.004  # float16 keeps 11 bits, and inputs and outputs are at most 1


class NpuPagedAttention:
    """One query token per sequence against its pages, all in float16.

    Of the two formats that the operator takes, float16 rounds eight times finer than bfloat16. A
    key or value past its range of 65504 would give logits that are not finite, which sampling
    reports as an error of the request.
    """

    def __init__(self, torch: Any, operator: Any) -> None:
        """Takes the torch module and ``npu_fused_infer_attention_score``."""
        self._operator = operator
        self.dtype: Any = torch.float16

    def __call__(
        self,
        q: Array,
        k_pages: Array,
        v_pages: Array,
        block_table: Array,
        lengths: Sequence[int],
        scale: float,
    ) -> Array:
        """Attention of the last token of every sequence to all of its tokens.

        Args:
            q: ``[S, heads, head_dim]``, rounded to ``dtype``.
            k_pages: ``[blocks, block_size, kv_heads, head_dim]`` of ``dtype``, contiguous.
            v_pages: The same shape.
            block_table: ``[S, B]`` int32 on the device, contiguous.
            lengths: Tokens of each sequence, the query's included.
            scale: Of the scores.

        Returns:
            ``[S, heads * head_dim]`` in the dtype of ``q``.
        """
        num_pages, block_size, kv_heads, dim = k_pages.shape
        count, heads, _ = q.shape
        query = q.reshape(count, 1, heads * dim).to(self.dtype).contiguous()
        # With layout BSH the operator takes pages as [blocks, block_size, kv_heads * head_dim].
        pages = (num_pages, block_size, kv_heads * dim)
        out = q.new_empty((count, heads * dim))
        for begin, end in _calls(lengths, num_pages, block_size):
            result, _ = self._operator(
                query[begin:end],
                k_pages.view(pages),
                v_pages.view(pages),
                actual_seq_lengths_kv=list(lengths[begin:end]),
                block_table=block_table[begin:end],
                num_heads=heads,
                num_key_value_heads=kv_heads,
                scale=scale,
                input_layout="BSH",
                block_size=block_size,
                inner_precise=0,  # the more precise of its two modes
            )
            out[begin:end] = result.reshape(end - begin, heads * dim).to(q.dtype)
        return out


def choose_paged_attention(ops: ArrayOps, config: ModelConfig) -> NpuPagedAttention | None:
    """The fused attention for full-attention layers of ``config``; None where it cannot serve.

    Logs one line on an ``npu`` device; other devices have no fused attention.
    """
    if not ops.device.startswith("npu"):
        return None
    attention, reason = _offered(ops, config)
    if attention is None:
        logger.info("%s: decode uses plain attention: %s", ops.device, reason)
    else:
        logger.info("%s: decode uses torch_npu's fused paged attention%s", ops.device, reason)
    return attention


def pages_refusal(num_pages: int, block_size: int, kv_heads: int, head_dim: int) -> str | None:
    """Why the operator cannot read pages of this shape; None when it can."""
    if block_size % 16 or block_size > _MAX_BLOCK_SIZE:
        return f"the KV block size is {block_size}, not a multiple of 16 up to {_MAX_BLOCK_SIZE}"
    elements = num_pages * block_size * kv_heads * head_dim
    if elements > _MAX_ELEMENTS:
        return f"a layer's pages have {elements} elements, more than {_MAX_ELEMENTS}"
    return None


def _offered(ops: ArrayOps, config: ModelConfig) -> tuple[NpuPagedAttention | None, str]:
    """The operator, or None, and the end of the log line."""
    operator = getattr(
        importlib.import_module("torch_npu"), "npu_fused_infer_attention_score", None
    )
    if operator is None:
        return None, "torch_npu has no npu_fused_infer_attention_score"
    refusal = _model_refusal(config)
    if refusal:
        return None, refusal
    attention = NpuPagedAttention(importlib.import_module("torch"), operator)
    try:
        error = _trial_error(attention, ops, config)
    except (RuntimeError, TypeError, ValueError) as failure:
        return None, f"the operator failed its trial: {str(failure).partition(chr(10))[0]}"
    if not error <= _TRIAL_TOLERANCE:  # NaN included
        return None, f"the operator's trial differs from plain attention by {error:.3g}"
    sliding = sum(1 for window in config.layer_windows if window)
    return attention, f"; {sliding} sliding-window layers use plain attention" if sliding else ""


def _model_refusal(config: ModelConfig) -> str | None:
    """Why the operator cannot express this model's attention; None when it can."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    if config.attention_softcap:
        return "the operator has no soft cap on scores"
    if all(config.layer_windows):
        return "every layer has a sliding window"
    if heads > _MAX_HEADS or heads // kv_heads > _MAX_HEADS_PER_KV_HEAD or dim > _MAX_HEAD_DIM:
        return f"{heads} heads over {kv_heads} of dimension {dim} are past the operator's limits"
    if kv_heads * dim > _MAX_PAGE_ROW:
        return f"a token's keys have {kv_heads * dim} elements, more than {_MAX_PAGE_ROW}"
    if config.max_position > _MAX_LENGTH:
        return f"the context of {config.max_position} tokens is longer than {_MAX_LENGTH}"
    return None


def _calls(lengths: Sequence[int], num_pages: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Cuts sequences into calls that name at most ``num_pages`` blocks.

    The operator wants that many pages although sequences may share blocks.
    """
    begin = named = 0
    for index, length in enumerate(lengths):
        blocks = -(-length // block_size)
        if named and named + blocks > num_pages:
            yield begin, index
            begin, named = index, 0
        named += blocks
    yield begin, len(lengths)


def _trial_error(attention: NpuPagedAttention, ops: ArrayOps, config: ModelConfig) -> float:
    """Largest difference from NumPy on scattered pages with the model's heads."""
    rng = np.random.default_rng(0)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = [-(-length // _TRIAL_BLOCK_SIZE) for length in _TRIAL_LENGTHS]
    table = np.zeros((len(blocks), max(blocks)), np.int32)
    order = rng.permutation(sum(blocks)).astype(np.int32) + 1
    for row, (ids, count) in enumerate(
        zip(np.split(order, np.cumsum(blocks)[:-1]), blocks, strict=True)
    ):
        table[row, :count] = ids
    q = rng.uniform(-1, 1, (len(blocks), heads, dim)).astype(np.float32)
    shape = (2, sum(blocks) + 1, _TRIAL_BLOCK_SIZE, kv_heads, dim)
    pages = rng.uniform(-1, 1, shape).astype(np.float32)
    keys, values = (ops.array(part).to(attention.dtype) for part in pages)
    scale = 2.0 * dim**-0.5  # not the operator's default, and scores that matter
    got = ops.numpy(attention(ops.array(q), keys, values, ops.array(table), _TRIAL_LENGTHS, scale))
    error = 0.0
    for row, length in enumerate(_TRIAL_LENGTHS):
        k, v = pages[:, table[row]].reshape(2, -1, kv_heads, dim)[:, :length]
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("hd,thd->ht", q[row], k) * scale
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), v)
        error = float(np.maximum(error, np.abs(got[row] - expected.reshape(-1)).max()))
    return error
