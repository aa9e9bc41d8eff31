"""
Storage formats of weights and the packed layout of the kernels.
"""
from __future__ import annotations
import numpy
import numpy.typing
import typing
__all__: list[str] = ['FORMATS', 'PackedMatrix', 'dequantize', 'pack', 'quantize']
class PackedMatrix:
    """
    A weight matrix in the layout of the kernels.
    """
    def unpack_row(self, row: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
        """
        Float32 values of a row, bitwise those of the source.
        """
    @property
    def data(self) -> numpy.ndarray:
        """
        The packed bytes: a read-only uint8 view.
        """
    @property
    def format(self) -> str:
        ...
    @property
    def k(self) -> int:
        """
        Columns (inputs).
        """
    @property
    def n(self) -> int:
        """
        Rows (outputs).
        """
    @property
    def nbytes(self) -> int:
        ...
    @property
    def row_block_stride(self) -> int:
        """
        Bytes of 16 rows.
        """
def dequantize(format: str, raw: numpy.typing.NDArray[numpy.uint8], n: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
    """
    Float32 values of n stored elements; raw is uint8 of exactly their bytes.
    """
def pack(format: str, raw: numpy.typing.NDArray[numpy.uint8], n: typing.SupportsInt | typing.SupportsIndex, k: typing.SupportsInt | typing.SupportsIndex, row_map: numpy.typing.NDArray[numpy.int64] | None = None, scales: numpy.typing.NDArray[numpy.float32] | None = None) -> PackedMatrix:
    """
    Packs rows of `format` ([rows, row bytes], uint8); packed row i is source row row_map[i] (int64), or i. `scales` of F8_E4M3: float32, one, one per source row, or one per 128 x 128 block; 1 where there are none.
    """
def quantize(format: str, values: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.uint8]:
    """
    Bytes (uint8) of float32 values; the last axis becomes bytes. F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
    """
FORMATS: tuple = ('F32', 'F16', 'BF16', 'F8_E4M3', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q8_0', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_NL')
