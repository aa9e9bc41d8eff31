"""Times paged attention on a device and prints each case beside its floor.

``python -m tests.cuda.attention_benchmark [--copy TB/s] [--matrix TFLOP/s] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sagellm import _cuda as cuda


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`sequences` of `context` tokens, the last `queries` of which ask."""

    name: str
    sequences: int
    context: int
    queries: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_type: str = "bfloat16"
    window: int = 0
    deterministic: bool = False
    shared: int = 0
    prefill_kernel: str = "auto"


LOADS = (
    Load(name="decode, 1 x 1K", sequences=1, context=1024),
    Load(name="decode, 1 x 32K", sequences=1, context=32768),
    Load(name="decode, 32 x 4K", sequences=32, context=4096),
    Load(name="decode, 64 x 1K", sequences=64, context=1024),
    Load(name="decode, 128 x 4K", sequences=128, context=4096),
    Load(name="decode, 128 x 4K, page 64", sequences=128, context=4096, page_size=64),
    Load(name="decode, 128 x 4K, fp8", sequences=128, context=4096, kv_type="fp8_e4m3"),
    Load(name="decode, 128 x 4K, int8", sequences=128, context=4096, kv_type="int8"),
    Load(name="decode, 128 x 4K, D 64", sequences=128, context=4096, head_dim=64),
    Load(name="decode, 32 x 4K, MHA", sequences=32, context=4096, num_kv_heads=32),
    Load(name="decode, 128 x 4K, deterministic", sequences=128, context=4096, deterministic=True),
    Load(name="decode, 64 x 4K, 3.5K shared", sequences=64, context=4096, shared=3584),
    Load(name="prefill, 1 x 8K", sequences=1, context=8192, queries=8192),
    Load(name="prefill, 1 x 8K, page 64", sequences=1, context=8192, queries=8192, page_size=64),
    Load(name="prefill, 1 x 8K, D 64", sequences=1, context=8192, queries=8192, head_dim=64),
    Load(name="prefill, 1 x 8K, D 96", sequences=1, context=8192, queries=8192, head_dim=96),
    Load(name="prefill, 8 x 1K", sequences=8, context=1024, queries=1024),
    Load(name="prefill, 1 x 512 after 16K", sequences=1, context=16896, queries=512),
    Load(name="prefill, 1 x 8K, fp8", sequences=1, context=8192, queries=8192, kv_type="fp8_e4m3"),
)
# What runs on wgmma by itself, once more on mma.
LOADS += tuple(
    replace(load, name=f"{load.name}, wide kernel", prefill_kernel="wide")
    for load in LOADS
    if load.queries > 1 and load.kv_type == "bfloat16"
)


def floor_us(load: Load, copy_tb: float, matrix_tflop: float) -> float:
    """The larger of the bytes over the copy rate and the products over the tensor cores' rate."""
    element = 2.0 if load.kv_type == "bfloat16" else 1.0 + 4.0 / load.head_dim
    tokens = load.sequences * (load.context - load.shared) + load.shared
    row = load.num_kv_heads * load.head_dim
    query = load.num_heads * load.head_dim * load.sequences * load.queries
    total_bytes = 2 * tokens * row * element + 2 * 2 * query
    seen = load.queries * (load.context - (load.queries - 1) / 2)
    products = 4.0 * load.sequences * load.num_heads * load.head_dim * seen
    return max(total_bytes / copy_tb, products / matrix_tflop) * 1e-6


def measure_us(load: Load, replays: int, rng: np.random.Generator) -> float:
    slot = cuda.kv_slot_bytes(load.kv_type, load.page_size, load.num_kv_heads, load.head_dim)
    blocks = -(-load.context // load.page_size)
    own = blocks - load.shared // load.page_size
    total = load.sequences * own + blocks - own + 1
    order = rng.permutation(np.arange(1, total, dtype=np.int32))
    prefix = np.broadcast_to(order[: blocks - own], (load.sequences, blocks - own))
    rest = order[blocks - own :].reshape(load.sequences, own)
    tables = np.concatenate([prefix, rest], axis=1)
    positions = np.tile(
        np.arange(load.context - load.queries, load.context, dtype=np.int32), load.sequences
    )
    starts = np.arange(load.sequences + 1, dtype=np.int32) * load.queries
    # Small finite values in every type: no byte above 0x3f, so that no float is large or NaN.
    one_pool = rng.integers(0, 0x40, total * slot, dtype=np.uint8)
    # Inputs that fit in the cache take turns, so that memory is measured and not the cache.
    pools = [cuda.array(one_pool) for _ in range(max(1, min(64, 400_000_000 // one_pool.size)))]
    width = load.num_heads * load.head_dim
    q = cuda.array(rng.integers(0x3F00, 0x3F80, (len(positions), width)).astype(np.uint16))
    out = cuda.empty([len(positions), width], np.dtype(np.uint16))
    attention = cuda.PagedAttention(
        num_heads=load.num_heads,
        num_kv_heads=load.num_kv_heads,
        head_dim=load.head_dim,
        page_size=load.page_size,
        kv_type=load.kv_type,
        scale=load.head_dim**-0.5,
        window=load.window,
        deterministic=load.deterministic,
        prefill_kernel=load.prefill_kernel,
    )
    attention.plan(starts, positions, tables)
    return 1e3 * float(statistics.median(attention.time(q, pools, 0, slot, out, replays)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copy", type=float, default=4.3, help="TB/s of a copy, measured")
    parser.add_argument("--matrix", type=float, default=780.0, help="TFLOP/s of bf16, measured")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda.use_device(0)
    rng = np.random.default_rng(0)
    results = []
    print(f"{'case':36}{'us':>10}{'floor':>10}{'of floor':>10}")
    for load in LOADS:
        floor = floor_us(load, options.copy, options.matrix)
        time = measure_us(load, options.replays, rng)
        print(f"{load.name:36}{time:10.1f}{floor:10.1f}{floor / time:10.0%}")
        results.append({**asdict(load), "us": time, "floor_us": floor})
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
