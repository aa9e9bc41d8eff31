"""The pure-Python readers against the gguf and safetensors packages, and against damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.make_tiny import make_tiny_gguf, make_tiny_hf
from sagellm.checkpoint.dequantize import dequantize
from sagellm.checkpoint.gguf_file import PyGgufFile
from sagellm.checkpoint.safetensors_file import PySafetensorsFile
from sagellm.checkpoint.tensor_file import BLOCKS
from sagellm.errors import CorruptFileError, SagellmError, UnsupportedError

GGUF_FORMATS = tuple(name for name in BLOCKS if name != "F8_E4M3")


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_dequantize_is_bitwise_the_gguf_package(format: str) -> None:
    elements, block_bytes = BLOCKS[format]
    rng = np.random.default_rng(len(format) + block_bytes)
    if elements == 1:
        values = rng.standard_normal((6, 512)).astype(np.float32)
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[format]).view(np.uint8)
    else:  # every bit pattern of codes and scales; halves kept finite
        raw = rng.integers(0, 256, (6, 512 // elements, block_bytes), dtype=np.uint8)
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(format, (0, 2)):
            raw[:, :, at + 1] &= 0x3B
    raw = raw.reshape(6, -1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format])
    got = dequantize(format, raw.reshape(-1), (6, 512))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(
        got.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


def test_dequantize_in_several_chunks_is_the_same() -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, 1 << 19)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(dequantize("Q4_1", raw.reshape(-1), values.shape), expected)


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_gguf_file_reads_what_the_gguf_package_reads(format: str, tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf", "gemma2", format)
    file, oracle = PyGgufFile(path), gguf.GGUFReader(path)
    assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        found = file.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert found.format == tensor.tensor_type.name and found.nbytes == tensor.n_bytes
        assert file.raw(tensor.name).tobytes() == tensor.data.tobytes()
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.dequantize(tensor.name), expected.reshape(found.shape))
    for key, field in oracle.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_safetensors_file_reads_what_the_safetensors_package_reads(
    dtype: str, tmp_path: Path
) -> None:
    path = make_tiny_hf(tmp_path / "tiny", "qwen2", dtype=dtype) / "model.safetensors"
    file = PySafetensorsFile(path)
    reference = make_tiny_hf(tmp_path / "f32", "qwen2") / "model.safetensors"
    tolerance = {"F32": 0.0, "F16": 2e-3, "BF16": 8e-3}[dtype]
    oracle = load_file(path if dtype != "BF16" else reference)
    assert file.tensors.keys() == oracle.keys()
    for name, values in oracle.items():
        assert file.tensors[name].format == dtype and file.tensors[name].shape == values.shape
        np.testing.assert_allclose(file.dequantize(name), values.astype(np.float32), atol=tolerance)


# ------------------------------------------------------------------------------------------ damage


def touch_everything(file: PyGgufFile | PySafetensorsFile) -> None:
    for name in file.tensors:
        file.raw(name)


def test_a_gguf_cut_anywhere_is_a_clear_error(tmp_path: Path) -> None:
    content = make_tiny_gguf(tmp_path / "tiny.gguf", num_layers=1).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 1, 4, 8, 23, 24, *range(25, len(content) - 1, 1009), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(CorruptFileError, match=r"cut\.gguf"):
            PyGgufFile(cut)


def test_a_safetensors_cut_anywhere_is_a_clear_error(tmp_path: Path) -> None:
    content = (make_tiny_hf(tmp_path / "tiny", num_layers=1) / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in [0, 1, 7, 8, 9, *range(25, len(content) - 1, 4001), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(CorruptFileError, match=r"cut\.safetensors"):
            PySafetensorsFile(cut)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_random_damage_to_a_header_never_escapes_the_error_tree(kind: str, tmp_path: Path) -> None:
    if kind == "gguf":
        content = make_tiny_gguf(tmp_path / "tiny.gguf", num_layers=1).read_bytes()
        header, reader = 9000, PyGgufFile
    else:
        content = (make_tiny_hf(tmp_path / "tiny", num_layers=1) / "model.safetensors").read_bytes()
        header, reader = 1500, PySafetensorsFile
    rng = np.random.default_rng(11)
    refused = 0
    for _ in range(400):
        damaged = np.frombuffer(content, np.uint8).copy()
        at = rng.integers(0, header, 4)
        damaged[at] = rng.choice([0, 1, 2, 8, 9, 127, 128, 255], 4)
        path = tmp_path / f"damaged.{kind}"
        path.write_bytes(damaged.tobytes())
        try:
            touch_everything(reader(path))
        except SagellmError:
            refused += 1
    assert refused > 50


def gguf_bytes(
    *, version: int = 3, tensors: int = 0, keys: int = 0, body: bytes = b"", magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, axes: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


HOSTILE_GGUF: dict[str, tuple[bytes, type[SagellmError], str]] = {
    "magic": (gguf_bytes(magic=b"GGML"), CorruptFileError, "not a GGUF file"),
    "old version": (gguf_bytes(version=1), UnsupportedError, "versions 2 and 3"),
    "big-endian": (gguf_bytes(version=3 << 24), UnsupportedError, "big-endian"),
    "many tensors": (gguf_bytes(tensors=1 << 62), CorruptFileError, "tensors"),
    "many keys": (gguf_bytes(keys=1 << 62), CorruptFileError, "keys"),
    "long key": (gguf_bytes(keys=1, body=struct.pack("<Q", 1 << 63)), CorruptFileError, "name of"),
    "long string": (
        gguf_bytes(keys=1, body=text("a") + struct.pack("<IQ", 8, (1 << 64) - 1)),
        CorruptFileError,
        "truncated",
    ),
    "long array": (
        gguf_bytes(keys=1, body=text("a") + struct.pack("<IIQ", 9, 6, 1 << 62)),
        CorruptFileError,
        "truncated",
    ),
    "many strings": (
        gguf_bytes(keys=1, body=text("a") + struct.pack("<IIQ", 9, 8, 1 << 40)),
        CorruptFileError,
        "strings past",
    ),
    "nested array": (
        gguf_bytes(keys=1, body=text("a") + struct.pack("<IIQ", 9, 9, 1)),
        UnsupportedError,
        "array of arrays",
    ),
    "unknown value type": (
        gguf_bytes(keys=1, body=text("a") + struct.pack("<I", 77)),
        CorruptFileError,
        "value type 77",
    ),
    "key twice": (
        gguf_bytes(keys=2, body=(text("a") + struct.pack("<IB", 0, 1)) * 2),
        CorruptFileError,
        "twice",
    ),
    "not UTF-8": (
        gguf_bytes(keys=1, body=struct.pack("<Q", 2) + b"\xff\xfe"),
        CorruptFileError,
        "UTF-8",
    ),
    "unknown format": (
        gguf_bytes(tensors=1, body=tensor("t", [32], 99, 0) + bytes(64)),
        UnsupportedError,
        "unknown GGUF type 99; supported: F32",
    ),
    "zero axis": (
        gguf_bytes(tensors=1, body=tensor("t", [0], 0, 0) + bytes(64)),
        CorruptFileError,
        "impossible axes",
    ),
    "overflowing axes": (
        gguf_bytes(tensors=1, body=tensor("t", [1 << 40, 1 << 40], 0, 0) + bytes(64)),
        CorruptFileError,
        "truncated",
    ),
    "five axes": (
        gguf_bytes(tensors=1, body=tensor("t", [1] * 5, 0, 0) + bytes(64)),
        CorruptFileError,
        "5 dimensions",
    ),
    "part of a block": (
        gguf_bytes(tensors=1, body=tensor("t", [33], 2, 0) + bytes(64)),
        CorruptFileError,
        "whole blocks",
    ),
    "misaligned": (
        gguf_bytes(tensors=1, body=tensor("t", [4], 0, 5) + bytes(96)),
        CorruptFileError,
        "not aligned",
    ),
    "past the end": (
        gguf_bytes(tensors=1, body=tensor("t", [4], 0, 1 << 40) + bytes(96)),
        CorruptFileError,
        "ends at byte",
    ),
    "tensor twice": (
        gguf_bytes(tensors=2, body=tensor("t", [4], 0, 0) * 2 + bytes(96)),
        CorruptFileError,
        "twice",
    ),
    "bad alignment": (
        gguf_bytes(keys=1, body=text("general.alignment") + struct.pack("<II", 4, 48) + bytes(64)),
        CorruptFileError,
        "power of two",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_a_hostile_gguf_is_refused(name: str, tmp_path: Path) -> None:
    content, error, message = HOSTILE_GGUF[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        PyGgufFile(path)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE_SAFETENSORS: dict[str, tuple[bytes, type[SagellmError], str]] = {
    "huge header": ((1 << 60).to_bytes(8, "little") + b"{}", CorruptFileError, "truncated"),
    "not JSON": (safetensors_bytes(b"{nope"), CorruptFileError, "not valid JSON"),
    "deep JSON": (safetensors_bytes(b"[" * 200_000), CorruptFileError, "not valid JSON"),
    "not an object": (safetensors_bytes([1]), CorruptFileError, "not a JSON object"),
    "key twice": (
        safetensors_bytes(b'{"a": {}, "a": {}}'),
        CorruptFileError,
        "twice",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), CorruptFileError, "__metadata__"),
    "dtype": (
        safetensors_bytes({"t": entry([1], 0, 8, "I64")}, bytes(8)),
        UnsupportedError,
        "supported: F32, F16, BF16",
    ),
    "negative": (
        safetensors_bytes({"t": entry([-1], 0, 4)}, bytes(4)),
        CorruptFileError,
        "malformed",
    ),
    "float size": (
        safetensors_bytes({"t": entry([1.5], 0, 4)}, bytes(4)),
        CorruptFileError,
        "malformed",
    ),
    "bool size": (
        safetensors_bytes({"t": entry([True], 0, 4)}, bytes(4)),
        CorruptFileError,
        "malformed",
    ),
    "wrong extent": (
        safetensors_bytes({"t": entry([2], 0, 4)}, bytes(4)),
        CorruptFileError,
        "needs 8",
    ),
    "past the end": (
        safetensors_bytes({"t": entry([2], 0, 8)}, bytes(4)),
        CorruptFileError,
        "extent",
    ),
    "hole": (safetensors_bytes({"t": entry([1], 4, 8)}, bytes(8)), CorruptFileError, "expected"),
    "overlap": (
        safetensors_bytes({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8)),
        CorruptFileError,
        "expected",
    ),
    "unused bytes": (
        safetensors_bytes({"t": entry([1], 0, 4)}, bytes(8)),
        CorruptFileError,
        "end at byte",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_a_hostile_safetensors_is_refused(name: str, tmp_path: Path) -> None:
    content, error, message = HOSTILE_SAFETENSORS[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        PySafetensorsFile(path)
