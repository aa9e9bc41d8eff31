"""Which layers of a model share a block table."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm.errors import InvalidArgumentError
from sagellm.kv.interface import KvGroup


def plan_kv_groups(layer_windows: Sequence[int]) -> tuple[KvGroup, ...]:
    """Partitions layers into groups that one block pool can serve.

    All layers of a group see the same positions (full attention, or one sliding window), so one
    table serves them. All groups have about the same number of layers, so that a block, which has
    one slot per layer, has the same size for each of them and any free block fits any group. The
    number of slots per block is the size of the largest group.

    Gemma 3 270M has 15 layers with a window of 512 and 3 with full attention. In one group each, a
    block would need 15 slots, of which the full group wastes 12. Instead, 5 sliding groups and 1
    full group have 3 layers each and nothing is wasted: at 4096 tokens the 5 sliding groups hold a
    window's worth of blocks, and only 3 of 18 layers keep everything. A model whose layers are all
    alike has one group.

    The number of slots is the number of layers of one of the kinds: the one that leaves the fewest
    slots unused, and of those the largest, because fewer groups mean fewer tables. When the
    smallest kind divides the others, that is the smallest. Only the last group of a kind may be
    shorter.

    Args:
        layer_windows: Per model layer 0 for full attention, or the sliding window in tokens.

    Returns:
        Groups in ascending order of window (full attention first), then of layer.

    Raises:
        InvalidArgumentError: No layers, or a negative window.
    """
    if not layer_windows:
        raise InvalidArgumentError("a model without layers has no KV groups")
    if min(layer_windows) < 0:
        raise InvalidArgumentError(f"a layer has window {min(layer_windows)}, must be >= 0")
    kinds: dict[int, list[int]] = {window: [] for window in sorted(set(layer_windows))}
    for layer, window in enumerate(layer_windows):
        kinds[window].append(layer)
    counts = [len(layers) for layers in kinds.values()]

    def unused_slots(size: int) -> int:
        return sum(-count % size for count in counts)

    size = min(counts, key=lambda size: (unused_slots(size), -size))
    return tuple(
        KvGroup(window=window, layers=tuple(layers[start : start + size]))
        for window, layers in kinds.items()
        for start in range(0, len(layers), size)
    )
