"""Matmul with FP8 weights: every instruction set against float64 and against each other."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from models.make_fp8 import e4m3_decode, expand_scales
from sagellm import _core
from sagellm.errors import CorruptFileError, InvalidArgumentError

pytestmark = pytest.mark.native

ISAS = _core.kernels.available_isas()
SHAPES = [(1, 1), (23, 33), (70, 128), (33, 576), (130, 1000)]


def random_codes(n: int, k: int) -> NDArray[np.uint8]:
    codes = np.random.default_rng((n, k)).integers(0, 256, (n, k)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E  # no NaN
    return codes


def scales_of(kind: str, n: int, k: int) -> NDArray[np.float32]:
    shape = {"one": (), "rows": (n, 1), "blocks": (-(-n // 128), -(-k // 128))}[kind]
    rng = np.random.default_rng((n, k, 1))
    return np.asarray(10.0 ** rng.uniform(-4, 0, shape), np.float32)


@pytest.mark.parametrize("kind", ["one", "rows", "blocks"])
def test_products_match_float64_and_have_the_same_bits_everywhere(kind: str) -> None:
    for n, k in SHAPES:
        codes, scales = random_codes(n, k), scales_of(kind, n, k)
        weights = _core.quant.pack("F8_E4M3", codes, n, k, scales=scales)
        values = e4m3_decode(codes) * expand_scales(scales, n, k)
        assert weights.format == "F8_E4M3"
        np.testing.assert_array_equal(weights.unpack_row(n - 1), values[n - 1].astype(np.float32))
        x = np.random.default_rng(5).standard_normal((33, k)).astype(np.float32)
        exact = x.astype(np.float64) @ values.T
        bound = 2e-6 * (np.abs(x) @ np.abs(values).T) + 1e-30
        expected = _core.kernels.matmul("generic", weights, x)
        assert np.all(np.abs(expected - exact) <= bound), (n, k)
        for isa in ISAS:
            for tokens in (1, 2, 3, 4, 5, 6, 13, 33):
                got = _core.kernels.matmul(isa, weights, x[:tokens])
                np.testing.assert_array_equal(got, expected[:tokens], str((isa, n, k, tokens)))


@pytest.mark.parametrize("isa", ISAS)
def test_every_code_is_exact(isa: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(256, 1)
    codes[codes & 0x7F == 0x7F] = 0
    weights = _core.quant.pack("F8_E4M3", codes, 256, 1)
    got = _core.kernels.matmul(isa, weights, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(got[0], e4m3_decode(codes)[:, 0])


def test_scales_that_do_not_fit_are_refused() -> None:
    codes = random_codes(40, 200)
    with pytest.raises(CorruptFileError, match=r"does not fit a matrix of 40 x 200"):
        _core.quant.pack("F8_E4M3", codes, 40, 200, scales=np.ones((2, 2), np.float32))
    with pytest.raises(InvalidArgumentError, match="only F8_E4M3"):
        raw = np.zeros((4, 64), np.uint8)
        _core.quant.pack("F16", raw, 4, 32, scales=np.ones(1, np.float32))
