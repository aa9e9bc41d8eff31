"""Matmul kernels of every instruction set and weight format against float64 NumPy."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from sagellm import _core
from sagellm.errors import InvalidArgumentError

kernels = _core.kernels
Floats = NDArray[np.float32]
Exact = NDArray[np.float64]

ISAS = kernels.available_isas()
FLOAT_FORMATS = ("F32", "F16", "BF16")
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
TOKENS = (1, 2, 3, 5, 8, 13, 33)
#: Byte offsets of the IEEE halves in a GGUF block.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}

pytestmark = pytest.mark.native


def random_rows(fmt: str, n: int, k: int, seed: int = 0) -> tuple[NDArray[np.uint8], Floats]:
    """Raw rows of random codes, [n, row bytes], and the values that the gguf package reads."""
    rng = np.random.default_rng(seed)
    if fmt in FLOAT_FORMATS:
        values = rng.standard_normal((n, k)).astype(np.float32)
        if fmt == "F16":
            half = values.astype(np.float16)
            return half.view(np.uint8), half.astype(np.float32)
        if fmt == "BF16":
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            return bits.view(np.uint8), (bits.astype(np.uint32) << 16).view(np.float32)
        return values.view(np.uint8), values
    kind = gguf.GGMLQuantizationType[fmt]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (n, k // elements, size), dtype=np.uint8)
    for at in HALVES[fmt]:
        scale = rng.choice([-1, 1], raw.shape[:2]) * 10.0 ** rng.uniform(-3, -1, raw.shape[:2])
        raw[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    raw = np.ascontiguousarray(raw.reshape(n, -1))
    return raw, gguf.quants.dequantize(raw, kind).reshape(n, k)


def packed(fmt: str, n: int, k: int, seed: int = 0) -> tuple[Any, Floats]:
    raw, values = random_rows(fmt, n, k, seed)
    return _core.quant.pack(fmt, raw, n, k), values


def seen(isa: str, x: Floats, precision: str) -> Exact:
    """The activations that a quantized matmul multiplies with."""
    e = kernels.quantize(isa, x, precision)
    value = e["q"].astype(np.float64)
    if precision == "a15":
        value = 128 * value + e["q_lo"]
    return value * np.repeat(e["d"].astype(np.float64), 32, axis=1)


def relative_error(actual: Floats, exact: Exact) -> float:
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))


def activations(tokens: int, k: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((tokens, k)).astype(np.float32)


def columns(fmt: str) -> tuple[int, ...]:
    if fmt in FLOAT_FORMATS:
        return (1, 33, 576)
    return (256, 768) if fmt.endswith("_K") else (32, 96, 576)


@pytest.mark.parametrize("precision", ["a8", "a15"])
@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("isa", ISAS)
def test_quantized_weights_match_float64(isa: str, fmt: str, precision: str) -> None:
    for k in columns(fmt):
        for n in (1, 23, 70):
            w, values = packed(fmt, n, k)
            for tokens in TOKENS:
                x = activations(tokens, k)
                got = kernels.matmul(isa, w, x, precision)
                exact = seen(isa, x, precision) @ values.T.astype(np.float64)
                scale = np.abs(seen(isa, x, precision)) @ np.abs(values.T.astype(np.float64))
                assert got.shape == (tokens, n)
                assert np.all(np.abs(got - exact) <= 2e-6 * scale), (k, n, tokens)


@pytest.mark.parametrize("fmt", FLOAT_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_float_weights_match_float64(isa: str, fmt: str) -> None:
    for k in columns(fmt):
        for n in (1, 23, 70):
            w, values = packed(fmt, n, k)
            for tokens in TOKENS:
                # Exact in bfloat16, which some instruction sets multiply with.
                bits = activations(tokens, k).view(np.uint32) & np.uint32(0xFFFF0000)
                x = bits.view(np.float32)
                got = kernels.matmul(isa, w, x)
                assert relative_error(got, x.astype(np.float64) @ values.T) <= 1e-5, (k, n, tokens)


@pytest.mark.parametrize("precision", ["a8", "a15"])
@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("isa", ISAS)
def test_integer_part_is_exact(isa: str, fmt: str, precision: str) -> None:
    """With unit scales every output is an integer, and below 2**24 nothing may be rounded."""
    n, k = 37, 256
    raw, _ = random_rows(fmt, n, k)
    kind = gguf.GGMLQuantizationType[fmt]
    blocks = raw.reshape(n, k // gguf.GGML_QUANT_SIZES[kind][0], -1)
    for at in HALVES[fmt]:
        blocks[..., at : at + 2] = np.array([1], np.float16).view(np.uint8)
    if fmt in ("Q4_K", "Q5_K"):  # sub-scales and minima 0..3, so that sums stay small
        blocks[..., 4:16] &= 3
    if fmt == "Q6_K":
        blocks[..., 192:208] = (blocks[..., 192:208] % 7) - np.uint8(3)
    for row, code in ((0, 0), (1, 255)):  # extreme codes, in whichever sign they come
        first = {"Q4_K": 16, "Q5_K": 16, "Q8_0": 2}.get(fmt, HALVES[fmt][-1] + 2)
        last = 192 if fmt == "Q6_K" else blocks.shape[-1]
        blocks[row, :, 0 if fmt == "Q6_K" else first : last] = code
    values = gguf.quants.dequantize(raw, kind).reshape(n, k).astype(np.int64)
    limit = 127 if precision == "a8" else 16256
    integers = np.random.default_rng(3).integers(-limit, limit + 1, (9, k))
    integers[0] = limit
    integers[1] = -limit
    integers[5:] %= 21
    integers[:, ::32] = limit  # every block has d = 1
    exact = integers @ values.T
    w = _core.quant.pack(fmt, raw, n, k)
    got = kernels.matmul(isa, w, integers.astype(np.float32), precision)
    small = np.abs(integers) @ np.abs(values.T) < 2**24
    assert np.array_equal(got[small], exact[small].astype(np.float32))
    assert small.any()
    assert np.all(np.abs(got - exact) <= 2e-6 * (np.abs(integers) @ np.abs(values.T)))


@pytest.mark.parametrize("precision", ["a8", "a15"])
@pytest.mark.parametrize("fmt", FLOAT_FORMATS + QUANTIZED)
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_its_batch(isa: str, fmt: str, precision: str) -> None:
    n, k = 70, columns(fmt)[-1]
    w, _ = packed(fmt, n, k)
    x = activations(75, k)
    alone = np.concatenate([kernels.matmul(isa, w, row[None], precision) for row in x])
    for tokens in (*TOKENS, 75):
        for start in {0, 75 - tokens}:
            batch = kernels.matmul(isa, w, x[start : start + tokens], precision)
            assert batch.tobytes() == alone[start : start + tokens].tobytes(), (tokens, start)


@pytest.mark.parametrize("fmt", FLOAT_FORMATS + QUANTIZED)
@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_the_split_into_row_blocks(isa: str, fmt: str) -> None:
    n, k = 9 * 16 - 5, columns(fmt)[-1]
    w, _ = packed(fmt, n, k)
    for tokens in (1, 2, 3, 7, 20):
        x = activations(tokens, k)
        whole = kernels.matmul(isa, w, x)
        for splits in ([1], [4], [1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 8]):
            assert kernels.matmul(isa, w, x, splits=splits).tobytes() == whole.tobytes()


@pytest.mark.parametrize("precision", ["a8", "a15"])
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_instruction_sets_agree_bit_for_bit(fmt: str, precision: str) -> None:
    w, _ = packed(fmt, 50, columns(fmt)[-1])
    x = activations(11, columns(fmt)[-1])
    results = {kernels.matmul(isa, w, x, precision).tobytes() for isa in ISAS}
    assert len(results) == 1


@pytest.mark.parametrize("fmt", FLOAT_FORMATS + QUANTIZED)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_reach_the_output_of_their_token_only(isa: str, fmt: str) -> None:
    k = columns(fmt)[-1]
    w, _ = packed(fmt, 20, k)
    x = activations(5, k)
    clean = kernels.matmul(isa, w, x)
    x[1, 7], x[3, k - 1] = np.nan, np.inf
    got = kernels.matmul(isa, w, x)
    assert not np.isfinite(got[[1, 3]]).any()
    assert np.array_equal(got[[0, 2, 4]], clean[[0, 2, 4]])


def test_wrong_shapes_and_splits_are_refused() -> None:
    w, _ = packed("Q4_0", 16, 64)
    with pytest.raises(InvalidArgumentError, match=r"\[tokens, 64\]"):
        kernels.matmul("generic", w, np.zeros((1, 32), np.float32))
    with pytest.raises(InvalidArgumentError, match="splits"):
        kernels.matmul("generic", w, np.zeros((1, 64), np.float32), splits=[2])
