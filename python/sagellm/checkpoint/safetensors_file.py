"""A safetensors reader in Python, for installs without the native one, whose face it has.

The file is untrusted: the header is bounded and parsed as plain JSON, and every extent is checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from sagellm.checkpoint.dequantize import dequantize
from sagellm.checkpoint.tensor_file import PyTensorInfo, map_file, tensor_nbytes
from sagellm.errors import CorruptFileError, UnsupportedError

_MAX_HEADER = 100_000_000  # bytes, the limit of the format
_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")


class PySafetensorsFile:
    """An open safetensors file.

    Attributes:
        metadata: The free-form ``__metadata__`` strings.
        tensors: Name to facts, in order of their place in the file.
    """

    def __init__(self, path: str | Path) -> None:
        """Maps and checks the file.

        Raises:
            CorruptFileError: Truncated, inconsistent or hostile content.
            UnsupportedError: A tensor type other than F32, F16, BF16 and F8_E4M3.
        """
        self.path = Path(path)
        self._buffer = map_file(self.path)
        header, start = self._read_header()
        self.metadata: dict[str, str] = self._check_metadata(header.pop("__metadata__", {}))
        entries = [self._read_tensor(name, entry, start) for name, entry in header.items()]
        entries.sort(key=lambda tensor: tensor.offset)
        end = start
        for tensor in entries:
            if tensor.offset != end:
                raise CorruptFileError(
                    f"{self.path.name}: tensor {tensor.name} starts at byte {tensor.offset}, "
                    f"expected {end}"
                )
            end += tensor.nbytes
        if end != len(self._buffer):
            raise CorruptFileError(
                f"{self.path.name}: tensors end at byte {end} of {len(self._buffer)}; download "
                "the file again"
            )
        self.tensors: dict[str, PyTensorInfo] = {tensor.name: tensor for tensor in entries}

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

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = len(self._buffer)
        length = int.from_bytes(self._buffer[:8].tobytes(), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CorruptFileError(
                f"{self.path.name}: not a safetensors file, or truncated (header of {length} "
                f"bytes in {size})"
            )
        try:
            header = json.loads(
                self._buffer[8 : 8 + length].tobytes(), object_pairs_hook=self._unique
            )
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(
                f"{self.path.name}: the header is not valid JSON: {error}"
            ) from error
        if not isinstance(header, dict):
            raise CorruptFileError(f"{self.path.name}: the header is not a JSON object")
        return header, 8 + length

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise CorruptFileError(f"{self.path.name}: a key appears twice in the header")
        return result

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise CorruptFileError(f"{self.path.name}: __metadata__ is not a map of strings")
        return metadata

    def _read_tensor(self, name: str, entry: Any, start: int) -> PyTensorInfo:
        if not isinstance(entry, dict):
            raise CorruptFileError(f"{self.path.name}: tensor {name} has no description")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if dtype not in _DTYPES:
            raise UnsupportedError(
                f"{self.path.name}: tensor {name} has dtype {dtype!r}; supported: "
                f"{', '.join(_DTYPES)}"
            )
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise CorruptFileError(
                f"{self.path.name}: tensor {name} has a malformed shape or data_offsets"
            )
        begin, end = offsets
        nbytes = tensor_nbytes(name, dtype, tuple(shape))
        if end - begin != nbytes or start + end > len(self._buffer):
            raise CorruptFileError(
                f"{self.path.name}: tensor {name} of shape {tuple(shape)} {dtype} needs {nbytes} "
                "bytes, "
                f"its extent is {begin}..{end} of {len(self._buffer) - start}"
            )
        return PyTensorInfo(
            name=name, format=dtype, shape=tuple(shape), nbytes=nbytes, offset=start + begin
        )


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
