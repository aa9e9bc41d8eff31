"""Linear layers: the project's own kernel and the calls to cuBLASLt, against float64."""

from __future__ import annotations

import contextlib
import ctypes
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda.attention_reference import from_bits, to_bits
from sagellm.backends.cuda import cublas_folders
from sagellm.errors import DeviceUnavailableError

SHAPES = [  # few rows (up to 64) and many, whole tiles and ragged ones, one stage and several
    (1, 32, 32),
    (1, 33, 136),
    (3, 40, 72),
    (16, 32, 128),
    (17, 34, 1032),
    (64, 65, 256),
    (65, 130, 96),
    (128, 128, 32),
    (129, 257, 168),
]


def random_bits(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    bits = to_bits(rng.standard_normal(shape), dtype)
    return bits, from_bits(bits, dtype)


def case(m: int, n: int, k: int, dtype: str) -> tuple[list[NDArray[Any]], NDArray[np.float64]]:
    """x, weights and bias as bits, and the product."""
    rng = np.random.default_rng((m, n, k))
    x, x_values = random_bits(rng, (m, k), dtype)
    weights, weight_values = random_bits(rng, (n, k), dtype)
    bias, bias_values = random_bits(rng, (n,), dtype)
    return [x, weights, bias], x_values @ weight_values.T + bias_values


def relative_error(got: NDArray[Any], expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_the_product_agrees_with_float64(
    cuda: ModuleType, orders: range, m: int, n: int, k: int, dtype: str
) -> None:
    arrays, expected = case(m, n, k, dtype)
    x, weights, bias = map(cuda.array, arrays)
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        wide = cuda.empty([m, n], np.dtype(np.float32))
        cuda.gemm(x, weights, wide, bias, type=dtype)
        assert relative_error(wide.numpy(), expected) < 1e-6
        narrow = cuda.empty([m, n], np.dtype(np.uint16))
        cuda.gemm(x, weights, narrow, bias, type=dtype)
        rounding = 2.0**-9 if dtype == "bfloat16" else 2.0**-12
        assert relative_error(from_bits(narrow.numpy(), dtype), expected) < rounding


def test_a_row_has_the_same_bits_in_any_batch(cuda: ModuleType) -> None:
    arrays, _ = case(130, 96, 1032, "bfloat16")
    weights = cuda.array(arrays[1])

    def rows(count: int, first: int = 0) -> NDArray[np.float32]:
        out = cuda.empty([count, 96], np.dtype(np.float32))
        cuda.gemm(cuda.array(arrays[0][first : first + count]), weights, out)
        result: NDArray[np.float32] = out.numpy()
        return result

    whole = rows(130)
    for first, count in [(0, 1), (129, 1), (3, 5), (60, 64), (60, 65)]:
        assert np.array_equal(rows(count, first), whole[first : first + count])


def test_without_bias_nothing_is_added(cuda: ModuleType) -> None:
    arrays, expected = case(5, 24, 40, "float16")
    out = cuda.empty([5, 24], np.dtype(np.float32))
    cuda.gemm(cuda.array(arrays[0]), cuda.array(arrays[1]), out, type="float16")
    assert relative_error(out.numpy(), expected - from_bits(arrays[2], "float16")) < 1e-6


def test_shapes_that_do_not_fit_are_refused(cuda: ModuleType) -> None:
    def zeros(*shape: int) -> Any:
        return cuda.array(np.zeros(shape, np.uint16))

    with pytest.raises(ValueError, match="multiple of 8"):
        cuda.gemm(zeros(2, 12), zeros(4, 12), zeros(2, 4))
    with pytest.raises(ValueError, match="columns"):
        cuda.gemm(zeros(2, 16), zeros(4, 8), zeros(2, 4))
    with pytest.raises(ValueError, match="out has 7 elements"):
        cuda.gemm(zeros(2, 16), zeros(4, 16), zeros(7))
    with pytest.raises(ValueError, match="bias has 3"):
        cuda.gemm(zeros(2, 16), zeros(4, 16), zeros(2, 4), zeros(3))
    with pytest.raises(ValueError, match="int8"):
        cuda.gemm(zeros(2, 16), zeros(4, 16), zeros(2, 4), type="int8")


@pytest.mark.build
def test_matrix_loads_have_no_bank_conflicts(emulated: ModuleType) -> None:
    for m in (16, 128):
        arrays, _ = case(m, 64, 256, "bfloat16")
        out = emulated.empty([m, 64], np.dtype(np.float32))
        emulated.statistics()
        emulated.gemm(emulated.array(arrays[0]), emulated.array(arrays[1]), out)
        counts = emulated.statistics()
        assert counts["matrix_load_phases"] == 4 * counts["matrix_loads"]


@pytest.mark.build
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cublas_is_told_the_right_product(
    emulated: ModuleType, fake_cublas_folder: str, dtype: str
) -> None:
    library = emulated.CublasLt([fake_cublas_folder])
    assert library.version == 130000 and library.path.startswith(fake_cublas_folder)
    for m, n, k in [(1, 24, 32), (5, 16, 40), (5, 16, 40)]:
        arrays, expected = case(m, n, k, dtype)
        x, weights, bias = map(emulated.array, arrays)
        out = emulated.empty([m, n], np.dtype(np.float32))
        library.gemm(x, weights, out, bias, type=dtype)
        assert relative_error(out.numpy(), expected) < 1e-6
        library.gemm(x, weights, out, type=dtype)
        assert relative_error(out.numpy(), expected - from_bits(arrays[2], dtype)) < 1e-6
    assert library.plans == 4  # two shapes, with and without bias; the third time nothing is new


@pytest.mark.cuda
def test_cublas_agrees_with_float64() -> None:
    module = pytest.importorskip("sagellm._cuda", reason="sagellm._cuda is not built")
    count, reason = module.probe()
    if count == 0:
        pytest.skip(reason)
    library = module.CublasLt(cublas_folders())
    for m, n, k in SHAPES:
        arrays, expected = case(m, n & ~7, k, "bfloat16")
        x, weights, bias = map(module.array, arrays)
        out = module.empty([m, n & ~7], np.dtype(np.float32))
        library.gemm(x, weights, out, bias)
        assert relative_error(out.numpy(), expected) < 1e-5


@pytest.mark.build
def test_a_missing_cublas_says_how_to_get_it(emulated: ModuleType, tmp_path: Any) -> None:
    for name in ("libcublasLt.so.13", "libcublasLt.so.12"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            pytest.skip("this system has cuBLAS")
    (tmp_path / "libcublasLt.so.13").write_text("not a library")
    with pytest.raises(
        DeviceUnavailableError, match=r"cuBLASLt was not found .*pip install nvidia-cublas"
    ):
        emulated.CublasLt([str(tmp_path)])
