"""Block formats to float32 in NumPy, bitwise equal to the GGUF reference.

Block layouts, as bytes on disk (``h`` = IEEE half, little-endian):

========  =====  ==================================================================================
format    bytes  fields
========  =====  ==================================================================================
Q4_0      18     d h, 16 nibble bytes (low: elements 0..15, high: 16..31); d * (q - 8)
Q4_1      20     d h, m h, 16 nibble bytes; d * q + m
Q5_0      22     d h, 32 high bits, 16 nibble bytes; d * (q - 16)
Q5_1      24     d h, m h, 32 high bits, 16 nibble bytes; d * q + m
Q8_0      34     d h, 32 int8; d * q
IQ4_NL    18     d h, 16 nibble bytes; d * table[q]
Q2_K      84     16 bytes of 4-bit scale and minimum, 64 bytes of 2-bit codes, d h, dmin h
Q3_K      110    32 bytes of high bits, 64 bytes of 2-bit codes, 16 6-bit scales, d h
Q4_K      144    d h, dmin h, 8 6-bit scales and minima, 128 nibble bytes
Q5_K      176    d h, dmin h, 8 6-bit scales and minima, 32 bytes of high bits, 128 nibble bytes
Q6_K      210    128 nibble bytes, 64 bytes of 2-bit codes, 16 int8 scales, d h
========  =====  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.tensor_file import BLOCKS
from sagellm.errors import UnsupportedError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_LOW_2, _LOW_4 = np.uint8(0x03), np.uint8(0x0F)
_SHIFTS_1 = np.arange(8, dtype=np.uint8)[:, None]
_SHIFTS_2 = np.array([[0], [2], [4], [6]], np.uint8)  # four codes of 2 bits in a byte
_SHIFTS_4 = np.array([[0], [4]], np.uint8)  # two codes of 4 bits in a byte
_CHUNK_ELEMENTS = 1 << 20  # bounds the temporaries
_IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


def dequantize(format: str, raw: Bytes, shape: tuple[int, ...]) -> Floats:
    """Decodes a whole tensor.

    Args:
        format: A key of ``BLOCKS``.
        raw: The tensor's bytes, contiguous.
        shape: Its shape; the last axis holds whole blocks.

    Returns:
        A fresh float32 array of ``shape``.

    Raises:
        UnsupportedError: An unknown format.
    """
    if format not in BLOCKS:
        raise UnsupportedError(f"unknown tensor format {format!r}; supported: {', '.join(BLOCKS)}")
    if format == "F32":
        return raw.view("<f4").astype(np.float32).reshape(shape)
    if format == "F16":
        return raw.view("<f2").astype(np.float32).reshape(shape)
    if format == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if format == "F8_E4M3":
        return _E4M3_VALUES[raw].reshape(shape)
    elements, block_bytes = BLOCKS[format]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), elements), np.float32)
    step = _CHUNK_ELEMENTS // elements
    decode = _DECODERS[format]
    for start in range(0, len(blocks), step):
        out[start : start + step] = decode(np.asarray(blocks[start : start + step]))
    return out.reshape(shape)


def _e4m3_values() -> Floats:
    """The value of every FP8 code: sign, 4 exponent bits (bias 7), 3 fraction bits, no infinity."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    magnitude = np.where(
        exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0)
    )
    magnitude[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


_E4M3_VALUES = _e4m3_values()


def _half(blocks: Bytes, at: int) -> Floats:
    """The half at byte ``at`` of every block, [n, 1]."""
    halves: Floats = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)
    return halves


def _nibbles(packed: Bytes) -> Bytes:
    """[n, 16] bytes -> [n, 32]: low nibbles, then high nibbles."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _bits(packed: Bytes) -> Bytes:
    """[n, 4] bytes -> [n, 32] bits, lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8.0)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    q = _nibbles(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)
    return _half(b, 0) * (q.astype(np.float32) - 16.0)


def _q5_1(b: Bytes) -> Floats:
    q = _nibbles(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)
    return _half(b, 0) * q.astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(b: Bytes) -> Floats:
    return _half(b, 0) * _IQ4_NL_VALUES[_nibbles(b[:, 2:])]


def _q2_k(b: Bytes) -> Floats:
    n = len(b)
    scales = b[:, :16]
    d = _half(b, 80) * (scales & 0x0F).astype(np.float32)
    m = _half(b, 82) * (scales >> 4).astype(np.float32)
    q = _two_bit_codes(b[:, 16:80]).reshape(n, 16, 16).astype(np.float32)
    return (d[:, :, None] * q - m[:, :, None]).reshape(n, 256)


def _q3_k(b: Bytes) -> Floats:
    n = len(b)
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 0x0F, packed[:, :8] >> 4], axis=1)
    high = ((packed[:, None, 8:] >> _SHIFTS_2) & _LOW_2).reshape(n, 16)
    scales = (low | (high << 4)).astype(np.float32) - 32.0
    d = _half(b, 108) * scales
    # Bit j of mask byte l belongs to element 32 * j + l; a clear bit subtracts 4.
    kept = (b[:, None, :32] >> _SHIFTS_1) & 1
    q = (_two_bit_codes(b[:, 32:96]).reshape(n, 8, 32) | (kept << 2)).astype(np.float32) - 4.0
    values: Floats = d[:, :, None] * q.reshape(n, 16, 16)
    return values.reshape(n, 256)


def _q4_k(b: Bytes) -> Floats:
    d, m = _k_scales(b)
    q = _k_nibbles(b[:, 16:]).astype(np.float32)
    return (d[:, :, None] * q - m[:, :, None]).reshape(len(b), 256)


def _q5_k(b: Bytes) -> Floats:
    d, m = _k_scales(b)
    # Bit j of byte l is the fifth bit of element 32 * j + l.
    high = (b[:, None, 16:48] >> _SHIFTS_1) & 1
    q = (_k_nibbles(b[:, 48:]) | (high << 4)).astype(np.float32)
    return (d[:, :, None] * q - m[:, :, None]).reshape(len(b), 256)


def _q6_k(b: Bytes) -> Floats:
    n = len(b)
    low = ((b[:, :128].reshape(n, 2, 1, 64) >> _SHIFTS_4) & _LOW_4).reshape(n, 256)
    q = (low | (_two_bit_codes(b[:, 128:192]) << 4)).astype(np.float32) - 32.0
    d = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = d[:, :, None] * q.reshape(n, 16, 16)
    return values.reshape(n, 256)


def _two_bit_codes(packed: Bytes) -> Bytes:
    """[n, 64] -> [n, 256]: in each 32-byte half, bits 2j..2j+1 of byte l are element 32 * j + l."""
    codes: Bytes = (packed.reshape(-1, 2, 1, 32) >> _SHIFTS_2) & _LOW_2
    return codes.reshape(-1, 256)


def _k_nibbles(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: each 32 bytes hold 32 low nibbles, then 32 high nibbles."""
    codes: Bytes = (packed.reshape(-1, 4, 1, 32) >> _SHIFTS_4) & _LOW_4
    return codes.reshape(-1, 8, 32)


def _k_scales(b: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima [n, 8] of Q4_K and Q5_K: 6 bits each, packed in bytes 4..15."""
    s = b[:, 4:16]
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([mid & 0x3F, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    return _half(b, 0) * scales.astype(np.float32), _half(b, 2) * minima.astype(np.float32)


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
