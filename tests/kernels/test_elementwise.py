"""Element-wise kernels of every instruction set against float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from sagellm import _core
from sagellm.errors import InvalidArgumentError, UnsupportedError

kernels = _core.kernels
Floats = NDArray[np.float32]


def _runnable(isa: str) -> bool:
    try:
        kernels.add(isa, np.zeros(1, np.float32), np.zeros(1, np.float32))
    except UnsupportedError:
        return False
    return True


ISAS = [isa for isa in ("generic", "avx2", "avx512", "avx512_bf16") if _runnable(isa)]
SIZES = (1, 7, 8, 15, 16, 33, 576, 1000)

pytestmark = pytest.mark.parametrize("isa", ISAS)


def spread(n: int, seed: int = 0, low: float = -9, high: float = 2) -> Floats:
    """Both signs, magnitudes from 10**low to 10**high."""
    rng = np.random.default_rng(seed)
    magnitude = 10.0 ** rng.uniform(low, high, n)
    return (rng.choice([-1.0, 1.0], n) * magnitude).astype(np.float32)


def relative_error(actual: Floats, exact: NDArray[np.float64], floor: float = 1e-35) -> float:
    return float(np.max(np.abs(actual - exact) / np.maximum(np.abs(exact), floor)))


def silu(x: Floats) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return y / (1 + np.exp(-y))


def gelu(x: Floats) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return y / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def test_silu_is_accurate_over_the_whole_range(isa: str) -> None:
    x = np.concatenate([spread(20000, high=1.9), np.linspace(-86, 86, 20001, dtype=np.float32)])
    assert relative_error(kernels.silu_mul(isa, x, np.ones_like(x)), silu(x)) < 1e-6


def test_gelu_is_accurate_over_the_whole_range(isa: str) -> None:
    x = np.concatenate([spread(20000, high=1), np.linspace(-4, 9, 20001, dtype=np.float32)])
    got = kernels.gelu_tanh_mul(isa, x, np.ones_like(x))
    assert relative_error(got, gelu(x)) < 1.2e-5  # near -10 the exponent, -87, is itself rounded
    near = np.abs(x) < 3
    assert relative_error(got[near], gelu(x[near])) < 1.5e-6


def test_softcap_is_accurate_over_the_whole_range(isa: str) -> None:
    for cap in (1.0, 30.0, 50.0):
        x = np.concatenate([spread(20000, high=3), np.linspace(-60, 60, 20001, dtype=np.float32)])
        exact = cap * np.tanh(x.astype(np.float64) / cap)
        assert relative_error(kernels.softcap(isa, x, cap), exact) < 6e-7


def test_activations_at_infinity_and_nan(isa: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, -1000.0, -88.0, 0.0], np.float32)
    one = np.ones_like(x)
    for name in ("silu_mul", "gelu_tanh_mul"):
        out = getattr(kernels, name)(isa, x, one)
        assert out[0] == np.inf and np.isnan(out[2]) and out[3] == np.float32(1e30)
        assert (np.abs(out[[1, 4, 5, 6, 7]]) < 1e-35).all()
    capped = kernels.softcap(isa, x, 30.0)
    np.testing.assert_array_equal(capped[[0, 1, 3, 4, 7]], np.float32([30, -30, 30, -30, 0]))
    assert np.isnan(capped[2])


def test_nan_with_a_payload_stays_nan(isa: str) -> None:
    x = np.full(16, 0x7F800001 | 0x1FF, np.uint32).view(np.float32)
    assert np.isnan(kernels.silu_mul(isa, x, np.ones_like(x))).all()
    assert np.isnan(kernels.softcap(isa, x, 2.0)).all()
    bits = kernels.to_bf16(isa, x).astype(np.uint32) << 16
    assert np.isnan(bits.view(np.float32)).all()


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(isa: str, n: int) -> None:
    x, weight = spread(n, 1, -2, 1), spread(n, 2, -1, 1)
    exact = x / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5) * weight
    assert relative_error(kernels.rms_norm(isa, x, weight, 1e-5), exact) < 1e-6


def test_rms_norm_of_zeros_is_zero(isa: str) -> None:
    zeros = np.zeros(40, np.float32)
    assert (kernels.rms_norm(isa, zeros, np.ones_like(zeros), 1e-6) == 0).all()


@pytest.mark.parametrize("n", SIZES)
def test_add_and_scale_are_exact(isa: str, n: int) -> None:
    a, b = spread(n, 3), spread(n, 4)
    np.testing.assert_array_equal(kernels.add(isa, a, b), a + b)
    np.testing.assert_array_equal(kernels.scale(isa, a, 0.3), a * np.float32(0.3))


@pytest.mark.parametrize("rot", [2, 16, 32, 50, 64, 80, 128, 256])
def test_rope_rotates_pairs_half_a_head_apart(isa: str, rot: int) -> None:
    x = spread(rot, 5, -1, 1)
    angle = np.linspace(0, 6, rot // 2)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[: rot // 2].astype(np.float64), x[rot // 2 :].astype(np.float64)
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin])
    np.testing.assert_allclose(kernels.rope(isa, x, cos, sin), exact, atol=3e-6 * np.abs(x).max())


@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_an_element_does_not_depend_on_its_place(isa: str, name: str) -> None:
    fn = getattr(kernels, name)
    a, b = spread(100, 6), spread(100, 7)
    whole = fn(isa, a, b)
    for begin, end in ((0, 1), (3, 50), (97, 100), (33, 42)):
        part = fn(isa, a[begin:end].copy(), b[begin:end].copy())
        assert part.tobytes() == whole[begin:end].tobytes()


def test_to_bf16_rounds_to_nearest_even(isa: str) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 5003, np.uint32)
    bits[:4] = (0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF)  # two ties, above a tie, overflow
    magnitude = bits & 0x7FFFFFFF
    bits = bits[(magnitude >= 0x00800000) & (magnitude < 0x7F800000)]  # normal numbers
    expected = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(kernels.to_bf16(isa, bits.view(np.float32)), expected)
    assert list(expected[:4]) == [0x3F80, 0x3F82, 0x3F81, 0x7F80]


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_argmax_takes_the_lowest_index_and_skips_nan(isa: str, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, n).astype(np.float32)
    x[rng.random(n) < 0.2] = np.nan
    x[rng.random(n) < 0.1] = -np.inf
    value, index = kernels.argmax(isa, x)
    if np.isnan(x).all():
        assert index == 0 and math.isnan(value)
    else:
        assert index == int(np.nanargmax(x)) and value == np.nanmax(x)


def test_argmax_of_minus_infinities(isa: str) -> None:
    assert kernels.argmax(isa, np.full(40, -np.inf, np.float32)) == (-math.inf, 0)


@pytest.mark.parametrize("n", [*SIZES, 49152, 262144])
def test_sum_exp(isa: str, n: int) -> None:
    x = (np.random.default_rng(n).standard_normal(n) * 6).astype(np.float32)
    top = float(x.max())
    exact = np.exp(x.astype(np.float64) - top).sum()
    assert abs(kernels.sum_exp(isa, x, top) / exact - 1) < 3e-7
    shifted = x.copy()
    assert kernels.sum_exp(isa, shifted, top) == kernels.sum_exp(isa, x, top)


@pytest.mark.parametrize("n", [*SIZES, 49152])
def test_sampling_weights(isa: str, n: int) -> None:
    x = (np.random.default_rng(n).standard_normal(n) * 6).astype(np.float32)
    x[n // 2] = -np.inf
    largest, rate = float(x.max()) if n > 1 else 0.0, 9.5
    cut = np.float32(largest - 100)  # 2^-950 of the largest
    total, weights = kernels.sampling_weights(isa, x, largest, rate, cut)
    exact = np.where(x >= cut, np.exp2((x.astype(np.float64) - largest) * rate), 0.0)
    np.testing.assert_allclose(weights, exact, rtol=1e-15, atol=0)
    assert (weights[x == np.float32(largest)] == 1.0).all()
    assert total == pytest.approx(math.fsum(weights), rel=1e-14, abs=0)
    assert kernels.sampling_weights(isa, x.copy(), largest, rate, cut)[0] == total


def test_size_mismatch_is_an_error(isa: str) -> None:
    with pytest.raises(InvalidArgumentError, match="elements"):
        kernels.add(isa, np.zeros(3, np.float32), np.zeros(4, np.float32))
