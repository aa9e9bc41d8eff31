"""Named tensors in one file: the face of every GGUF and safetensors reader, native or Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sagellm.errors import CorruptFileError

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F8_E4M3": (1, 1),
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
"""Supported formats: elements per block and bytes per block, along the last axis."""

MAX_DIMENSIONS = 4


class TensorInfo(Protocol):
    """What a reader says about one tensor."""

    @property
    def name(self) -> str:
        """Unique in its file."""

    @property
    def format(self) -> str:
        """A key of ``BLOCKS``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost axis first: ``(rows, columns)``."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""


class TensorFile(Protocol):
    """An open model file. Readers check every length and offset before any tensor is reachable."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Settings stored beside the tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name to facts."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, without a copy where possible."""

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor in its shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PyTensorInfo:
    """``TensorInfo`` of the pure-Python readers; ``offset`` is from the start of the file."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def tensor_nbytes(name: str, format: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of ``format`` (a key of ``BLOCKS``) and ``shape`` takes.

    Raises:
        CorruptFileError: The shape is impossible for the format.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise CorruptFileError(f"tensor {name}: {len(shape)} dimensions, at most {MAX_DIMENSIONS}")
    if any(size <= 0 for size in shape):
        raise CorruptFileError(f"tensor {name}: shape {shape} has an axis that is not positive")
    elements, block_bytes = BLOCKS[format]
    columns = shape[-1] if shape else 1
    if columns % elements:
        raise CorruptFileError(
            f"tensor {name}: rows of {columns} are not whole blocks of {elements} ({format})"
        )
    return math.prod(shape) // elements * block_bytes


def map_file(path: Path) -> NDArray[np.uint8]:
    """Maps a file into memory, read-only.

    Raises:
        CorruptFileError: The file is empty or cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise CorruptFileError(f"{path.name}: the file is empty; download it again")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise CorruptFileError(f"{path.name}: cannot be read: {error.strerror or error}") from error
