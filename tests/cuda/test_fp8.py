"""Linear layers with FP8 weights: kernels against float64, and models against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("sagellm._core", reason="the KV cache's bookkeeping is native")
from cuda.attention_reference import from_bits, to_bits
from cuda.test_engine import decode_all, divergence, reference_logits, tokens_of
from cuda.test_gemm import random_bits, relative_error
from models.make_fp8 import Layout, e4m3_codes, e4m3_decode, make_fp8_hf
from reference.cases import chunked_logits
from sagellm.backends import cuda as backend
from sagellm.backends.cuda import CudaRunner
from sagellm.checkpoint import Checkpoint, open_checkpoint
from sagellm.errors import CorruptFileError, UnsupportedError

LAYOUTS: tuple[Layout, ...] = ("tensor", "scalar", "channel", "block")
SHAPES = [(1, 33, 32), (3, 40, 144), (7, 20, 1168), (8, 64, 2064)]  # warps with two turns
MANY = [(9, 33, 48), (17, 70, 272), (64, 64, 1024), (65, 130, 144), (130, 257, 400)]


def matrix(rng: np.random.Generator, n: int, k: int, groups: int) -> tuple[Any, Any, Any]:
    """Codes [n, k], scales [groups, n] and values of a random matrix."""
    codes = rng.integers(0, 256, (n, k)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E  # no NaN
    scales = (10.0 ** rng.uniform(-4, 0, (groups, n))).astype(np.float32)
    of_columns = np.repeat(scales, 128, axis=0)[:k].T if groups > 1 else scales.T
    return codes, scales, e4m3_decode(codes) * of_columns.astype(np.float64)


def groups_of(grouped: bool, k: int) -> int:
    return -(-k // 128) if grouped else 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_few_rows_agree_with_float64(
    cuda: ModuleType, orders: range, m: int, n: int, k: int, dtype: str, grouped: bool
) -> None:
    rng = np.random.default_rng((m, n, k))
    codes, scales, values = matrix(rng, n, k, groups_of(grouped, k))
    x, x_values = random_bits(rng, (m, k), dtype)
    bias = rng.standard_normal(n).astype(np.float32)
    arrays = [cuda.array(a) for a in (x, codes, scales)]
    expected = x_values @ values.T + bias
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        wide = cuda.empty([m, n], np.dtype(np.float32))
        cuda.fp8_small_linear(*arrays, wide, cuda.array(bias), type=dtype)
        assert relative_error(wide.numpy(), expected) < 2e-6
    narrow = cuda.empty([m, n], np.dtype(np.uint16))
    cuda.fp8_small_linear(*arrays, narrow, type=dtype)
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert relative_error(from_bits(narrow.numpy(), dtype), expected - bias) < rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_code_is_exact(cuda: ModuleType, dtype: str) -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], np.uint8)
    weights = np.zeros((256, 16), np.uint8)
    weights[np.arange(256), np.arange(256) % 16] = codes
    x = to_bits(np.ones((1, 16)), dtype)
    out = cuda.empty([1, 256], np.dtype(np.float32))
    scales = np.full((1, 256), 2.0**-20, np.float32)
    cuda.fp8_small_linear(*map(cuda.array, (x, weights, scales)), out, type=dtype)
    np.testing.assert_array_equal(out.numpy()[0], e4m3_decode(codes) * 2.0**-20)


def quantized(cuda: ModuleType, x: NDArray[Any], type: str) -> tuple[Any, Any]:
    codes = cuda.empty(list(x.shape), np.dtype(np.uint8))
    scales = cuda.empty([x.shape[0]], np.dtype(np.float32))
    cuda.fp8_quantize(cuda.array(x), codes, scales, type=type)
    return codes, scales


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_rounded_to_nearest_even_codes(cuda: ModuleType, dtype: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((6, 2576)) * 10.0 ** np.array([[-4], [-2], [0], [1], [2], [0]])
    values[1, :5] = [0.5, 449, -449, 2.0**-12, 0]  # outlier: many subnormal codes
    values[5] = 0
    bits = values.astype(np.float32) if dtype == "float32" else to_bits(values, dtype)
    exact = (bits if dtype == "float32" else from_bits(bits, dtype)).astype(np.float32)
    codes, scales = (a.numpy() for a in quantized(cuda, bits, dtype))
    largest = np.abs(exact).max(axis=1)
    np.testing.assert_array_equal(scales, largest / np.float32(448))
    inverse = np.divide(np.float32(448), largest, where=largest > 0, out=np.zeros_like(largest))
    np.testing.assert_array_equal(codes, e4m3_codes(exact * inverse[:, None]))


def test_a_row_that_is_not_finite_spoils_only_itself(cuda: ModuleType) -> None:
    x = np.ones((5, 32), np.float32)
    x[1, 3], x[2, 31], x[3, 0] = np.nan, -np.inf, 1e-38
    x[3, 1:] = 0
    codes, scales = quantized(cuda, x, "float32")
    np.testing.assert_array_equal(np.isnan(scales.numpy()), [False, True, True, False, False])
    assert scales.numpy()[3] == 0 and not codes.numpy()[3].any()
    weights = np.full((4, 32), e4m3_codes(np.ones(1))[0], np.uint8)
    out = cuda.empty([5, 4], np.dtype(np.float32))
    ones = np.ones((1, 4), np.float32)
    cuda.fp8_gemm(codes, scales, cuda.array(weights), cuda.array(ones), out)
    np.testing.assert_allclose(out.numpy()[[0, 3, 4], 0], [32, 0, 32], rtol=1e-6)
    assert np.isnan(out.numpy()[[1, 2]]).all()


def product(
    cuda: ModuleType, m: int, n: int, k: int, grouped: bool
) -> tuple[list[Any], NDArray[np.float64]]:
    """x, its scales, weights and their scales on the device, and the exact product."""
    rng = np.random.default_rng((m, n, k))
    codes, scales, values = matrix(rng, n, k, groups_of(grouped, k))
    x, x_scales, x_values = matrix(rng, m, k, 1)
    arrays = [cuda.array(a) for a in (x, x_scales.reshape(-1), codes, scales)]
    return arrays, x_values @ values.T


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 32), *MANY])
def test_the_product_agrees_with_float64(
    cuda: ModuleType, orders: range, m: int, n: int, k: int, grouped: bool
) -> None:
    arrays, expected = product(cuda, m, n, k, grouped)
    for seed in orders:
        if len(orders) > 1:
            cuda.set_order(seed)
        wide = cuda.empty([m, n], np.dtype(np.float32))
        cuda.fp8_gemm(*arrays, wide)
        assert relative_error(wide.numpy(), expected) < 1e-6
    for dtype, rounding in (("bfloat16", 2.0**-8), ("float16", 2.0**-11)):
        narrow = cuda.empty([m, n], np.dtype(np.uint16))
        cuda.fp8_gemm(*arrays, narrow, type=dtype)
        values = from_bits(narrow.numpy(), dtype)
        fits = np.abs(expected) < 6e4  # float16
        assert relative_error(values[fits], expected[fits]) < rounding


@pytest.mark.parametrize("grouped", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(cuda: ModuleType, grouped: bool) -> None:
    (x, x_scales, codes, scales), _ = product(cuda, 130, 96, 1040, grouped)
    x, x_scales = x.numpy(), x_scales.numpy()

    def rows(count: int, first: int = 0) -> NDArray[np.float32]:
        out = cuda.empty([count, 96], np.dtype(np.float32))
        part = slice(first, first + count)
        cuda.fp8_gemm(cuda.array(x[part]), cuda.array(x_scales[part]), codes, scales, out)
        result: NDArray[np.float32] = out.numpy()
        return result

    whole = rows(130)
    for first, count in [(0, 1), (129, 1), (3, 5), (60, 64), (60, 65)]:
        assert np.array_equal(rows(count, first), whole[first : first + count])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_are_codes_times_scales_rounded_once(
    cuda: ModuleType, dtype: str, grouped: bool
) -> None:
    codes, scales, values = matrix(np.random.default_rng(2), 21, 2320, groups_of(grouped, 2320))
    out = cuda.empty([5, 2320], np.dtype(np.uint16))
    cuda.fp8_dequantize(cuda.array(codes), cuda.array(scales), out, 16, type=dtype)
    expected = to_bits(values[16:].astype(np.float32), dtype)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_shapes_that_do_not_fit_are_refused(cuda: ModuleType) -> None:
    def codes(*shape: int) -> Any:
        return cuda.array(np.zeros(shape, np.uint8))

    def scales(*shape: int) -> Any:
        return cuda.array(np.zeros(shape, np.float32))

    x = cuda.array(np.zeros((2, 272), np.uint16))
    with pytest.raises(ValueError, match="multiple of 16"):
        cuda.fp8_small_linear(x, codes(4, 24), scales(1, 4), scales(2, 4))
    with pytest.raises(ValueError, match=r"scales have shape \[2, 4\], expected \[1 or 3, 4\]"):
        cuda.fp8_small_linear(x, codes(4, 272), scales(2, 4), scales(2, 4))
    with pytest.raises(ValueError, match="at most 8 rows"):
        many = cuda.array(np.zeros((9, 272), np.uint16))
        cuda.fp8_small_linear(many, codes(4, 272), scales(1, 4), scales(9, 4))
    with pytest.raises(ValueError, match="x_scales has 1"):
        cuda.fp8_gemm(codes(2, 272), scales(1), codes(4, 272), scales(1, 4), scales(2, 4))


@pytest.mark.build
@pytest.mark.parametrize("grouped", [False, True])
def test_matrix_loads_have_no_bank_conflicts(emulated: ModuleType, grouped: bool) -> None:
    for m in (16, 128):
        arrays, _ = product(emulated, m, 64, 512, grouped)
        out = emulated.empty([m, 64], np.dtype(np.float32))
        emulated.statistics()
        emulated.fp8_gemm(*arrays, out)
        counts = emulated.statistics()
        assert counts["matrix_load_phases"] == 4 * counts["matrix_loads"] > 0


@pytest.mark.build
def test_cublas_is_told_the_right_product(emulated: ModuleType, fake_cublas_folder: str) -> None:
    library = emulated.CublasLt([fake_cublas_folder])
    for m, n, k, grouped, possible in [
        (9, 32, 48, False, True),
        (9, 32, 48, False, True),
        (9, 33, 48, False, False),  # n is not a multiple of 16
        (9, 32, 272, True, False),
    ]:
        arrays, expected = product(emulated, m, n, k, grouped)
        out = emulated.empty([m, n], np.dtype(np.float32))
        assert library.fp8_gemm(*arrays, out) == possible
        if possible:
            assert relative_error(out.numpy(), expected) < 1e-6
    assert library.plans == 2  # one of them says that there is no algorithm


# ------------------------------------------------------------------------------------------ models

DIMS = {"hidden_size": 144, "intermediate_size": 272, "head_dim": 48}  # ragged blocks of 128
MakeRunner = Callable[..., CudaRunner]


@pytest.fixture
def make_runner(cuda: ModuleType) -> MakeRunner:
    def make(checkpoint: Checkpoint, **options: Any) -> CudaRunner:
        return CudaRunner(
            checkpoint, module=cuda, **{"cublas": False, "max_batch_tokens": 96, **options}
        )

    return make


def tiny(tmp_path: Path, layout: Layout = "channel", arch: str = "llama", **options: Any) -> Any:
    return open_checkpoint(make_fp8_hf(tmp_path / "model", layout, arch, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_agrees_with_the_reference(
    make_runner: MakeRunner, tmp_path: Path, layout: Layout
) -> None:
    checkpoint = tiny(tmp_path, layout, **DIMS)
    runner = make_runner(checkpoint)
    assert runner.kv_dtype == "bf16"
    expected = reference_logits(checkpoint)
    few = chunked_logits(runner, tokens_of(24), 8, block_size=16)  # activations stay bfloat16
    assert divergence(expected, few) < 1e-3
    many = chunked_logits(make_runner(checkpoint), tokens_of(24), 24, block_size=16)
    assert few.tobytes() != many.tobytes()
    assert divergence(expected, many) < 2e-2  # activations in FP8


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3"])
def test_other_architectures_agree_with_the_reference(
    make_runner: MakeRunner, tmp_path: Path, arch: str
) -> None:
    checkpoint = tiny(tmp_path, "block", arch)
    got = chunked_logits(make_runner(checkpoint), tokens_of(24), 8, block_size=16)
    assert divergence(reference_logits(checkpoint), got) < 1e-3


@pytest.mark.parametrize("deterministic", [False, True])
def test_fp8_stands_beside_dense_weights(
    make_runner: MakeRunner, tmp_path: Path, deterministic: bool
) -> None:
    skip = ("q_proj.weight", "up_proj.weight", "layers.1.mlp.down_proj.weight")
    checkpoint = tiny(tmp_path, "channel", skip=skip)
    runner = make_runner(checkpoint, deterministic=deterministic)
    expected = reference_logits(checkpoint)
    assert divergence(expected, chunked_logits(runner, tokens_of(24), 24, block_size=16)) < 2e-2
    few = chunked_logits(
        make_runner(checkpoint, deterministic=deterministic), tokens_of(24), 8, block_size=16
    )
    assert divergence(expected, few) < (2e-2 if deterministic else 1e-3)


def test_float16_checkpoints_have_float16_activations(
    make_runner: MakeRunner, tmp_path: Path
) -> None:
    checkpoint = tiny(tmp_path, "channel", dtype="F16", lm_head=True)
    runner = make_runner(checkpoint)
    assert runner.kv_dtype == "f16"
    got = chunked_logits(runner, tokens_of(24), 8, block_size=16)
    assert divergence(reference_logits(checkpoint), got) < 1e-3


def test_weights_take_one_byte(make_runner: MakeRunner, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, "channel", **DIMS)
    matrices = sum(
        int(np.prod(checkpoint.files[s.file].tensors[s.tensor].shape))
        for name, s in checkpoint.sources.items()
        if name.rpartition(".")[2] in ("q", "k", "v", "o", "gate", "up", "down")
    )
    head = 2 * checkpoint.config.vocab_size * checkpoint.config.hidden_size
    rows = make_runner(checkpoint).weight_bytes_per_token - matrices - head
    assert 0 < rows < 0.05 * matrices  # one scale each


@pytest.mark.parametrize("layout", ["channel", "block"])
def test_deterministic_answers_do_not_depend_on_chunks_or_batch(
    make_runner: MakeRunner, tmp_path: Path, layout: Layout
) -> None:
    checkpoint = tiny(tmp_path, layout, **DIMS)
    tokens = tokens_of(70)
    results = {
        chunked_logits(
            make_runner(checkpoint, deterministic=True), tokens, chunk, block_size=16
        ).tobytes()
        for chunk in (70, 33, 7)
    }
    assert len(results) == 1
    together = decode_all(make_runner(checkpoint, deterministic=True), 11)
    fewer = decode_all(make_runner(checkpoint, deterministic=True), 2)
    for many, few in zip(together, fewer, strict=True):
        assert many[:2].tobytes() == few.tobytes()


@pytest.mark.build
def test_a_model_goes_through_cublas(
    emulated: ModuleType, fake_cublas_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "cublas_folders", lambda: [fake_cublas_folder])
    checkpoint = tiny(tmp_path, "channel")
    runner = CudaRunner(checkpoint, module=emulated)
    got = chunked_logits(runner, tokens_of(24), 24, block_size=16)
    own = CudaRunner(checkpoint, module=emulated, cublas=False)
    expected = chunked_logits(own, tokens_of(24), 24, block_size=16)
    assert divergence(expected, got) < 1e-4


def test_weights_that_are_not_numbers_are_named(make_runner: MakeRunner, tmp_path: Path) -> None:
    folder = make_fp8_hf(tmp_path / "model", "channel")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    checkpoint = open_checkpoint(folder)
    source = checkpoint.sources["layers.1.up"]
    codes = checkpoint.files[source.file].raw(source.tensor).tobytes()
    raw[raw.index(codes) + 5] = 0xFF
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError, match=r"layers.1.up' has weights that are NaN"):
        make_runner(open_checkpoint(folder))


def test_columns_that_do_not_fit_are_refused(make_runner: MakeRunner, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, "channel", intermediate_size=104)
    with pytest.raises(UnsupportedError, match=r"layers.0.down' has 104 columns.*multiple of 16"):
        make_runner(checkpoint)
