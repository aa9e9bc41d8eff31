"""A GGUF reader in Python, for installs without the native one, whose face it has.

The file is untrusted: every count, length and offset is checked against the file's size before use.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.dequantize import dequantize
from sagellm.checkpoint.tensor_file import (
    BLOCKS,
    MAX_DIMENSIONS,
    PyTensorInfo,
    map_file,
    tensor_nbytes,
)
from sagellm.errors import CorruptFileError, UnsupportedError

_MAGIC = 0x46554747  # "GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_NAME = 1 << 16
_MAX_AXIS = 1 << 40

# GGUF metadata value types
_SCALARS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|u1",  # bool
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# GGUF tensor types
_FORMATS: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    30: "BF16",
}


class _Cursor:
    """Bounded little-endian reads over a mapped file."""

    def __init__(self, buffer: NDArray[np.uint8], name: str) -> None:
        self._bytes = buffer.data
        self._name = name
        self.position = 0

    @property
    def remaining(self) -> int:
        return len(self._bytes) - self.position

    def take(self, count: int) -> memoryview:
        if count > self.remaining:
            raise CorruptFileError(
                f"{self._name}: truncated: {count} bytes wanted at byte {self.position}, "
                f"{self.remaining} left; download the file again"
            )
        start = self.position
        self.position += count
        return self._bytes[start : self.position]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self, limit: int | None = None) -> str:
        length = self.u64()
        if limit is not None and length > limit:
            raise CorruptFileError(f"{self._name}: a name of {length} bytes, at most {limit}")
        return bytes(self.take(length)).decode("utf-8")


class PyGgufFile:
    """An open GGUF file (versions 2 and 3, little-endian).

    Attributes:
        metadata: Key to int, float, bool, str, numpy array (numbers) or list of str.
        tensors: Name to facts, in file order.
    """

    def __init__(self, path: str | Path) -> None:
        """Maps and checks the file.

        Raises:
            CorruptFileError: Truncated, inconsistent or hostile content.
            UnsupportedError: A version, byte order or tensor format that is not read.
        """
        self.path = Path(path)
        self._buffer = map_file(self.path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, PyTensorInfo] = {}
        cursor = _Cursor(self._buffer, self.path.name)
        try:
            num_tensors, num_keys = self._read_header(cursor)
            for _ in range(num_keys):
                self._read_key(cursor)
            self._read_tensors(cursor, num_tensors)
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{self.path.name}: a string is not valid UTF-8") from error

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, a view of the mapped file."""
        tensor = self._tensor(name)
        return self._buffer[tensor.offset : tensor.offset + tensor.nbytes]

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor in its shape."""
        tensor = self._tensor(name)
        return dequantize(tensor.format, self.raw(name), tensor.shape)

    def _tensor(self, name: str) -> PyTensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CorruptFileError(f"{self.path.name}: no tensor {name}") from None

    def _read_header(self, cursor: _Cursor) -> tuple[int, int]:
        if cursor.u32() != _MAGIC:
            raise CorruptFileError(f"{self.path.name}: not a GGUF file (wrong magic)")
        version = cursor.u32()
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            reason = "big-endian files" if swapped in _VERSIONS else f"version {version}"
            raise UnsupportedError(
                f"{self.path.name}: GGUF {reason} cannot be read; supported: little-endian, "
                "versions 2 and 3"
            )
        num_tensors, num_keys = cursor.u64(), cursor.u64()
        if num_tensors > _MAX_TENSORS or num_keys > _MAX_KEYS:
            raise CorruptFileError(
                f"{self.path.name}: {num_tensors} tensors and {num_keys} keys; "
                f"at most {_MAX_TENSORS} and {_MAX_KEYS}"
            )
        return num_tensors, num_keys

    def _read_key(self, cursor: _Cursor) -> None:
        key = cursor.string(_MAX_NAME)
        if key in self.metadata:
            raise CorruptFileError(f"{self.path.name}: metadata key {key} appears twice")
        self.metadata[key] = self._read_value(cursor, key, cursor.u32())

    def _read_value(self, cursor: _Cursor, key: str, kind: int) -> Any:
        if kind == _STRING:
            return cursor.string()
        if kind == _ARRAY:
            return self._read_array(cursor, key)
        dtype = self._scalar_dtype(key, kind)
        value = np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
        return bool(value) if kind == _BOOL else value

    def _read_array(self, cursor: _Cursor, key: str) -> Any:
        kind, count = cursor.u32(), cursor.u64()
        if kind == _STRING:
            if count > cursor.remaining // 8:  # every string has an 8-byte length
                raise CorruptFileError(
                    f"{self.path.name}: {key} claims {count} strings past the file's end"
                )
            return [cursor.string() for _ in range(count)]
        if kind == _ARRAY:
            raise UnsupportedError(
                f"{self.path.name}: {key} is an array of arrays, which no supported model uses"
            )
        dtype = self._scalar_dtype(key, kind)
        values = np.frombuffer(cursor.take(count * dtype.itemsize), dtype)
        return values.astype(bool) if kind == _BOOL else values

    def _scalar_dtype(self, key: str, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise CorruptFileError(f"{self.path.name}: {key} has the unknown value type {kind}")
        return np.dtype(_SCALARS[kind])

    def _read_tensors(self, cursor: _Cursor, count: int) -> None:
        entries = [self._read_tensor(cursor) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise CorruptFileError(
                f"{self.path.name}: general.alignment {alignment} is not a power of two"
            )
        start = -(-cursor.position // alignment) * alignment
        for name, format, shape, offset in entries:
            nbytes = tensor_nbytes(name, format, shape)
            if offset % alignment:
                raise CorruptFileError(
                    f"{self.path.name}: tensor {name} is not aligned to {alignment} bytes"
                )
            if start + offset + nbytes > len(self._buffer):
                raise CorruptFileError(
                    f"{self.path.name}: tensor {name} ends at byte {start + offset + nbytes} of "
                    f"{len(self._buffer)}; the file is truncated, download it again"
                )
            if name in self.tensors:
                raise CorruptFileError(f"{self.path.name}: tensor {name} appears twice")
            self.tensors[name] = PyTensorInfo(
                name=name, format=format, shape=shape, nbytes=nbytes, offset=start + offset
            )

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
        name = cursor.string(_MAX_NAME)
        num_axes = cursor.u32()
        if not 1 <= num_axes <= MAX_DIMENSIONS:
            raise CorruptFileError(f"{self.path.name}: tensor {name} has {num_axes} dimensions")
        axes = [cursor.u64() for _ in range(num_axes)]  # innermost first
        if any(not 0 < size <= _MAX_AXIS for size in axes):
            raise CorruptFileError(
                f"{self.path.name}: tensor {name} has the impossible axes {axes}"
            )
        kind, offset = cursor.u32(), cursor.u64()
        if kind not in _FORMATS:
            raise UnsupportedError(
                f"{self.path.name}: tensor {name} has the unknown GGUF type {kind}; supported: "
                f"{', '.join(BLOCKS)}"
            )
        return name, _FORMATS[kind], tuple(reversed(axes)), offset
