"""The encoder's element-wise kernels of every instruction set against float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from sagellm import _core
from sagellm.errors import InvalidArgumentError

kernels = _core.kernels
Floats = NDArray[np.float32]
SIZES = (1, 7, 8, 15, 16, 17, 31, 33, 384, 1000)

pytestmark = pytest.mark.parametrize("isa", kernels.available_isas())


def normal(n: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def gelu(x: Floats) -> NDArray[np.float64]:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])


def test_gelu_is_accurate_over_the_whole_range(isa: str) -> None:
    x = np.concatenate([np.linspace(-9, 9, 40001), np.logspace(-9, 2, 500)]).astype(np.float32)
    got = kernels.bias_gelu(isa, x, np.zeros_like(x))
    exact = gelu(x)
    assert np.abs(got - exact)[np.abs(x) < 9].max() < 4e-7
    relative = np.abs(got - exact) / np.abs(exact).clip(1e-30)
    assert relative[np.abs(x) < 4].max() < 2e-6
    bias = normal(x.size)
    np.testing.assert_array_equal(
        kernels.bias_gelu(isa, x, bias), kernels.bias_gelu(isa, x + bias, np.zeros_like(x))
    )


def test_gelu_at_infinity_and_nan(isa: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, -20.0, 20.0, 0.0], np.float32)
    got = kernels.bias_gelu(isa, x, np.zeros_like(x))
    np.testing.assert_array_equal(got, np.array([np.inf, 0, np.nan, 1e30, 0, 0, 20, 0], np.float32))


@pytest.mark.parametrize("n", SIZES)
def test_layer_norm_matches_float64(isa: str, n: int) -> None:
    for offset in (0.0, 100.0):
        x, weight, bias = normal(n, 1) + np.float32(offset), normal(n, 2), normal(n, 3)
        y = x.astype(np.float64)
        exact = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * weight + bias
        got = kernels.layer_norm(isa, x, weight, bias, 1e-5)
        np.testing.assert_allclose(got, exact, atol=2e-6 if offset == 0 else 2e-4)


def test_layer_norm_of_a_constant_row_is_the_bias(isa: str) -> None:
    for n in SIZES:
        bias = normal(n)
        got = kernels.layer_norm(isa, np.full(n, 3.25, np.float32), normal(n, 1), bias, 1e-12)
        np.testing.assert_allclose(got, bias, atol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_softmax_matches_float64(isa: str, n: int) -> None:
    for scale in (1.0, 30.0, 1000.0):
        x = normal(n, n) * np.float32(scale)
        y = np.exp(x.astype(np.float64) - x.max())
        np.testing.assert_allclose(kernels.softmax(isa, x), y / y.sum(), atol=3e-7, rtol=3e-6)


def test_arrays_must_fit(isa: str) -> None:
    with pytest.raises(InvalidArgumentError):
        kernels.layer_norm(isa, normal(3), normal(4), normal(3), 1e-5)
    with pytest.raises(InvalidArgumentError):
        kernels.softmax(isa, normal(0))
