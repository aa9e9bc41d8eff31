"""
Block pool, prefix index, block tables and KV pages.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['KvCache', 'KvStorage', 'benchmark', 'bytes_per_block']
class KvCache:
    """
    Paged KV cache; the contract is sagellm.kv.KvCache.
    """
    def __init__(self, num_blocks: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex, windows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], enable_prefix_caching: bool = True, *, hash_mask: typing.SupportsInt | typing.SupportsIndex = 18446744073709551615) -> None:
        """
        `hash_mask` is for tests: 0 makes every prefix collide.
        """
    def add(self, sequence_id: typing.SupportsInt | typing.SupportsIndex, salt: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def block_tables(self, sequence_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> numpy.typing.NDArray[numpy.int32]:
        ...
    def check_integrity(self) -> None:
        ...
    def commit(self, sequence_id: typing.SupportsInt | typing.SupportsIndex, token_ids: numpy.typing.NDArray[numpy.int32], num_computed: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def fork(self, parent_id: typing.SupportsInt | typing.SupportsIndex, child_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def match_prefix(self, sequence_id: typing.SupportsInt | typing.SupportsIndex, token_ids: numpy.typing.NDArray[numpy.int32]) -> int:
        ...
    def num_blocks_of(self, sequence_id: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
    def num_tokens(self, sequence_id: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
    def pin(self, sequence_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def release(self, sequence_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def reserve(self, sequence_id: typing.SupportsInt | typing.SupportsIndex, num_tokens: typing.SupportsInt | typing.SupportsIndex) -> bool:
        ...
    def reset_prefix_index(self) -> None:
        ...
    def stats(self) -> typing.Any:
        ...
    def take_copies(self) -> numpy.typing.NDArray[numpy.int32]:
        ...
    def unpin(self, sequence_id: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def block_size(self) -> int:
        ...
    @property
    def num_groups(self) -> int:
        ...
class KvStorage:
    """
    Memory of the KV pages, packed for the attention kernels.
    """
    def __init__(self, num_blocks: typing.SupportsInt | typing.SupportsIndex, num_slots: typing.SupportsInt | typing.SupportsIndex, num_kv_heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex, dtype: str = 'bf16') -> None:
        ...
    def copy_block(self, source: typing.SupportsInt | typing.SupportsIndex, destination: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def pages(self, slot: typing.SupportsInt | typing.SupportsIndex) -> numpy.ndarray:
        """
        View [num_blocks + 1, kv_heads, elements of a page]: uint16 in bf16, int8 in int8.
        """
    @property
    def bytes(self) -> int:
        ...
    @property
    def bytes_per_block(self) -> int:
        ...
    @property
    def dtype(self) -> str:
        ...
def benchmark(num_blocks: typing.SupportsInt | typing.SupportsIndex = 8192, block_size: typing.SupportsInt | typing.SupportsIndex = 32, blocks_per_request: typing.SupportsInt | typing.SupportsIndex = 64, num_requests: typing.SupportsInt | typing.SupportsIndex = 2000, repeat: typing.SupportsInt | typing.SupportsIndex = 5) -> dict:
    """
    Times the bookkeeping; medians in nanoseconds per block (allocate_free_ns, prefix_path_ns).
    """
def bytes_per_block(num_slots: typing.SupportsInt | typing.SupportsIndex, num_kv_heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex, dtype: str = 'bf16') -> int:
    """
    Bytes of one block of a KvStorage of these sizes.
    """
