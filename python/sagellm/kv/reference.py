"""The KV cache in plain Python: for installs without the core, and the model for its tests.

Every decision that shows in a block id is specified here:

* Free blocks are taken from the head of one list, which starts as 1, 2, ..., N.
* A released block goes to the head if its contents are not cached, else to the tail. So cached
  contents are given up only when nothing else is free, least recently released first.
* A sequence releases its last position first, and within a position its groups in order.
* ``reserve`` copies a shared tail first, then adds positions in order, and within a position groups
  in order.
* ``commit`` publishes blocks in order and then gives back invisible ones, group by group, oldest
  first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sagellm.errors import InvalidArgumentError
from sagellm.kv.interface import KvStats

_MAX_BLOCKS = 1 << 28
_MAX_BLOCK_SIZE = 4096
_MAX_GROUPS = 256
_MAX_TOKENS = (1 << 31) - 1
_MAX_SALT = (1 << 64) - 1
_NODES_PER_BLOCK = 4  # beyond this bound new blocks stay uncached


@dataclass(slots=True, kw_only=True, eq=False)
class _Node:
    """One exact prefix: the tokens on the path from the root, whose first level is the salt."""

    parent: _Node | None
    key: int | tuple[int, ...]  # the salt of a root, else the tokens of the last block
    blocks: list[int]  # per group the cached block that holds the last block's KV, or 0
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)
    num_sequences: int = 0  # live sequences whose last published block is here


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    tip: _Node  # node of the last published block, or the root of the salt
    tables: list[list[int]]  # per group
    num_tokens: int = 0  # committed
    num_published: int = 0  # leading full blocks that have a node
    pinned: bool = False
    released: bool = False  # alive only as a pin

    def held_blocks(self) -> Iterator[int]:
        return (block for table in self.tables for block in table if block)


class ReferenceKvCache:
    """See ``sagellm.kv.interface.KvCache`` for the contract."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: Sequence[int],
        enable_prefix_caching: bool = True,
    ) -> None:
        """Creates an empty cache.

        Args:
            num_blocks: Usable blocks, without block 0.
            block_size: Tokens per block.
            windows: One entry per group: 0 for full attention, else the sliding window in tokens.
            enable_prefix_caching: Publish full blocks to the prefix index.

        Raises:
            InvalidArgumentError: A value out of range.
        """
        _require_in_range("num_blocks", num_blocks, 1, _MAX_BLOCKS)
        _require_in_range("block_size", block_size, 1, _MAX_BLOCK_SIZE)
        _require_in_range("the number of KV groups", len(windows), 1, _MAX_GROUPS)
        for window in windows:
            _require_in_range("the window of a KV group", window, 0, _MAX_TOKENS)
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._windows = tuple(windows)
        self._enable_prefix_caching = enable_prefix_caching
        self._free = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._refs = [0] * (num_blocks + 1)
        self._owner: dict[int, _Node] = {}  # cached blocks
        self._roots: dict[int, _Node] = {}  # by salt
        self._num_nodes = 0  # roots not counted
        self._sequences: dict[int, _Sequence] = {}
        self._copies: list[tuple[int, int]] = []  # pending; each holds a reference to its source
        self._queried_tokens = 0
        self._hit_tokens = 0
        self._evicted_blocks = 0
        self._copied_blocks = 0

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def num_groups(self) -> int:
        """Number of block tables of a sequence."""
        return len(self._windows)

    # ------------------------------------------------------------------------------- sequences

    def add(self, sequence_id: int, salt: int = 0) -> None:
        """Registers an empty sequence."""
        self._require_unused(sequence_id)
        _require_in_range("salt", salt, 0, _MAX_SALT)
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = _Node(parent=None, key=salt, blocks=[0] * self.num_groups)
        root.num_sequences += 1
        self._sequences[sequence_id] = _Sequence(tip=root, tables=[[] for _ in self._windows])

    def fork(self, parent_id: int, child_id: int) -> None:
        """Registers ``child_id`` with the parent's committed tokens, sharing every block."""
        parent = self._live(parent_id)
        self._require_unused(child_id)
        num_shared = -(-parent.num_tokens // self._block_size)
        child = _Sequence(
            tip=parent.tip,
            tables=[table[:num_shared] for table in parent.tables],
            num_tokens=parent.num_tokens,
            num_published=parent.num_published,
        )
        for block in child.held_blocks():
            self._acquire(block)
        child.tip.num_sequences += 1
        self._sequences[child_id] = child

    def release(self, sequence_id: int) -> None:
        """Ends a sequence; what is pinned stays."""
        sequence = self._live(sequence_id)
        self._release_entries(sequence, keep_published=sequence.pinned)
        self._leave(sequence.tip)
        if sequence.pinned:
            sequence.released = True
        else:
            del self._sequences[sequence_id]

    def pin(self, sequence_id: int) -> None:
        """Keeps what the sequence will have published at its release."""
        self._live(sequence_id).pinned = True

    def unpin(self, sequence_id: int) -> None:
        """Undoes ``pin``."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not sequence.pinned:
            raise InvalidArgumentError(f"sequence id {sequence_id} is not pinned")
        sequence.pinned = False
        if sequence.released:
            self._release_entries(sequence, keep_published=False)
            del self._sequences[sequence_id]

    def block_tables(self, sequence_ids: Sequence[int]) -> NDArray[np.int32]:
        """Returns ``[num_groups, len(sequence_ids), max_blocks]``, padded with 0."""
        sequences = [self._live(sequence_id) for sequence_id in sequence_ids]
        width = max([1, *(len(sequence.tables[0]) for sequence in sequences)])
        out = np.zeros((self.num_groups, len(sequences), width), dtype=np.int32)
        for i, sequence in enumerate(sequences):
            for group, table in enumerate(sequence.tables):
                out[group, i, : len(table)] = table
        return out

    def num_tokens(self, sequence_id: int) -> int:
        """Committed tokens of the sequence."""
        return self._live(sequence_id).num_tokens

    def num_blocks_of(self, sequence_id: int) -> int:
        """Blocks that the sequence holds, over all groups."""
        return sum(1 for _ in self._live(sequence_id).held_blocks())

    # ---------------------------------------------------------------------- room, copy-on-write

    def reserve(self, sequence_id: int, num_tokens: int) -> bool:
        """Makes positions ``< num_tokens`` writable, or returns False and changes nothing."""
        sequence = self._live(sequence_id)
        _require_in_range("num_tokens", num_tokens, 0, _MAX_TOKENS)
        if num_tokens <= sequence.num_tokens:
            return True
        num_new = max(0, -(-num_tokens // self._block_size) - len(sequence.tables[0]))
        shared_groups = self._shared_tail_groups(sequence)
        if num_new * self.num_groups + len(shared_groups) > len(self._free):
            return False
        self._make_writable(sequence, shared_groups)
        for _ in range(num_new):
            for table in sequence.tables:
                table.append(self._allocate())
        return True

    def take_copies(self) -> NDArray[np.int32]:
        """Returns and clears pending block copies ``[n, 2]`` (source, destination), in order."""
        taken, self._copies = self._copies, []
        for source, _ in taken:
            self._drop(source)
        return np.array(taken, dtype=np.int32).reshape(-1, 2)

    def _shared_tail_groups(self, sequence: _Sequence) -> list[int]:
        """Groups whose partly filled last block another sequence also names."""
        entry, filled = divmod(sequence.num_tokens, self._block_size)
        if filled == 0:
            return []
        return [g for g, table in enumerate(sequence.tables) if self._is_shared(table[entry])]

    def _is_shared(self, block: int) -> bool:
        pending_reads = sum(1 for source, _ in self._copies if source == block)
        return self._refs[block] - pending_reads > 1

    def _make_writable(self, sequence: _Sequence, groups: list[int]) -> None:
        entry = sequence.num_tokens // self._block_size
        for group in groups:
            copy = self._allocate()
            # The table's reference to the source becomes that of the pending copy.
            self._copies.append((sequence.tables[group][entry], copy))
            sequence.tables[group][entry] = copy
            self._copied_blocks += 1

    def _drop_dead_copies(self) -> None:
        # Latest first: a copy may read the destination of an earlier one.
        for copy in reversed(self._copies.copy()):
            source, destination = copy
            if self._refs[destination] == 0:
                self._copies.remove(copy)
                self._drop(source)

    # ----------------------------------------------------------------------------- prefix cache

    def match_prefix(self, sequence_id: int, token_ids: NDArray[np.int32]) -> int:
        """Takes the longest cached prefix and returns its number of tokens."""
        sequence = self._live(sequence_id)
        _require(
            sequence.num_tokens == 0 and not sequence.tables[0],
            f"sequence {sequence_id} is not empty; match its prefix before reserving",
        )
        _check_tokens(token_ids)
        if not self._enable_prefix_caching or len(token_ids) == 0:
            return 0
        path = self._find_path(sequence.tip, token_ids[: len(token_ids) - 1])
        num_hit = next(n for n in range(len(path), -1, -1) if self._is_usable(path[:n]))
        self._queried_tokens += len(token_ids)
        self._hit_tokens += num_hit * self._block_size
        for entry, node in enumerate(path[:num_hit]):
            for group, table in enumerate(sequence.tables):
                visible = entry >= self._num_dead_entries(group, num_hit * self._block_size)
                table.append(node.blocks[group] if visible else 0)
                if visible:
                    self._acquire(node.blocks[group])
        if num_hit:
            self._move(sequence, path[num_hit - 1])
        sequence.num_tokens = num_hit * self._block_size
        sequence.num_published = num_hit
        return sequence.num_tokens

    def commit(self, sequence_id: int, token_ids: NDArray[np.int32], num_computed: int) -> None:
        """Declares positions ``< num_computed`` computed."""
        sequence = self._live(sequence_id)
        _check_tokens(token_ids)
        old = sequence.num_tokens
        room = len(sequence.tables[0]) * self._block_size
        _require(
            old <= num_computed <= min(room, len(token_ids)),
            f"num_computed is {num_computed}, but {old} tokens are committed, {room} are reserved "
            f"and {len(token_ids)} are given",
        )
        _require(
            num_computed == old or not self._shared_tail_groups(sequence),
            f"sequence {sequence_id} shares its last block since a fork; reserve before computing",
        )
        sequence.num_tokens = num_computed
        if self._enable_prefix_caching:
            self._publish(sequence, token_ids)
        for group, table in enumerate(sequence.tables):
            for entry in range(self._num_dead_entries(group, num_computed)):
                if table[entry]:
                    self._drop(table[entry])
                    table[entry] = 0
        self._drop_dead_copies()

    def reset_prefix_index(self) -> None:
        """Forgets every cached block that no live or pinned sequence uses."""
        for block in self._free:
            if block in self._owner:
                self._evict(block)

    def _find_path(self, node: _Node, token_ids: NDArray[np.int32]) -> list[_Node]:
        path: list[_Node] = []
        for key in self._block_keys(token_ids):
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _is_usable(self, path: list[_Node]) -> bool:
        """Whether every group has the blocks that positions after ``path`` can see."""
        num_tokens = len(path) * self._block_size
        return all(
            node.blocks[group]
            for group in range(self.num_groups)
            for node in path[self._num_dead_entries(group, num_tokens) :]
        )

    def _publish(self, sequence: _Sequence, token_ids: NDArray[np.int32]) -> None:
        """Gives newly full blocks a node, and the block to the node unless it has one already."""
        start = sequence.num_published * self._block_size
        for key in self._block_keys(token_ids[start : sequence.num_tokens]):
            node = sequence.tip.children.get(key)
            if node is None:
                if self._num_nodes == self._num_blocks * _NODES_PER_BLOCK:
                    return  # the next commit tries again
                node = _Node(parent=sequence.tip, key=key, blocks=[0] * self.num_groups)
                sequence.tip.children[key] = node
                self._num_nodes += 1
            self._move(sequence, node)
            for group, table in enumerate(sequence.tables):
                block = table[sequence.num_published]
                if block and not node.blocks[group]:
                    node.blocks[group] = block
                    self._owner[block] = node
            sequence.num_published += 1

    def _block_keys(self, token_ids: NDArray[np.int32]) -> list[tuple[int, ...]]:
        whole = len(token_ids) // self._block_size * self._block_size
        return [tuple(row) for row in token_ids[:whole].reshape(-1, self._block_size).tolist()]

    def _num_dead_entries(self, group: int, num_tokens: int) -> int:
        """Leading table entries that no position ``>= num_tokens`` can see."""
        window = self._windows[group]
        return 0 if window == 0 else max(0, num_tokens - window + 1) // self._block_size

    def _move(self, sequence: _Sequence, node: _Node) -> None:
        node.num_sequences += 1
        self._leave(sequence.tip)
        sequence.tip = node

    def _leave(self, node: _Node) -> None:
        node.num_sequences -= 1
        self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Removes a node that nothing needs, then its parent if nothing else needs that."""
        while not node.children and not any(node.blocks) and node.num_sequences == 0:
            if node.parent is None:
                assert isinstance(node.key, int)
                del self._roots[node.key]
                return
            assert isinstance(node.key, tuple)
            del node.parent.children[node.key]
            self._num_nodes -= 1
            node = node.parent

    # ------------------------------------------------------------------------------------- pool

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        if block in self._owner:
            self._evict(block)
        self._refs[block] = 1
        return block

    def _evict(self, block: int) -> None:
        node = self._owner.pop(block)
        node.blocks[node.blocks.index(block)] = 0
        self._prune(node)
        self._evicted_blocks += 1

    def _acquire(self, block: int) -> None:
        self._free.pop(block, None)
        self._refs[block] += 1

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None
            if block not in self._owner:
                self._free.move_to_end(block, last=False)

    def _release_entries(self, sequence: _Sequence, *, keep_published: bool) -> None:
        for entry in reversed(range(len(sequence.tables[0]))):
            for table in sequence.tables:
                block = table[entry]
                if block and not (keep_published and block in self._owner):
                    self._drop(block)
                    table[entry] = 0
        self._drop_dead_copies()

    def _live(self, sequence_id: int) -> _Sequence:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.released:
            raise InvalidArgumentError(f"no live sequence has id {sequence_id}; add it first")
        return sequence

    def _require_unused(self, sequence_id: int) -> None:
        _require(sequence_id >= 0, f"sequence id is {sequence_id}, must be >= 0")
        _require(sequence_id not in self._sequences, f"sequence id {sequence_id} is live or pinned")

    # ---------------------------------------------------------------------------- introspection

    def stats(self) -> KvStats:
        """Returns counters and the present state of the pool."""
        return KvStats(
            num_blocks=self._num_blocks,
            free_blocks=len(self._free),
            cached_blocks=len(self._owner),
            prefix_queried_tokens=self._queried_tokens,
            prefix_hit_tokens=self._hit_tokens,
            evicted_blocks=self._evicted_blocks,
            copied_blocks=self._copied_blocks,
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError naming the broken invariant."""
        refs = Counter(source for source, _ in self._copies)
        tips: Counter[_Node] = Counter()
        for sequence in self._sequences.values():
            refs.update(sequence.held_blocks())
            if not sequence.released:
                tips[sequence.tip] += 1
        for block in range(1, self._num_blocks + 1):
            _invariant(self._refs[block] == refs[block], f"block {block} counts wrong references")
        unused = {block for block in range(1, self._num_blocks + 1) if self._refs[block] == 0}
        _invariant(set(self._free) == unused, "the free list is not the set of unreferenced blocks")
        cached = [block in self._owner for block in self._free]
        _invariant(cached == sorted(cached), "a cached block is taken before one that is not")
        nodes = list(self._walk())
        num_nodes = sum(node.parent is not None for node in nodes)
        _invariant(num_nodes == self._num_nodes, "nodes were lost")
        for node in nodes:
            _invariant(node.num_sequences == tips[node], "a node counts wrong sequences")
            needed = node.children or any(node.blocks) or node.num_sequences
            _invariant(bool(needed), "a node is kept that nothing needs")
        placed = {block: node for node in nodes for block in node.blocks if block}
        _invariant(placed == self._owner, "the prefix index and the owners of blocks disagree")

    def _walk(self) -> Iterator[_Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(message)


def _require_in_range(name: str, value: int, low: int, high: int) -> None:
    _require(low <= value <= high, f"{name} is {value}, must be in {low}..{high}")


def _invariant(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"KV cache invariant broken: {message}")


def _check_tokens(token_ids: NDArray[np.int32]) -> None:
    if not isinstance(token_ids, np.ndarray) or token_ids.dtype != np.int32 or token_ids.ndim != 1:
        raise TypeError("token_ids must be a one-dimensional int32 array")
