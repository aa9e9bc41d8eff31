"""Weights in GGUF formats on a device: their values, and products of few rows, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda.attention_reference import from_bits, to_bits

quant = pytest.importorskip("sagellm._core").quant

BLOCKS = {  # bytes, columns
    "Q4_0": (18, 32),
    "Q4_1": (20, 32),
    "Q5_0": (22, 32),
    "Q5_1": (24, 32),
    "Q8_0": (34, 32),
    "Q4_K": (144, 256),
    "Q5_K": (176, 256),
    "Q6_K": (210, 256),
}
SCALES = {  # places of float16 numbers in a block
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_matrix(name: str, n: int, k: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Rows of random bytes with moderate scales, and their values."""
    rng = np.random.default_rng((n, k, len(name)))
    size, columns = BLOCKS[name]
    blocks = rng.integers(0, 256, (n, k // columns, size), dtype=np.uint8)
    for place in SCALES[name]:
        scales = rng.uniform(-0.02, 0.02, (n, k // columns, 1)).astype(np.float16)
        blocks[..., place : place + 2] = scales.view(np.uint8)
    raw = blocks.reshape(n, -1)
    return raw, quant.dequantize(name, raw.reshape(-1), n * k).reshape(n, k)


def rounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the kernels make of activations: int8 for every 32 columns."""
    m, k = x.shape
    units = x.astype(np.float32).reshape(m, k // 32, 32)
    largest = np.abs(units).max(-1, keepdims=True)
    inverse = np.where(largest > 0, np.float32(127) / np.maximum(largest, 1e-30), 0)
    d = (largest / np.float32(127)).astype(np.float64)
    values: NDArray[np.float64] = np.rint(units * inverse.astype(np.float32)) * d
    return values.reshape(m, k)


def close(got: NDArray[Any], expected: NDArray[np.float64], relative: float) -> bool:
    return bool(np.linalg.norm(got - expected) <= relative * np.linalg.norm(expected))


@pytest.mark.parametrize("name", BLOCKS)
def test_values_are_those_of_the_file(cuda: ModuleType, name: str) -> None:
    columns = BLOCKS[name][1]
    n, k = 37, 3 * columns if columns == 256 else 7 * columns
    raw, values = random_matrix(name, n, k)
    matrix = cuda.QuantizedMatrix(name, raw, n, k)
    for first_row, rows, first, width in [(0, n, 0, k), (16, 21, 32, k - 96), (32, 5, k - 32, 32)]:
        for dtype in ("bfloat16", "float16"):
            out = cuda.empty([rows, width], np.dtype(np.uint16))
            matrix.dequantize(
                out,
                first_row=first_row,
                num_rows=rows,
                first_column=first,
                num_columns=width,
                type=dtype,
            )
            part = values[first_row : first_row + rows, first : first + width]
            assert np.array_equal(out.numpy(), to_bits(part, dtype))


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_are_gathered_exactly(cuda: ModuleType, name: str) -> None:
    k = 512 if BLOCKS[name][1] == 256 else 160
    raw, values = random_matrix(name, 20, k)
    ids = np.array([19, 0, 7, 8, 15, 16, 7], np.int32)
    out = cuda.empty([len(ids), k], np.dtype(np.float32))
    cuda.QuantizedMatrix(name, raw, 20, k).embedding(cuda.array(ids), out, 1.5)
    assert np.array_equal(out.numpy(), values[ids] * np.float32(1.5))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_product_agrees_with_float64(cuda: ModuleType, orders: range, name: str) -> None:
    n, k = 35, 2304 if BLOCKS[name][1] == 256 else 1248  # some warps do two steps
    raw, values = random_matrix(name, n, k)
    rng = np.random.default_rng(1)
    bits = to_bits(rng.standard_normal((8, k)), "bfloat16")
    x = from_bits(bits, "bfloat16")
    x[3, 64:96] = 0
    bits[3, 64:96] = 0
    bias = rng.standard_normal(n).astype(np.float32)
    exact = rounded(x) @ values.astype(np.float64).T
    matrix = cuda.QuantizedMatrix(name, raw, n, k)
    first: Any = None
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        out = cuda.empty([8, n], np.dtype(np.float32))
        matrix.linear(cuda.array(bits), out, cuda.array(bias))
        assert close(out.numpy(), exact + bias, 1e-6)
        assert first is None or np.array_equal(out.numpy(), first)
        first = out.numpy()
    assert close(exact, x @ values.astype(np.float64).T, 0.01)
    alone = cuda.empty([1, n], np.dtype(np.float32))
    matrix.linear(cuda.array(bits[5:6]), alone, cuda.array(bias))
    assert np.array_equal(alone.numpy()[0], first[5])  # whatever else is in the batch
    narrow = cuda.empty([8, n], np.dtype(np.uint16))
    matrix.linear(cuda.array(bits), narrow, cuda.array(bias), out_type="float16")
    assert np.array_equal(narrow.numpy(), to_bits(first, "float16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 8), (3, 33, 200), (8, 40, 1160)])
def test_dense_rows_agree_with_float64(
    cuda: ModuleType, dtype: str, m: int, n: int, k: int
) -> None:
    rng = np.random.default_rng((m, n, k))
    x = to_bits(rng.standard_normal((m, k)), dtype)
    weights = to_bits(rng.standard_normal((n, k)), dtype)
    bias = rng.standard_normal(n).astype(np.float32)
    out = cuda.empty([m, n], np.dtype(np.float32))
    cuda.small_linear(cuda.array(x), cuda.array(weights), out, cuda.array(bias), dtype)
    exact = from_bits(x, dtype) @ from_bits(weights, dtype).T + bias
    assert close(out.numpy(), exact, 1e-6)
    alone = cuda.empty([1, n], np.dtype(np.float32))
    cuda.small_linear(cuda.array(x[-1:]), cuda.array(weights), alone, cuda.array(bias), dtype)
    assert np.array_equal(alone.numpy()[0], out.numpy()[-1])
    narrow = cuda.empty([m, n], np.dtype(np.uint16))
    cuda.small_linear(cuda.array(x), cuda.array(weights), narrow, cuda.array(bias), dtype)
    assert np.array_equal(narrow.numpy(), to_bits(out.numpy(), dtype))


def test_what_does_not_fit_is_refused(cuda: ModuleType) -> None:
    raw, _ = random_matrix("Q4_0", 16, 64)
    with pytest.raises(ValueError, match="whole blocks of 256"):
        cuda.QuantizedMatrix("Q4_K", raw, 16, 64)
    with pytest.raises(ValueError, match="take 576 bytes"):
        cuda.QuantizedMatrix("Q4_0", raw[:15], 16, 64)
    with pytest.raises(Exception, match="no CUDA kernel reads Q2_K"):
        cuda.QuantizedMatrix("Q2_K", raw, 16, 256)
    matrix = cuda.QuantizedMatrix("Q4_0", raw, 16, 64)
    with pytest.raises(ValueError, match="these kernels take 8"):
        matrix.linear(
            cuda.array(np.zeros((9, 64), np.uint16)), cuda.empty([9, 16], np.dtype(np.float32))
        )
