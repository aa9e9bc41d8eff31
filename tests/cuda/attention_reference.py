"""Paged attention in float64, and pages in the layout of the CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

E4M3 = np.array(
    [
        (-1.0 if code & 0x80 else 1.0)
        * (
            (code & 7) * 2.0**-9
            if (code >> 3) & 15 == 0
            else (8 + (code & 7)) * 2.0 ** (((code >> 3) & 15) - 10)
        )
        for code in range(256)
    ]
)
E4M3[[0x7F, 0xFF]] = np.nan


def to_bits(values: NDArray[np.floating], dtype: str) -> NDArray[np.uint16]:
    """Rounds to nearest even, as the 16 bits of bfloat16 or float16."""
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    words = values.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16], dtype: str) -> NDArray[np.float64]:
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def encode_rows(
    rows: NDArray[np.float64], kv_type: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, NDArray[np.float64]]:
    """Rows [..., head_dim] as bytes, their scales, and the values that the bytes stand for."""
    if kv_type in ("bfloat16", "float16"):
        bits = to_bits(rows, kv_type)
        return bits.view(np.uint8), None, from_bits(bits, kv_type)
    largest = np.abs(rows).max(-1)
    scale = (largest / (127.0 if kv_type == "int8" else 448.0)).astype(np.float32)
    codes = rows / np.maximum(scale.astype(np.float64), 1e-30)[..., None]
    if kv_type == "int8":
        integers = np.clip(np.rint(codes), -127, 127).astype(np.int8)
        return integers.view(np.uint8), scale, integers * scale.astype(np.float64)[..., None]
    finite = E4M3[:0x7F]
    upper = np.clip(np.searchsorted(finite, np.abs(codes)), 1, 0x7E)
    nearest = np.where(
        np.abs(codes) - finite[upper - 1] <= finite[upper] - np.abs(codes), upper - 1, upper
    )
    table = (nearest | np.where(codes < 0, 0x80, 0)).astype(np.uint8)
    return table, scale, E4M3[table] * scale.astype(np.float64)[..., None]


@dataclass(slots=True, kw_only=True)
class Case:
    """Sequences of `contexts` tokens, the last `queries` of which ask."""

    contexts: list[int]
    queries: list[int]
    num_kv_heads: int = 1
    group: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_type: str = "bfloat16"
    window: int = 0
    softcap: float = 0.0
    shared: int = 0
    """Tokens that all sequences begin with, in the same blocks; a multiple of the page size."""
    seed: int = 0
    deterministic: bool = False
    cascade: tuple[int, int] = (1024, 8)
    prefill_kernel: str = "wide"
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = 0.7 / self.head_dim**0.5


@dataclass(slots=True, kw_only=True)
class Step:
    """Inputs of a step as the kernels take them, and what they stand for."""

    case: Case
    query_starts: NDArray[np.int32]
    positions: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    q_bits: NDArray[np.uint16]
    pool: NDArray[np.uint8]
    slot_offset: int
    block_stride: int
    keys: list[NDArray[np.float64]]
    values: list[NDArray[np.float64]]

    def expected(self) -> NDArray[np.float64]:
        """[tokens, heads, head_dim]."""
        case = self.case
        q = from_bits(self.q_bits, case.dtype)
        out = np.empty_like(q)
        for s, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for t in range(self.query_starts[s], self.query_starts[s + 1]):
                position = int(self.positions[t])
                first = max(0, position - case.window + 1) if case.window else 0
                for h in range(q.shape[1]):
                    head = h // case.group
                    scores = keys[first : position + 1, head] @ q[t, h] * case.scale
                    if case.softcap:
                        scores = case.softcap * np.tanh(scores / case.softcap)
                    weights = np.exp(scores - scores.max())
                    out[t, h] = weights / weights.sum() @ values[first : position + 1, head]
        return out


def build(case: Case) -> Step:
    """Random queries and pages; blocks lie in random order, bytes that nobody wrote are NaN."""
    rng = np.random.default_rng(case.seed)
    heads, dim, page = case.num_kv_heads, case.head_dim, case.page_size
    element = 2 if case.kv_type in ("bfloat16", "float16") else 1
    plane = page * heads * dim * element
    scales = 0 if element == 2 else page * heads * 4
    slot = 2 * (plane + scales)
    slot_offset, block_stride = 48, 48 + slot + 16  # neighbours in the block that are not ours

    counts = [-(-context // page) for context in case.contexts]
    shared_blocks = case.shared // page
    order = rng.permutation(1 + sum(counts) + 3).astype(np.int32)
    blocks = iter(order[order != 0])
    prefix = [next(blocks) for _ in range(shared_blocks)]
    tables = np.zeros((len(counts), max(counts) + 1), np.int32)
    pool = np.full((len(order), block_stride), 0xFF, np.uint8)
    prefix_rows = rng.standard_normal((2, case.shared, heads, dim))
    keys, values = [], []
    for s, (context, count) in enumerate(zip(case.contexts, counts, strict=True)):
        tables[s, :count] = [*prefix[:count], *(next(blocks) for _ in range(count - len(prefix)))]
        rows = rng.standard_normal((2, context, heads, dim)) * rng.uniform(
            0.3, 3.0, (2, context, heads, 1)
        )
        rows[:, : case.shared] = prefix_rows[:, :context]
        encoded, row_scales, meaning = encode_rows(rows, case.kv_type)
        keys.append(meaning[0])
        values.append(meaning[1])
        data = encoded.reshape(2, context, heads, dim * element)
        for t in range(context):
            block = pool[tables[s, t // page]][slot_offset : slot_offset + slot]
            rows_of_block = block[: 2 * plane].reshape(2, heads, page, dim * element)
            rows_of_block[:, :, t % page] = data[:, t]
            if row_scales is not None:
                scales_of_block = block[2 * plane :].reshape(2, heads, page, 4)
                scales_of_block[:, :, t % page] = (
                    np.ascontiguousarray(row_scales[:, t]).view(np.uint8).reshape(2, heads, 4)
                )
    starts = np.concatenate([[0], np.cumsum(case.queries)]).astype(np.int32)
    positions = np.concatenate(
        [np.arange(c - n, c) for c, n in zip(case.contexts, case.queries, strict=True)]
    ).astype(np.int32)
    q = rng.standard_normal((starts[-1], heads * case.group, dim)) * 1.5
    return Step(
        case=case,
        query_starts=starts,
        positions=positions,
        block_tables=tables,
        q_bits=to_bits(q, case.dtype),
        pool=pool,
        slot_offset=slot_offset,
        block_stride=block_stride,
        keys=keys,
        values=values,
    )
