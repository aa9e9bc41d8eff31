"""
Checkpoint files, memory-mapped and fully checked on opening.
"""
from __future__ import annotations
import numpy
import numpy.typing
import typing
__all__: list[str] = ['File', 'GgufFile', 'SafetensorsFile', 'StringArray', 'TensorInfo']
class TensorInfo:
    """
    A tensor inside a checkpoint file.
    """
    def __repr__(self) -> str:
        ...
    @property
    def format(self) -> str:
        """
        Storage format, "Q4_1"; a name that is not in _core.quant.FORMATS cannot be read.
        """
    @property
    def name(self) -> str:
        ...
    @property
    def nbytes(self) -> int:
        ...
    @property
    def shape(self) -> tuple:
        """
        Extents, outermost first.
        """
class File:
    """
    An open checkpoint file.
    """
    def dequantize(self, name: str) -> numpy.typing.NDArray[numpy.float32]:
        """
        Tensor as float32, in its shape.
        """
    def raw(self, name: str) -> numpy.ndarray:
        """
        Stored bytes of a tensor: a read-only uint8 view into the mapped file.
        """
    @property
    def name(self) -> str:
        """
        File name without folders.
        """
    @property
    def tensors(self) -> typing.Any:
        """
        dict[str, TensorInfo]; converted once.
        """
class StringArray:
    """
    Strings in a file: a sequence that makes each str when asked for it.
    """
    def __getitem__(self, index: typing.SupportsInt | typing.SupportsIndex) -> str:
        ...
    def __len__(self) -> int:
        ...
    def tolist(self) -> typing.Any:
        ...
class GgufFile(File):
    """
    A GGUF file, version 2 or 3.
    """
    def __init__(self, path: str) -> None:
        ...
    @property
    def metadata(self) -> typing.Any:
        """
        dict[str, Any]; arrays are read-only numpy arrays or StringArray; converted once.
        """
class SafetensorsFile(File):
    """
    A safetensors file.
    """
    def __init__(self, path: str) -> None:
        ...
    @property
    def metadata(self) -> dict[str, str]:
        """
        dict[str, str]
        """
