"""The native codec and packing against the independent `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sagellm.errors import InvalidArgumentError, UnsupportedError

pytestmark = pytest.mark.native
quant = pytest.importorskip("sagellm._core").quant

FORMATS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
}
PACKED_AS = {name: name for name in FORMATS if name != "Q2_K"} | {"IQ4_NL": "Q8_0", "Q3_K": "Q6_K"}
QUANTIZED = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Bytes of the half-precision scales of a block.
SCALE_BYTES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
# Zeros of both signs, smallest and largest subnormal, smallest and largest normal, infinities, NaN.
EXTREME_HALVES = (
    0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00,
)  # fmt: skip


def random_rows(format_name: str, rows: int, k: int, seed: int) -> np.ndarray:
    """Random blocks: any bytes, with scales that are finite halves."""
    elements, size = FORMATS[format_name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * k // elements, size), dtype=np.uint8)
    if format_name in ("F32", "F16", "BF16"):
        values = rng.standard_normal(rows * k).astype(np.float32)
        blocks = quant.quantize(format_name, values).reshape(-1, size)
    for offset in SCALE_BYTES.get(format_name, ()):
        scales = rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def oracle(format_name: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, GGMLQuantizationType[format_name]).reshape(-1)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype == np.float32
    assert got.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_lists_every_format():
    assert set(quant.FORMATS) == {*FORMATS, "F8_E4M3"}


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_matches_gguf_bit_for_bit(name: str):
    raw = random_rows(name, 8, 1024, seed=1).reshape(-1)
    assert_same_bits(quant.dequantize(name, raw, 8 * 1024), oracle(name, raw))


@pytest.mark.parametrize("name", SCALE_BYTES)
def test_dequantize_matches_gguf_on_extreme_scales(name: str):
    elements, size = FORMATS[name]
    combinations = [(a, b) for a in EXTREME_HALVES for b in EXTREME_HALVES]
    blocks = random_rows(name, len(combinations), elements, seed=2).reshape(-1, size)
    for block, halves in zip(blocks, combinations, strict=True):
        for offset, half in zip(SCALE_BYTES[name], halves, strict=False):
            block[offset : offset + 2] = np.array([half], np.uint16).view(np.uint8)
    raw = blocks.reshape(-1)
    assert_same_bits(quant.dequantize(name, raw, len(combinations) * elements), oracle(name, raw))


@pytest.mark.parametrize("name", ("F16", "BF16"))
def test_dequantize_matches_gguf_on_every_half(name: str):
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    assert_same_bits(quant.dequantize(name, raw, 65536), oracle(name, raw))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("scale", (1e-4, 1.0, 300.0))
def test_quantize_matches_gguf_byte_for_byte(name: str, scale: float):
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((64, 256)) * scale).astype(np.float32)
    values[0] = 0.0
    values[1] = -2.5
    values[2, ::2] = 0.0
    expected = gguf.quants.quantize(values, GGMLQuantizationType[name])
    got = quant.quantize(name, values)
    np.testing.assert_array_equal(got, np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize(
    ("name", "bound"),
    # Half a step, relative to the largest magnitude; a symmetric code clips the far end by one.
    [("Q4_0", 1 / 8), ("Q4_1", 1 / 15), ("Q5_0", 1 / 16), ("Q5_1", 1 / 31), ("Q8_0", 0.5 / 127)],
)
def test_quantize_then_dequantize_stays_within_a_step(name: str, bound: float):
    values = np.random.default_rng(4).uniform(-1, 1, 32 * 500).astype(np.float32)
    back = quant.dequantize(name, quant.quantize(name, values), values.size)
    largest = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
    error = np.abs(back - values).reshape(-1, 32) / largest
    assert error.max() <= bound * 1.01 + 1e-3


def test_quantize_survives_values_that_are_not_finite():
    values = np.zeros(32, np.float32)
    values[:3] = (np.nan, np.inf, -np.inf)
    for name in QUANTIZED:
        assert quant.quantize(name, values).size == 32 * FORMATS[name][1] // FORMATS[name][0]


@pytest.mark.parametrize("name", ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"))
def test_quantize_names_the_formats_it_can_write(name: str):
    with pytest.raises(UnsupportedError, match="supported: F32, F16, BF16, Q4_0"):
        quant.quantize(name, np.zeros(256, np.float32))


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"IQ2_S.*supported: F32, F16"):
        quant.dequantize("IQ2_S", np.zeros(2, np.uint8), 1)


def test_dequantize_rejects_wrong_sizes_and_dtypes():
    with pytest.raises(InvalidArgumentError, match="take 18 bytes, got 17"):
        quant.dequantize("Q4_0", np.zeros(17, np.uint8), 32)
    with pytest.raises(InvalidArgumentError, match="whole number of Q4_0 blocks"):
        quant.dequantize("Q4_0", np.zeros(18, np.uint8), 31)
    with pytest.raises(TypeError):
        quant.dequantize("Q4_0", np.zeros(18, np.int8), 32)


@pytest.mark.parametrize("n", (1, 15, 16, 17, 40))
@pytest.mark.parametrize("name", PACKED_AS)
def test_packed_rows_unpack_to_the_source_values(name: str, n: int):
    k = 512
    raw = random_rows(name, n, k, seed=n)
    packed = quant.pack(name, raw, n, k)
    assert (packed.format, packed.n, packed.k) == (PACKED_AS[name], n, k)
    for row in range(n):
        assert_same_bits(packed.unpack_row(row), oracle(name, raw[row]))


@pytest.mark.parametrize("k", (1, 2, 7, 33))
@pytest.mark.parametrize("name", ("F32", "F16", "BF16"))
def test_plain_formats_pack_any_width(name: str, k: int):
    raw = random_rows(name, 18, k, seed=k)
    packed = quant.pack(name, raw, 18, k)
    for row in range(18):
        assert_same_bits(packed.unpack_row(row), oracle(name, raw[row]))


@pytest.mark.parametrize("name", PACKED_AS)
def test_row_map_chooses_source_rows(name: str):
    raw = random_rows(name, 40, 256, seed=5)
    row_map = np.random.default_rng(6).integers(0, 40, 24)
    packed = quant.pack(name, raw, 24, 256, row_map)
    for row, source in enumerate(row_map):
        assert_same_bits(packed.unpack_row(row), oracle(name, raw[source]))


def test_packing_q2_k_names_the_remedy():
    with pytest.raises(UnsupportedError, match=r"Q2_K.*reference backend"):
        quant.pack("Q2_K", np.zeros((16, 84), np.uint8), 16, 256)


def test_pack_rejects_sizes_that_do_not_fit():
    rows = np.zeros((4, 18), np.uint8)
    with pytest.raises(InvalidArgumentError, match="holds 4 rows, expected 5"):
        quant.pack("Q4_0", rows, 5, 32)
    with pytest.raises(InvalidArgumentError, match="row_map has 2 entries"):
        quant.pack("Q4_0", rows, 4, 32, np.array([0, 1]))
    with pytest.raises(InvalidArgumentError, match="names row 4 of 4"):
        quant.pack("Q4_0", rows, 2, 32, np.array([0, 4]))
    with pytest.raises(InvalidArgumentError, match="names row -1"):
        quant.pack("Q4_0", rows, 2, 32, np.array([0, -1]))
    with pytest.raises(InvalidArgumentError, match="whole number"):
        quant.pack("Q4_K", rows, 4, 32)
    with pytest.raises(InvalidArgumentError, match="positive"):
        quant.pack("Q4_0", rows, 0, 32)
    with pytest.raises(InvalidArgumentError, match="row 4 of a matrix of 4"):
        quant.pack("Q4_0", rows, 4, 32).unpack_row(4)


def test_packed_view_is_read_only_and_keeps_its_matrix():
    data = quant.pack("Q4_0", np.zeros((4, 18), np.uint8), 4, 32).data
    assert data.shape == (288,)
    assert not data.flags.writeable
    assert data.sum() == 0


# The layout, byte by byte, written down a second time: one element at a time, as the description in
# kernels/params.h reads.
UNIT_BYTES = {
    "Q4_0": 288, "Q4_1": 320, "Q5_0": 352, "Q5_1": 384, "Q8_0": 544,
    "Q4_K": 2368, "Q5_K": 2880, "Q6_K": 3360,
}  # fmt: skip


def half(data: np.ndarray, at: int) -> np.float32:
    return np.float32(data[at : at + 2].view(np.float16)[0])


def nibble(unit: np.ndarray, r: int, k: int) -> int:
    low = k % 16
    return int(unit[(low // 4) * 64 + r * 4 + low % 4] >> (0 if k < 16 else 4)) & 15


def high_bit(planes: np.ndarray, r: int, k: int) -> int:
    return (int(planes[r * 4 + k % 4]) >> (k // 4)) & 1


def two_bits(planes: np.ndarray, r: int, k: int) -> int:
    j = k // 4
    return int(planes[(j & 1) * 64 + r * 4 + k % 4] >> (2 * (j >> 1))) & 3


def small_value(name: str, unit: np.ndarray, r: int, k: int) -> np.float32:
    if name == "Q8_0":
        q = int(unit[(k // 4) * 64 + r * 4 + k % 4])
        return half(unit, 512 + 2 * r) * np.float32(q - 128)
    q, scales = nibble(unit, r, k), 256
    if name.startswith("Q5"):
        q, scales = q + 16 * high_bit(unit[256:320], r, k), 320
    d = half(unit, scales + 2 * r)
    if name.endswith("_1"):
        return d * np.float32(q) + half(unit, scales + 32 + 2 * r)
    return d * np.float32(q - (16 if name == "Q5_0" else 8))


def super_value(name: str, block: np.ndarray, r: int, k: int) -> np.float32:
    width = {"Q4_K": 256, "Q5_K": 320, "Q6_K": 384}[name]
    unit = block[k // 32 * width :][:width]
    scales = block[8 * width :]
    q = nibble(unit, r, k % 32)
    if name == "Q6_K":
        q += 16 * two_bits(unit[256:], r, k % 32)
        sc = np.float32(scales[k // 16 * 16 + r].view(np.int8))
        return half(scales, 256 + 2 * r) * sc * np.float32(q - 32)
    if name == "Q5_K":
        q += 16 * high_bit(unit[256:320], r, k % 32)
    sc, mn = (np.float32(scales[at + k // 32 * 16 + r]) for at in (0, 128))
    return half(scales, 256 + 2 * r) * sc * np.float32(q) - half(scales, 288 + 2 * r) * mn


@pytest.mark.parametrize("name", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"))
def test_layout_of_units(name: str):
    raw = random_rows(name, 20, 64, seed=7)
    packed = quant.pack(name, raw, 20, 64)
    units = packed.data.reshape(2, 2, -1)  # row block, unit
    assert units.shape[-1] == UNIT_BYTES[packed.format]
    for row in range(20):
        got = [
            small_value(packed.format, units[row // 16, k // 32], row % 16, k % 32)
            for k in range(64)
        ]
        assert_same_bits(np.array(got, np.float32), oracle(name, raw[row]))


@pytest.mark.parametrize("name", ("Q3_K", "Q4_K", "Q5_K", "Q6_K"))
def test_layout_of_superblocks(name: str):
    raw = random_rows(name, 17, 512, seed=8)
    packed = quant.pack(name, raw, 17, 512)
    blocks = packed.data.reshape(2, 2, -1)
    assert blocks.shape[-1] == UNIT_BYTES[packed.format]
    for row in (0, 5, 15, 16):
        got = [
            super_value(packed.format, blocks[row // 16, k // 256], row % 16, k % 256)
            for k in range(512)
        ]
        assert_same_bits(np.array(got, np.float32), oracle(name, raw[row]))


@pytest.mark.parametrize("name", ("F32", "F16", "BF16"))
def test_layout_of_plain_formats(name: str):
    n, k = 18, 5
    raw = random_rows(name, n, k, seed=9)
    dtype = np.uint32 if name == "F32" else np.uint16
    stored = np.zeros((32, 6), dtype)
    stored[:n, :k] = raw.view(dtype)
    data = quant.pack(name, raw, n, k).data.view(dtype)
    for block in range(2):
        rows = stored[16 * block : 16 * block + 16]
        pairs = rows.reshape(16, 3, 2).transpose(1, 0, 2)
        expected = pairs if name == "BF16" else rows[:, :k].T
        np.testing.assert_array_equal(np.split(data, 2)[block], expected.reshape(-1))


@pytest.mark.parametrize("name", PACKED_AS)
def test_rows_beyond_the_matrix_are_zero(name: str):
    raw = random_rows(name, 17, 256, seed=10)
    packed = quant.pack(name, raw, 17, 256)
    alone = quant.pack(name, np.concatenate([raw, np.zeros((15, raw.shape[1]), np.uint8)]), 32, 256)
    np.testing.assert_array_equal(packed.data, alone.data)
    for row in range(17, 32):
        assert not alone.unpack_row(row).any()
