"""What the project's kernels are compared with: torch, a Triton kernel over pages, transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def gpu_seconds(run: Callable[[int], object], repeat: int = 20) -> float:
    """Median seconds of a call on the device, by CUDA graph where torch can capture it. `run` takes
    the number of the call, to take turns with inputs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(repeat):
            run(i)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repeat * 1e-3)
    return sorted(times)[len(times) // 2]


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 4 GB."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / gpu_seconds(lambda _: target.copy_(source), 5)


def matrix_rate(size: int = 8192) -> float:
    """bf16 operations per second of torch's matrix product on random data."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / gpu_seconds(lambda _: a @ b, 5)


def linear_seconds(m: int, n: int, k: int) -> float:
    """A bf16 linear layer by torch, whose weights come from memory and not from the cache."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    copies = max(1, min(8, 200_000_000 // (2 * n * k) + 1))
    w = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    return gpu_seconds(lambda i: torch.nn.functional.linear(x, w[i % copies]), 16)


def sdpa_seconds(
    sequences: int, queries: int, context: int, heads: int, kv_heads: int, dim: int
) -> dict[str, float]:
    """torch's attention over dense keys and values, per backend that runs."""
    shape = (sequences, kv_heads, context, dim)
    kv_bytes = 4 * sequences * kv_heads * context * dim
    copies = max(1, min(16, 400_000_000 // kv_bytes))
    kv = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for _ in range(copies)
    ]
    q = torch.randn((sequences, heads, queries, dim), dtype=torch.bfloat16, device="cuda")
    found = {}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):

        def run(i: int) -> object:
            k, v = kv[i % copies]
            return scaled_dot_product_attention(
                q, k, v, is_causal=queries > 1, enable_gqa=heads != kv_heads
            )

        try:
            with sdpa_kernel(backend):
                found[name] = gpu_seconds(run, 16)
        except RuntimeError:  # this backend does not take these inputs
            continue
    return found


@triton.jit
def _paged_split(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, part_ptr, stats_ptr, scale, table_stride, splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_ptr + sequence)
    span = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE
    begin, end = split * span, tl.minimum((split + 1) * span, length)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    row_head = head * GROUP + rows
    q = tl.load(
        q_ptr + (sequence * HEADS + row_head[:, None]) * DIM + dims[None, :],
        mask=rows[:, None] < GROUP, other=0.0,
    )  # fmt: skip
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        seen = position < end
        block = tl.load(table_ptr + sequence * table_stride + position // PAGE, mask=seen, other=0)
        row = (block.to(tl.int64) * KV_HEADS + head) * PAGE + position % PAGE
        k = tl.load(k_ptr + row[:, None] * DIM + dims[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        most = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - most[:, None])
        fade = tl.exp(largest - most)
        v = tl.load(v_ptr + row[:, None] * DIM + dims[None, :], mask=seen[:, None], other=0.0)
        out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * fade + tl.sum(weights, 1)
        largest = most
    at = (sequence * HEADS + row_head) * splits + split
    mask = rows < GROUP
    tl.store(part_ptr + at[:, None] * DIM + dims[None, :], out, mask=mask[:, None])
    tl.store(stats_ptr + at * 2, largest, mask=mask)
    tl.store(stats_ptr + at * 2 + 1, total, mask=mask)


@triton.jit
def _paged_merge(part_ptr, stats_ptr, out_ptr, splits, DIM: tl.constexpr, MOST: tl.constexpr):
    row = tl.program_id(0)
    split, dims = tl.arange(0, MOST), tl.arange(0, DIM)
    used = split < splits
    largest = tl.load(stats_ptr + (row * splits + split) * 2, mask=used, other=-1e30)
    total = tl.load(stats_ptr + (row * splits + split) * 2 + 1, mask=used, other=0.0)
    weight = tl.exp(largest - tl.max(largest, 0))
    part = tl.load(
        part_ptr + (row * splits + split[:, None]) * DIM + dims[None, :],
        mask=used[:, None], other=0.0,
    )  # fmt: skip
    out = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + row * DIM + dims, out.to(out_ptr.dtype.element_ty))


def triton_paged_seconds(
    sequences: int, context: int, heads: int, kv_heads: int, dim: int, page: int
) -> float:
    """A split-KV decode kernel in Triton over the same pages, best of a few numbers of splits."""
    blocks = -(-context // page)
    total = sequences * blocks
    shape = (total, kv_heads, page, dim)
    copies = max(1, min(16, 400_000_000 // (4 * total * kv_heads * page * dim)))
    pools = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for _ in range(copies)
    ]
    table = torch.randperm(total, device="cuda").to(torch.int32).view(sequences, blocks)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device="cuda")
    q = torch.randn((sequences, heads, dim), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    group = heads // kv_heads
    best = float("inf")
    for splits in (1, 2, 4, 8, 16, 32):
        if splits > 1 and context // splits < 64:
            break
        part = torch.empty((sequences * heads, splits, dim), device="cuda")
        stats = torch.empty((sequences * heads, splits, 2), device="cuda")

        def run(i: int, splits: int = splits, part: Any = part, stats: Any = stats) -> None:
            k, v = pools[i % copies]
            _paged_split[(sequences, kv_heads, splits)](
                q, k, v, table, lengths, part, stats, dim**-0.5, blocks, splits,
                HEADS=heads, KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, group), DIM=dim,
                PAGE=page, TILE=64, num_warps=4, num_stages=3,
            )  # fmt: skip
            _paged_merge[(sequences * heads,)](part, stats, out, splits, DIM=dim, MOST=32)

        best = min(best, gpu_seconds(run, 16))
    return best


def transformers_decode_seconds(batch: int, context: int, steps: int = 8) -> float:
    """Seconds of a decode step of a Llama 3 8B shape with random bf16 weights in transformers."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), torch.no_grad():
            model = transformers.LlamaForCausalLM(config).eval()
            cache = transformers.DynamicCache()
            for begin in range(0, context, 256):
                ids = torch.randint(0, 128256, (batch, min(256, context - begin)))
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = torch.randint(0, 128256, (batch, 1))
            times = []
            for _ in range(steps):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e-3)
    finally:
        torch.set_default_dtype(torch.float32)
    return sorted(times)[len(times) // 2]
