"""What the engine asks of a KV cache.

Implemented by ``_core.kv.KvCache`` and by ``ReferenceKvCache``. One pool of block ids serves every
group. A block of a group holds ``block_size`` tokens of the layers that the group covers; groups
have equally many layer slots, so all blocks have the same size in bytes. Block 0 is padding and is
never handed out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    """Layers that share one block table.

    Attributes:
        window: 0 for full attention, else the sliding window in tokens: a query at position p sees
            positions p - window + 1 .. p.
        layers: Model layers in this group; slot ``i`` of a block stores ``layers[i]``.
    """

    window: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStats:
    """Counters since creation (tokens and blocks), and the present state of the pool."""

    num_blocks: int  # usable blocks, without block 0
    free_blocks: int  # reference count 0, cached ones included
    cached_blocks: int  # in the prefix index
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    evicted_blocks: int  # cached blocks whose contents were given up
    copied_blocks: int  # copy-on-write


class KvCache(Protocol):
    """Block tables of live sequences over one block pool, with a prefix index.

    ``sequence_id`` is chosen by the caller (>= 0, unique among live sequences). A failed call
    changes nothing.
    """

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def num_groups(self) -> int:
        """Block tables per sequence."""

    def add(self, sequence_id: int, salt: int = 0) -> None:
        """Registers an empty sequence.

        Prefixes are shared among sequences of equal ``salt`` (unsigned 64-bit) only.
        """

    def match_prefix(self, sequence_id: int, token_ids: NDArray[np.int32]) -> int:
        """Takes the longest cached prefix: whole blocks, at most ``len(token_ids) - 1`` tokens.

        The sequence must be empty. A sliding group needs only its last
        ``ceil((window - 1) / block_size)`` blocks before the hit; earlier entries of its table are
        0. Returns the number of cached tokens.
        """

    def reserve(self, sequence_id: int, num_tokens: int) -> bool:
        """Makes positions ``< num_tokens`` writable, all or nothing.

        False means "no room", and nothing has changed. Tokens already committed stay readable; a
        shared tail block is replaced by a private copy (copy-on-write), reported once by
        ``take_copies``.
        """

    def commit(self, sequence_id: int, token_ids: NDArray[np.int32], num_computed: int) -> None:
        """Declares positions ``< num_computed`` computed.

        Publishes newly full blocks to the prefix index and gives back blocks of sliding groups that
        no later position can see (their table entries become 0).

        Args:
            sequence_id: A live sequence.
            token_ids: Its tokens from position 0, at least ``num_computed`` of them.
            num_computed: At least what was committed before, at most what is reserved.
        """

    def fork(self, parent_id: int, child_id: int) -> None:
        """Registers ``child_id`` with the parent's committed tokens, sharing every block."""

    def release(self, sequence_id: int) -> None:
        """Ends a sequence; its published blocks stay cached until they are needed.

        Tails are given back before heads, so that the end of a prefix is evicted first.
        """

    def block_tables(self, sequence_ids: Sequence[int]) -> NDArray[np.int32]:
        """Returns ``[num_groups, len(sequence_ids), max_blocks]``, 0-padded (max_blocks >= 1)."""

    def num_tokens(self, sequence_id: int) -> int:
        """Committed tokens of the sequence."""

    def num_blocks_of(self, sequence_id: int) -> int:
        """Blocks that the sequence holds, over all groups."""

    def take_copies(self) -> NDArray[np.int32]:
        """Returns and clears the pending block copies, to run in order before the next step.

        ``[n, 2]`` int32: source, destination.
        """

    def pin(self, sequence_id: int) -> None:
        """Keeps the sequence's published blocks after its release, until ``unpin``."""

    def unpin(self, sequence_id: int) -> None:
        """Undoes ``pin``; the id may be one already released."""

    def reset_prefix_index(self) -> None:
        """Forgets every cached block that no live or pinned sequence uses."""

    def stats(self) -> KvStats:
        """Counters and the present state of the pool."""

    def check_integrity(self) -> None:
        """Raises RuntimeError naming the broken invariant; O(blocks), for tests and idle checks."""
