"""
Whole-tensor operations on the CPU; C-contiguous arrays, results are new arrays.
"""
from __future__ import annotations
import numpy
import numpy.typing
import sagellm._core.kv
import sagellm._core.quant
import typing
__all__: list[str] = ['gelu_tanh_mul', 'kv_write', 'linear', 'paged_attention', 'rms_norm', 'rope', 'silu_mul']
def gelu_tanh_mul(gate: numpy.typing.NDArray[numpy.float32], up: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    """
    gelu(gate) * up with the tanh approximation, both [rows, n].
    """
def kv_write(storage: sagellm._core.kv.KvStorage, slot: typing.SupportsInt | typing.SupportsIndex, k: numpy.typing.NDArray[numpy.float32], v: numpy.typing.NDArray[numpy.float32], block_tables: numpy.typing.NDArray[numpy.int32], query_starts: numpy.typing.NDArray[numpy.int32], positions: numpy.typing.NDArray[numpy.int32]) -> None:
    """
    Stores k, v [tokens, kv_heads, head_dim]. Sequence s owns rows query_starts[s] .. query_starts[s + 1] at
    consecutive positions; block_tables is [sequences, max_blocks]; indices are int32.
    """
def linear(packed: sagellm._core.quant.PackedMatrix, x: numpy.typing.NDArray[numpy.float32], precision: str = 'a8') -> numpy.typing.NDArray[numpy.float32]:
    """
    x [tokens, k] times the packed matrix: float32 [tokens, n]. Quantized formats see x as `precision`, "a8" or "a15".
    """
def paged_attention(storage: sagellm._core.kv.KvStorage, slot: typing.SupportsInt | typing.SupportsIndex, q: numpy.typing.NDArray[numpy.float32], block_tables: numpy.typing.NDArray[numpy.int32], query_starts: numpy.typing.NDArray[numpy.int32], positions: numpy.typing.NDArray[numpy.int32], scale: typing.SupportsFloat | typing.SupportsIndex, window: typing.SupportsInt | typing.SupportsIndex = 0, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> numpy.typing.NDArray[numpy.float32]:
    """
    Causal attention of q [tokens, heads, head_dim] over stored positions; the batch is as in kv_write.
    """
def rms_norm(x: numpy.typing.NDArray[numpy.float32], weight: numpy.typing.NDArray[numpy.float32], eps: typing.SupportsFloat | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
    """
    x / sqrt(mean(x^2) + eps) * weight over the last axis of x [rows, n].
    """
def rope(x: numpy.typing.NDArray[numpy.float32], cos: numpy.typing.NDArray[numpy.float32], sin: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    """
    x [tokens, heads, head_dim] rotated in NeoX pairs by cos, sin [tokens, half].
    """
def silu_mul(gate: numpy.typing.NDArray[numpy.float32], up: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    """
    silu(gate) * up, both [rows, n].
    """
