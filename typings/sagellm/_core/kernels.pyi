"""
Kernels by instruction set, for tests and benchmarks.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import sagellm._core.quant
import typing
__all__: list[str] = ['add', 'argmax', 'arithmetic_of', 'arithmetic_peak', 'attention', 'attention_finish', 'available_isas', 'benchmark_matmul', 'bias_gelu', 'cache_bandwidth', 'cpu_brand', 'cpu_features', 'gelu_tanh_mul', 'kv_write', 'layer_norm', 'matmul', 'memory_bandwidth', 'quantize', 'rms_norm', 'rope', 'sampling_weights', 'scale', 'selected_isa', 'silu_mul', 'softcap', 'softmax', 'sum_exp', 'time_attention', 'time_kv_write', 'time_matmul', 'time_rows', 'time_sampler', 'to_bf16']
def add(isa: str, a: numpy.typing.NDArray[numpy.float32], b: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    ...
def argmax(isa: str, x: numpy.typing.NDArray[numpy.float32]) -> tuple:
    ...
def arithmetic_of(isa: str, packed: sagellm._core.quant.PackedMatrix) -> str:
    """
    What a matmul multiplies activations as: "f32", "bf16" or "i8".
    """
def arithmetic_peak(isa: str, arithmetic: str, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex) -> dict:
    """
    The most multiplications and additions per second: {"instruction", "ops_per_second"}.
    """
def attention(isa: str, q: numpy.typing.NDArray[numpy.float32], pool: numpy.ndarray, block_table: numpy.typing.NDArray[numpy.int32], *, kv_head: typing.SupportsInt | typing.SupportsIndex, block_stride: typing.SupportsInt | typing.SupportsIndex, head_stride: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex, first_position: typing.SupportsInt | typing.SupportsIndex, splits: tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex], window: typing.SupportsInt | typing.SupportsIndex = 0, scale: typing.SupportsFloat | typing.SupportsIndex = 1.0, softcap: typing.SupportsFloat | typing.SupportsIndex = 0.0) -> tuple:
    """
    Runs AttentionParams for q [tokens, group, head_dim]; returns the states (m, l, acc).
    """
def attention_finish(isa: str, m: numpy.typing.NDArray[numpy.float32], l: numpy.typing.NDArray[numpy.float32], acc: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    """
    Merges states [states, rows(, head_dim)]; returns [rows, head_dim].
    """
def available_isas() -> list[str]:
    """
    Instruction sets with kernels that run here, plainest first.
    """
def benchmark_matmul(isa: str, packed: sagellm._core.quant.PackedMatrix, num_tokens: typing.SupportsInt | typing.SupportsIndex, repeat: typing.SupportsInt | typing.SupportsIndex, precision: str = 'a8') -> float:
    """
    Mean seconds of one matmul by one thread, without quantization of the activations.
    """
def bias_gelu(isa: str, a: numpy.typing.NDArray[numpy.float32], b: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    ...
def cache_bandwidth(isa: str, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex) -> float:
    """
    Bytes per second of loads from each thread's L2 cache.
    """
def cpu_brand() -> str:
    """
    The processor's name for itself, or ''.
    """
def cpu_features() -> list[str]:
    """
    Instruction-set extensions of this processor that some kernel is built for.
    """
def gelu_tanh_mul(isa: str, a: numpy.typing.NDArray[numpy.float32], b: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    ...
def kv_write(isa: str, pool: numpy.ndarray, block_table: numpy.typing.NDArray[numpy.int32], k: numpy.typing.NDArray[numpy.float32], v: numpy.typing.NDArray[numpy.float32], *, kv_head: typing.SupportsInt | typing.SupportsIndex, block_stride: typing.SupportsInt | typing.SupportsIndex, head_stride: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex, first_position: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def layer_norm(isa: str, x: numpy.typing.NDArray[numpy.float32], weight: numpy.typing.NDArray[numpy.float32], bias: numpy.typing.NDArray[numpy.float32], eps: typing.SupportsFloat | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
    ...
def matmul(isa: str, packed: sagellm._core.quant.PackedMatrix, x: numpy.typing.NDArray[numpy.float32], precision: str = 'a8', splits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] = []) -> numpy.typing.NDArray[numpy.float32]:
    """
    x [tokens, k] times the packed matrix: float32 [tokens, n]. Quantized formats see x as `precision`. The row blocks are computed in one call, or in ranges that end at `splits`.
    """
def memory_bandwidth(isa: str, threads: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex) -> float:
    """
    Bytes per second of reading `bytes` of huge-page memory, in rounds of 4 MiB per thread.
    """
def quantize(isa: str, x: numpy.typing.NDArray[numpy.float32], precision: str = 'a8') -> dict:
    """
    Activations as the kernels see them: q, d, s, sum16 and in "a15" q_lo, each [tokens, ...].
    """
def rms_norm(isa: str, x: numpy.typing.NDArray[numpy.float32], weight: numpy.typing.NDArray[numpy.float32], eps: typing.SupportsFloat | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
    ...
def rope(isa: str, x: numpy.typing.NDArray[numpy.float32], cos: numpy.typing.NDArray[numpy.float32], sin: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    ...
def sampling_weights(isa: str, x: numpy.typing.NDArray[numpy.float32], largest: typing.SupportsFloat | typing.SupportsIndex, rate: typing.SupportsFloat | typing.SupportsIndex, cut: typing.SupportsFloat | typing.SupportsIndex) -> tuple:
    """
    Returns (sum, weights).
    """
def scale(isa: str, x: numpy.typing.NDArray[numpy.float32], factor: typing.SupportsFloat | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
    ...
def selected_isa() -> str:
    """
    The instruction set in use: SAGELLM_CPU_ISA, or the best available.
    """
def silu_mul(isa: str, a: numpy.typing.NDArray[numpy.float32], b: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    ...
def softcap(isa: str, x: numpy.typing.NDArray[numpy.float32], cap: typing.SupportsFloat | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
    ...
def softmax(isa: str, x: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float32]:
    ...
def sum_exp(isa: str, x: numpy.typing.NDArray[numpy.float32], max: typing.SupportsFloat | typing.SupportsIndex) -> float:
    ...
def time_attention(isa: str, *, kv_heads: typing.SupportsInt | typing.SupportsIndex, group: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, context: typing.SupportsInt | typing.SupportsIndex, num_tokens: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex, layers: typing.SupportsInt | typing.SupportsIndex = 1, sequences: typing.SupportsInt | typing.SupportsIndex = 1, kv_dtype: str = 'bf16') -> dict:
    """
    Seconds of attention of the last `num_tokens` of `context` positions, merge included; `layers` of
    `sequences` are used in turn.
    """
def time_kv_write(isa: str, *, kv_heads: typing.SupportsInt | typing.SupportsIndex, group: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, context: typing.SupportsInt | typing.SupportsIndex, num_tokens: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex, layers: typing.SupportsInt | typing.SupportsIndex = 1, sequences: typing.SupportsInt | typing.SupportsIndex = 1, kv_dtype: str = 'bf16') -> dict:
    """
    Seconds of writing K and V of the last `num_tokens` of `context` positions.
    """
def time_matmul(isa: str, packed: sagellm._core.quant.PackedMatrix, num_tokens: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex, precision: str = 'a8', copies: typing.SupportsInt | typing.SupportsIndex = 1) -> dict:
    """
    Seconds of one matmul, without encoding the activations: {"median", "best", "rounds"}. `copies` of the
    weights are used in turn.
    """
def time_rows(isa: str, kernel: str, rows: typing.SupportsInt | typing.SupportsIndex, columns: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex) -> dict:
    """
    Seconds of a row-wise kernel over `rows` rows per thread.
    """
def time_sampler(isa: str, vocab: typing.SupportsInt | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, top_k: typing.SupportsInt | typing.SupportsIndex, top_p: typing.SupportsFloat | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, seconds: typing.SupportsFloat | typing.SupportsIndex) -> dict:
    """
    Seconds of choosing one token per thread.
    """
def to_bf16(isa: str, x: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.uint16]:
    ...
