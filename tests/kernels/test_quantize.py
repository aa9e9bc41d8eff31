"""Activation quantization of every instruction set against its definition in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core")

from sagellm import _core
from sagellm.errors import InvalidArgumentError

kernels = _core.kernels
Floats = NDArray[np.float32]
LIMIT = {"a8": np.float32(127), "a15": np.float32(16256)}

pytestmark = [
    pytest.mark.native,
    pytest.mark.parametrize("isa", kernels.available_isas()),
    pytest.mark.parametrize("precision", ["a8", "a15"]),
]


def integers(result: dict[str, Any]) -> NDArray[np.int64]:
    """The integer X that a result stands for."""
    high = result["q"].astype(np.int64)
    return high * 128 + result["q_lo"] if "q_lo" in result else high


def rows(tokens: int, k: int, seed: int = 0) -> Floats:
    """Normal rows whose blocks of 32 have very different magnitudes."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(10.0 ** rng.uniform(-6, 6, (tokens, k // 32)), 32, axis=1)
    return (rng.standard_normal((tokens, k)) * scale).astype(np.float32)


@pytest.mark.parametrize(("tokens", "k"), [(1, 32), (3, 96), (7, 576)])
def test_follows_the_definition(isa: str, precision: str, tokens: int, k: int) -> None:
    x = rows(tokens, k)
    got = kernels.quantize(isa, x, precision)
    blocks = x.reshape(tokens, k // 32, 32)
    d = np.abs(blocks).max(-1) / LIMIT[precision]
    exact = np.rint(blocks * (np.float32(1) / d)[..., None]).astype(np.int64)
    value = integers(got).reshape(exact.shape)
    assert np.array_equal(got["d"], d)
    assert np.array_equal(value, exact)
    assert np.array_equal(got["sum16"].ravel(), value.reshape(-1, 16).sum(-1))
    assert np.array_equal(got["s"], d * value.sum(-1).astype(np.float32))


def test_error_is_half_a_step(isa: str, precision: str) -> None:
    x = rows(5, 320, seed=1)
    got = kernels.quantize(isa, x, precision)
    step = np.repeat(got["d"].astype(np.float64), 32, axis=1)
    assert np.all(np.abs(integers(got) * step - x) <= step * (0.5 + 1e-6 * LIMIT[precision]))


def test_planes_stay_in_their_ranges(isa: str, precision: str) -> None:
    x = np.tile(np.linspace(-1, 1, 32, dtype=np.float32), (2, 50))
    x[1] = np.random.default_rng(2).uniform(-1, 1, 1600)
    got = kernels.quantize(isa, x, precision)
    assert got["q"].min() == -127
    assert got["q"].max() == 127
    if precision == "a15":
        assert got["q_lo"].min() >= -64
        assert got["q_lo"].max() <= 63
        assert np.abs(integers(got)).max() == 16256


def test_zeros_and_values_too_small_to_scale_give_zeros(isa: str, precision: str) -> None:
    x = np.zeros((2, 32), np.float32)
    x[1] = 1e-42
    got = kernels.quantize(isa, x, precision)
    for name, array in got.items():
        assert not array.any(), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_spoils_its_block_only(isa: str, precision: str, bad: float) -> None:
    x = rows(1, 96, seed=3)
    clean = kernels.quantize(isa, x, precision)
    x[0, 40] = bad
    got = kernels.quantize(isa, x, precision)
    assert not np.isfinite(got["d"][0, 1])
    assert np.isnan(got["s"][0, 1])
    assert not integers(got)[0, 32:64].any()
    for block in (0, 2):
        assert got["d"][0, block] == clean["d"][0, block]
        span = slice(32 * block, 32 * block + 32)
        assert np.array_equal(integers(got)[0, span], integers(clean)[0, span])


def test_partial_blocks_and_unknown_precisions_are_refused(isa: str, precision: str) -> None:
    with pytest.raises(InvalidArgumentError, match="multiple of 32"):
        kernels.quantize(isa, np.zeros((1, 33), np.float32), precision)
    with pytest.raises(InvalidArgumentError, match="a8"):
        kernels.quantize(isa, np.zeros((1, 32), np.float32), precision + "x")
