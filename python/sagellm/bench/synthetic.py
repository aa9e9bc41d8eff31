"""Random weights in stored formats, and model files of a real model's shape made of them.

For timing only: the numbers are finite and of a plausible size, and mean nothing. Files load as any
GGUF file does, here and in other programs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.tensor_file import BLOCKS
from sagellm.errors import InvalidArgumentError

# Byte offset of a block's scale, the largest code it multiplies, and offset of its minimum.
_SCALES: dict[str, tuple[int, float, int | None]] = {
    "Q4_0": (0, 8, None),
    "Q4_1": (0, 15, 2),
    "Q5_0": (0, 16, None),
    "Q5_1": (0, 31, 2),
    "Q8_0": (0, 128, None),
    "Q4_K": (0, 63 * 15, 2),
    "Q5_K": (0, 63 * 31, 2),
    "Q6_K": (208, 128 * 32, None),
}


def random_matrix(
    format: str, rows: int, columns: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Stored bytes ``[rows, row bytes]`` of weights of about ``1 / sqrt(columns)``.

    Raises:
        InvalidArgumentError: A format that cannot be made, or rows that are not whole blocks.
    """
    if format in ("F32", "F16", "BF16"):
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        values /= np.float32(math.sqrt(columns))
        if format == "F16":
            return values.astype(np.float16).view(np.uint8)
        if format == "F32":
            return values.view(np.uint8)
        return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
    if format not in _SCALES:
        raise InvalidArgumentError(
            f"no random weights in format {format!r}; choose from "
            + ", ".join((*_SCALES, "BF16", "F16", "F32"))
        )
    elements, block_bytes = BLOCKS[format]
    if columns % elements:
        raise InvalidArgumentError(
            f"{columns} columns are not a whole number of {format} blocks; choose a multiple of "
            f"{elements}"
        )
    at, largest, min_at = _SCALES[format]
    blocks = rng.integers(0, 256, (rows * columns // elements, block_bytes), dtype=np.uint8)
    scale = np.float16(2 / math.sqrt(columns) / largest)
    blocks[:, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    if min_at is not None:
        # _1 formats add their minimum, K formats subtract it times a 6-bit scale.
        minimum = -largest * float(scale) / 2 if format.endswith("_1") else float(scale) * 7
        blocks[:, min_at : min_at + 2] = np.frombuffer(np.float16(minimum).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder of the GGUF architecture ``qwen2`` and the formats of its tensors.

    Attributes:
        formats: GGUF name of a tensor without its layer, to the format in layer ``i`` of ``n``.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float
    formats: dict[str, Callable[[int, int], str]]


def _always(format: str) -> Callable[[int, int], str]:
    return lambda layer, count: format


def _more_bits(high: str, low: str) -> Callable[[int, int], str]:
    """``high`` in the first and last eighth of the layers and in every third between, as *_K_M."""

    def choose(layer: int, count: int) -> str:
        eighth = count // 8
        outside = layer < eighth or layer >= 7 * count // 8
        return high if outside or (layer - eighth) % 3 == 2 else low

    return choose


SHAPES = {
    # Q4_K_M of a model whose rows are no multiple of 256: mostly Q5_0.
    "qwen2.5-0.5b": ModelShape(
        name="Qwen2.5-0.5B",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        max_position=32768,
        rope_theta=1e6,
        formats={
            "token_embd": _always("Q5_0"),
            "output": _always("Q8_0"),
            "attn_q": _always("Q5_0"),
            "attn_k": _always("Q5_0"),
            "attn_v": _more_bits("Q8_0", "Q5_0"),
            "attn_output": _always("Q5_0"),
            "ffn_gate": _always("Q5_0"),
            "ffn_up": _always("Q5_0"),
            "ffn_down": _more_bits("Q6_K", "Q4_K"),
        },
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    name: str
    format: str
    shape: tuple[int, ...]  # rows, columns

    @property
    def nbytes(self) -> int:
        elements, size = BLOCKS[self.format]
        return math.prod(self.shape) // elements * size


def _tensors(shape: ModelShape) -> Iterator[_Tensor]:
    def matrix(prefix: str, kind: str, rows: int, columns: int, layer: int = 0) -> _Tensor:
        format = shape.formats[kind](layer, shape.num_layers)
        return _Tensor(name=f"{prefix}{kind}.weight", format=format, shape=(rows, columns))

    def vector(name: str, size: int) -> _Tensor:
        return _Tensor(name=name, format="F32", shape=(size,))

    hidden, width = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield matrix("", "token_embd", shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"blk.{layer}."
        yield vector(f"{prefix}attn_norm.weight", hidden)
        for kind, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
            yield matrix(prefix, kind, rows, hidden, layer)
            yield vector(f"{prefix}{kind}.bias", rows)
        yield matrix(prefix, "attn_output", hidden, queries, layer)
        yield vector(f"{prefix}ffn_norm.weight", hidden)
        yield matrix(prefix, "ffn_gate", width, hidden, layer)
        yield matrix(prefix, "ffn_up", width, hidden, layer)
        yield matrix(prefix, "ffn_down", hidden, width, layer)
    yield vector("output_norm.weight", hidden)
    yield matrix("", "output", shape.vocab_size, hidden)


def _settings(shape: ModelShape) -> dict[str, Any]:
    # Every byte is a token; the others can be generated, and print as themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    tokens = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    tokens += ["th", *(f"token{i}" for i in range(257, shape.vocab_size - 1)), "<|endoftext|>"]
    return {
        "general.architecture": "qwen2",
        "general.name": f"{shape.name}, random weights",
        "qwen2.context_length": shape.max_position,
        "qwen2.embedding_length": shape.hidden_size,
        "qwen2.block_count": shape.num_layers,
        "qwen2.feed_forward_length": shape.intermediate_size,
        "qwen2.attention.head_count": shape.num_heads,
        "qwen2.attention.head_count_kv": shape.num_kv_heads,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen2.rope.freq_base": shape.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (shape.vocab_size - 1) + [3],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": shape.vocab_size - 1,
    }


_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_TYPE_NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "BF16": 30,
}


def write_model(path: Path, shape: ModelShape, seed: int = 0) -> int:
    """Writes a GGUF file of ``shape`` with random weights; returns its size in bytes."""
    tensors = list(_tensors(shape))
    settings = _settings(shape)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)))
        for key, value in settings.items():
            file.write(_text(key) + _value(value))
        offset = 0
        for tensor in tensors:
            sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            kind = _TYPE_NUMBERS[tensor.format]
            file.write(_text(tensor.name) + sizes + struct.pack("<IQ", kind, offset))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        _align(file)
        for tensor in tensors:
            _write_tensor(file, tensor, rng)
            _align(file)
        return file.tell()


def _write_tensor(file: BinaryIO, tensor: _Tensor, rng: np.random.Generator) -> None:
    if len(tensor.shape) == 1:
        norm = tensor.name.endswith("norm.weight")
        values = rng.standard_normal(tensor.shape[0], dtype=np.float32) * np.float32(0.05)
        file.write((values + np.float32(norm)).tobytes())
        return
    rows, columns = tensor.shape
    for first in range(0, rows, 8192):  # a part at a time: the memory is for the model
        part = min(8192, rows - first)
        file.write(random_matrix(tensor.format, part, columns, rng).tobytes())


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value[0], str):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(map(_text, value))
    return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + np.asarray(value, "<i4").tobytes()


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
