"""Paged KV cache: block tables over one pool, prefix sharing, layer groups."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sagellm.errors import UnsupportedError
from sagellm.kv.groups import plan_kv_groups
from sagellm.kv.interface import KvCache, KvGroup, KvStats
from sagellm.lazy_names import load_name

if TYPE_CHECKING:
    from sagellm.kv.reference import ReferenceKvCache

__all__ = [
    "KvCache",
    "KvGroup",
    "KvStats",
    "ReferenceKvCache",
    "create_kv_cache",
    "plan_kv_groups",
]

_HOMES = {"ReferenceKvCache": "sagellm.kv.reference"}  # the plain Python twin, for who asks for it


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOMES, name)


def create_kv_cache(
    num_blocks: int,
    block_size: int,
    windows: Sequence[int],
    *,
    native: bool,
    enable_prefix_caching: bool = True,
) -> KvCache:
    """Creates the bookkeeping of a KV cache (block ids and tables, not the memory of the pages).

    Args:
        num_blocks: Usable blocks; block ids are ``1..num_blocks``.
        block_size: Tokens per block.
        windows: One entry per group: 0 for full attention, else the sliding window in tokens.
        native: The C++ implementation, else the Python one; both choose the same block ids.
        enable_prefix_caching: Keep full blocks for later requests with the same prefix.

    Raises:
        InvalidArgumentError: A value out of range.
        UnsupportedError: ``native`` without the C++ core.
    """
    if not native:
        twin: type[ReferenceKvCache] = __getattr__("ReferenceKvCache")
        return twin(num_blocks, block_size, windows, enable_prefix_caching)
    try:
        core = importlib.import_module("sagellm._core")
    except ImportError as error:
        raise UnsupportedError(
            f"the native KV cache needs the C++ core, which cannot be imported ({error}); "
            "install sagellm with its extension or use the reference backend"
        ) from error
    cache: KvCache = core.kv.KvCache(num_blocks, block_size, list(windows), enable_prefix_caching)
    return cache
