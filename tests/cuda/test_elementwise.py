"""Element-wise operations of a decoder layer, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda.attention_reference import E4M3, from_bits, to_bits

EPS = 1e-5
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 4e-7}


def store(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    return values.astype(np.float32) if dtype == "float32" else to_bits(values, dtype)


def value(bits: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    return bits.astype(np.float64) if dtype == "float32" else from_bits(bits, dtype)


def element(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.float32 if dtype == "float32" else np.uint16)


def rms_norm(x: NDArray[np.float64], weight: NDArray[Any]) -> NDArray[np.float64]:
    normal: NDArray[np.float64] = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight
    return normal


def assert_close(
    got: NDArray[np.float64], expected: NDArray[np.float64], dtype: str, slack: float = 1e-6
) -> None:
    assert (np.abs(got - expected) <= ROUNDING[dtype] * np.abs(expected) + slack).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_embedding_gathers_and_scales(cuda: ModuleType, dtype: str) -> None:
    rng = np.random.default_rng(0)
    table = store(rng.standard_normal((9, 72)), dtype)
    ids = np.array([8, 0, 3, 3], np.int32)
    out = cuda.empty([4, 72], np.dtype(np.float32))
    cuda.embedding(cuda.array(table), cuda.array(ids), out, 0.5, dtype)
    assert np.array_equal(out.numpy(), (value(table, dtype)[ids] * 0.5).astype(np.float32))


@pytest.mark.parametrize(
    ("n", "delta_type", "out_type"),
    [
        (8, "bfloat16", "bfloat16"),
        (576, "float32", "bfloat16"),
        (2048, "float16", "float16"),
        (264, "float32", "float32"),
        (8200, "float32", "float16"),  # two vectors per thread
    ],
)
@pytest.mark.parametrize("post", [False, True])
def test_the_sum_and_its_norm(
    cuda: ModuleType, n: int, delta_type: str, out_type: str, post: bool
) -> None:
    rng = np.random.default_rng(n)
    residual = rng.standard_normal((3, n)).astype(np.float32)
    delta = store(rng.standard_normal((3, n)) * 2, delta_type)
    weight, post_norm = rng.standard_normal((2, n)).astype(np.float32)
    added = value(delta, delta_type)
    if post:
        added = rms_norm(added, post_norm)
    total = residual + added
    x = cuda.array(residual)
    out = cuda.empty([3, n], element(out_type))
    cuda.add_rms_norm(
        x,
        delta=cuda.array(delta),
        post_norm=cuda.array(post_norm) if post else None,
        weight=cuda.array(weight),
        out=out,
        eps=EPS,
        delta_type=delta_type,
        out_type=out_type,
    )
    assert_close(x.numpy(), total, "float32", 2e-6)
    assert_close(value(out.numpy(), out_type), rms_norm(total, weight), out_type, 4e-6)


def test_only_the_rows_that_are_named_are_normalised(cuda: ModuleType, orders: range) -> None:
    rng = np.random.default_rng(5)
    residual = rng.standard_normal((4, 96)).astype(np.float32)
    weight = rng.standard_normal(96).astype(np.float32)
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        x = cuda.array(residual)
        out = cuda.empty([2, 96], np.dtype(np.float32))
        cuda.add_rms_norm(
            x,
            weight=cuda.array(weight),
            out=out,
            rows=cuda.array(np.array([3, 1], np.int32)),
            eps=EPS,
            delta_type="float32",
            out_type="float32",
        )
        expected = rms_norm(residual[[3, 1]].astype(np.float64), weight)
        assert_close(out.numpy(), expected, "float32")
        assert np.array_equal(x.numpy(), residual)


def test_rope_tables_are_rounded_float64(cuda: ModuleType) -> None:
    positions = np.array([0, 1, 4095, 131071], np.int32)
    frequencies = 500000.0 ** (-np.arange(24) / 24)
    cos, sin = (cuda.empty([4, 24], np.dtype(np.float32)) for _ in range(2))
    cuda.rope_table(cuda.array(positions), cuda.array(frequencies), cos, sin, 1.25)
    angles = positions[:, None] * frequencies
    factor = np.float32(1.25)
    np.testing.assert_allclose(cos.numpy(), np.cos(angles) * factor, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(sin.numpy(), np.sin(angles) * factor, rtol=1e-7, atol=1e-9)


def read_pages(
    pool: NDArray[np.uint8], slots: list[int], heads: int, dim: int, page: int, kv_type: str
) -> NDArray[np.float64]:
    """Rows [2, tokens, heads, dim] that pages hold at `slots`; the slot begins 16 bytes in."""
    size = 2 if kv_type in ("bfloat16", "float16") else 1
    plane = page * heads * dim * size
    rows = []
    for slot in slots:
        block = pool[slot // page][16:]
        codes = block[: 2 * plane].reshape(2, heads, page, dim * size)[:, :, slot % page]
        codes = np.ascontiguousarray(codes)
        if size == 2:
            rows.append(from_bits(codes.view(np.uint16), kv_type))
            continue
        scales = np.ascontiguousarray(block[2 * plane : 2 * plane + 8 * heads * page])
        scale = scales.view(np.float32).reshape(2, heads, page)[:, :, slot % page, None]
        numbers = E4M3[codes] if kv_type == "fp8_e4m3" else codes.view(np.int8)
        rows.append(numbers * scale.astype(np.float64))
    return np.stack(rows, 1)


QKV_CASES = [  # input, kv type, head_dim, half, bias, norm
    ("bfloat16", "bfloat16", 64, 32, False, False),
    ("float16", "int8", 80, 40, True, False),
    ("float32", "fp8_e4m3", 96, 48, False, True),
    ("bfloat16", "int8", 128, 16, True, True),
    ("float32", "float16", 256, 128, True, True),
    ("bfloat16", "fp8_e4m3", 128, 64, False, False),
]


@pytest.mark.parametrize(("dtype", "kv_type", "dim", "half", "bias", "norm"), QKV_CASES)
def test_q_is_finished_and_k_and_v_are_stored(
    cuda: ModuleType, dtype: str, kv_type: str, dim: int, half: int, bias: bool, norm: bool
) -> None:
    tokens, heads, kv_heads, page = 3, 3, 2, 16
    q_type = "float16" if kv_type == "float16" or dtype == "float16" else "bfloat16"
    rng = np.random.default_rng(dim)
    width = (heads + 2 * kv_heads) * dim
    stored = store(rng.standard_normal((tokens, width)), dtype)
    bias_values = rng.standard_normal(width).astype(np.float32)
    q_norm, k_norm = rng.standard_normal((2, dim)).astype(np.float32)
    angles = rng.uniform(0, 6, (tokens, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    slots = np.array([page + 5, -1, 2 * page + 15], np.int32)
    size = 2 if kv_type in ("bfloat16", "float16") else 1
    slot_bytes = 2 * page * kv_heads * (dim * size + (4 if size == 1 else 0))
    pool = cuda.empty([3, slot_bytes + 32], np.dtype(np.uint8))
    q = cuda.empty([tokens, heads * dim], np.dtype(np.uint16))
    cuda.finish_qkv(
        cuda.array(stored),
        cuda.array(cos),
        cuda.array(sin),
        cuda.array(slots),
        q,
        pool,
        slot_offset=16,
        block_stride=slot_bytes + 32,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        page_size=page,
        half=half,
        bias=cuda.array(bias_values) if bias else None,
        q_norm=cuda.array(q_norm) if norm else None,
        k_norm=cuda.array(k_norm) if norm else None,
        eps=EPS,
        type=dtype,
        q_type=q_type,
        kv_type=kv_type,
    )
    x = value(stored, dtype) + (bias_values if bias else 0)
    parts = np.split(x.reshape(tokens, -1, dim), [heads, heads + kv_heads], axis=1)
    expected = []
    for part, weight in zip(parts[:2], (q_norm, k_norm), strict=True):
        y = rms_norm(part, weight) if norm else part.copy()
        low, high = y[..., :half].copy(), y[..., half : 2 * half].copy()
        c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
        y[..., :half] = low * c - high * s
        y[..., half : 2 * half] = high * c + low * s
        expected.append(y)
    assert_close(from_bits(q.numpy(), q_type).reshape(expected[0].shape), expected[0], q_type, 4e-6)

    written = [0, 2]
    rows = read_pages(pool.numpy(), [int(slots[t]) for t in written], kv_heads, dim, page, kv_type)
    for plane, wanted in enumerate((expected[1], parts[2])):
        w = wanted[written]
        if size == 2:
            assert_close(rows[plane], w, kv_type, 4e-6)
            continue
        largest = np.abs(w).max(-1, keepdims=True)
        if kv_type == "int8":
            limit = largest / 254 * 1.0001
        else:
            limit = np.maximum(np.abs(w) / 16, largest / 448 / 1024) * 1.0001
        assert (np.abs(rows[plane] - w) <= limit + 1e-6).all()
    whole = pool.numpy().copy()
    assert (whole[0] == 0xFF).all()  # nothing is stored for the token without a slot
    assert (whole[:, :16] == 0xFF).all() and (whole[:, slot_bytes + 16 :] == 0xFF).all()


@pytest.mark.parametrize("function", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("dtype", "out_type"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")],
)
def test_gates(cuda: ModuleType, function: str, dtype: str, out_type: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 2 * 72)) * 3
    x[0, :4] = [-200.0, 200.0, 0.0, -30.0]
    bits = store(x, dtype)
    out = cuda.empty([3, 72], element(out_type))
    cuda.gated_activation(cuda.array(bits), out, function, dtype, out_type)
    gate, up = np.split(value(bits, dtype), 2, axis=1)
    if function == "silu":
        activated = gate / (1 + np.exp(-gate))
    else:
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        activated = 0.5 * gate * (1 + np.tanh(inner))
    assert_close(value(out.numpy(), out_type), activated * up, out_type, 4e-6)


def test_softcap_and_conversions(cuda: ModuleType) -> None:
    rng = np.random.default_rng(4)
    x = (rng.standard_normal(520) * 40).astype(np.float32)
    capped = cuda.array(x)
    cuda.softcap(capped, 30.0)
    assert_close(capped.numpy(), 30 * np.tanh(x.astype(np.float64) / 30), "float32", 1e-5)
    for dtype in ("bfloat16", "float16"):
        narrow = cuda.empty([520], np.dtype(np.uint16))
        cuda.convert(cuda.array(x), narrow, "float32", dtype)
        assert np.array_equal(narrow.numpy(), to_bits(x, dtype))
        wide = cuda.empty([520], np.dtype(np.float32))
        cuda.convert(narrow, wide, dtype, "float32")
        assert np.array_equal(wide.numpy(), from_bits(narrow.numpy(), dtype))


def test_shapes_that_do_not_fit_are_refused(cuda: ModuleType) -> None:
    x = cuda.array(np.zeros((2, 16), np.float32))
    with pytest.raises(ValueError, match="twice its columns"):
        cuda.gated_activation(
            x, cuda.empty([2, 16], np.dtype(np.float32)), "silu", *["float32"] * 2
        )
    with pytest.raises(ValueError, match="multiple of 8"):
        cuda.add_rms_norm(cuda.array(np.zeros((2, 12), np.float32)))
    with pytest.raises(ValueError, match="one type must be float32"):
        cuda.convert(x, x, "float32", "float32")
