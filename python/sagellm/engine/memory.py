"""Sizes the KV pool at start: what is asked for, what fits, and an error that names the knob."""

from __future__ import annotations

import logging
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from sagellm.errors import ResourceExhaustedError

if TYPE_CHECKING:
    from collections.abc import Sequence as ListLike

    from sagellm.backends.interface import ModelRunner
    from sagellm.engine.config import EngineConfig
    from sagellm.kv.interface import KvGroup

logger = logging.getLogger(__name__)

GIB = 1 << 30
DEFAULT_KV_BYTES = GIB  # unless one sequence of max_model_len needs more
_HEADROOM = 256 << 20  # left to the rest of the process and the machine


@runtime_checkable
class DeviceMemory(Protocol):
    """A runner whose KV pool lies in memory of its device, which serves nothing else."""

    @property
    def free_memory_bytes(self) -> int:
        """Bytes of the device that nobody has taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """The pool that ``resolve_kv_plan`` chose: usable blocks, bytes of one, longest sequence."""

    num_blocks: int
    bytes_per_block: int
    max_model_len: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.bytes_per_block


def blocks_needed(
    groups: ListLike[KvGroup], block_size: int, num_tokens: int, chunk_tokens: int
) -> int:
    """Most blocks that one sequence of ``num_tokens`` holds at once, over all groups.

    A sliding group holds its window, the chunk being computed, and partly used blocks at both ends.
    """
    whole = -(-num_tokens // block_size)
    total = 0
    for group in groups:
        if group.window > 0:
            total += min(whole, -(-(group.window + chunk_tokens) // block_size) + 2)
        else:
            total += whole
    return total


def tokens_that_fit(
    groups: ListLike[KvGroup], block_size: int, num_blocks: int, chunk_tokens: int
) -> int:
    """Longest sequence that has the pool to itself, in tokens; at most 2**31 - 1."""
    low, high = 0, 2**31 - 1
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_needed(groups, block_size, middle, chunk_tokens) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def resolve_kv_plan(
    runner: ModelRunner, config: EngineConfig, available_bytes: int | None = None
) -> KvPlan:
    """Decides how many KV blocks to allocate.

    Without a budget in ``config`` the pool takes 1 GiB, or what one sequence of ``max_model_len``
    needs if that is more, but never over half of the free memory nor over what ``max_num_seqs``
    sequences of ``max_model_len`` could use. On a device with memory of its own it takes nine
    tenths of what is free there, within the last of these bounds.

    Args:
        runner: Its weights are loaded already and so no longer count as free.
        config: The engine's knobs.
        available_bytes: Free memory; None reads it from the runner's device or the system.

    Raises:
        ResourceExhaustedError: The budget does not fit in memory, or ``max_model_len`` not in the
            budget; the message names the knob and the largest value that fits.
    """
    own = runner if isinstance(runner, DeviceMemory) else None
    if available_bytes is not None:
        available = available_bytes
    else:
        available = available_memory() if own is None else own.free_memory_bytes
    groups, size = runner.kv_groups, config.block_size
    per_block = max(1, runner.kv_bytes_per_block(size))
    usable = max(0, available - _HEADROOM)
    model_len = runner.config.max_position
    if config.max_model_len is not None:
        model_len = min(config.max_model_len, model_len)
    one = blocks_needed(groups, size, model_len, config.chunk_tokens)
    if config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // per_block
    elif config.kv_cache_tokens is not None:
        num_blocks = -(-config.kv_cache_tokens // size) * len(groups)
    elif own is not None:
        num_blocks = min(usable * 9 // 10 // per_block, one * config.max_num_seqs)
    else:
        half = usable // 2 // per_block
        num_blocks = min(max(DEFAULT_KV_BYTES // per_block, one), half, one * config.max_num_seqs)
    _check_fits(config, num_blocks, per_block, usable, available, len(groups))
    fits = tokens_that_fit(groups, size, num_blocks, config.chunk_tokens)
    if fits < 1:
        raise ResourceExhaustedError(
            f"a KV pool of {num_blocks} blocks of {per_block} bytes holds no sequence at all; set "
            f"kv_cache_bytes to at least {len(groups) * per_block}"
        )
    if config.max_model_len is not None and fits < model_len:
        raise ResourceExhaustedError(
            f"max_model_len is {model_len} tokens, but the KV pool ({_gib(num_blocks * per_block)})"
            f" holds {fits}; lower max_model_len to at most {fits}, or raise kv_cache_gb to "
            f"{_gib_up(one * per_block)}"
        )
    logger.info(
        "KV pool: %d blocks of %d tokens, %s; the longest sequence is %d tokens",
        num_blocks,
        size,
        _gib(num_blocks * per_block),
        min(model_len, fits),
    )
    return KvPlan(num_blocks=num_blocks, bytes_per_block=per_block, max_model_len=model_len)


def _check_fits(
    config: EngineConfig, num_blocks: int, per_block: int, usable: int, available: int, groups: int
) -> None:
    if num_blocks > 0 and num_blocks * per_block <= usable:
        return
    if config.kv_cache_tokens is not None:
        largest_tokens = usable // per_block // groups * config.block_size
        remedy = f"lower kv_cache_tokens to at most {largest_tokens}"
    elif config.kv_cache_bytes is not None and num_blocks == 0:
        raise ResourceExhaustedError(
            f"kv_cache_gb is {config.kv_cache_bytes / GIB:.6f}, less than one block of {per_block} "
            f"bytes; the largest value that fits in free memory is {usable / GIB:.2f}"
        )
    else:
        remedy = f"the largest kv_cache_gb that fits is {usable / GIB:.2f}"
    raise ResourceExhaustedError(
        f"the KV pool needs {_gib(max(num_blocks, 1) * per_block)}, but {_gib(available)} of "
        f"memory are free ({_gib(_HEADROOM)} of it stay reserved); {remedy}"
    )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the least of free RAM and every cgroup above it.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    limits = [_meminfo_available(root)]
    limits += _cgroup_v2_free(root)
    limits += _cgroup_v1_free(root)
    known = [value for value in limits if value is not None]
    if known:
        return max(0, min(known))
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return page * pages // 2  # no /proc (macOS): count half of the memory as free


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def peak_memory_mb() -> int:
    """Largest resident set of this process so far, in MB (rounded up)."""
    return -(-peak_memory_bytes() // 1_000_000)


def _meminfo_available(root: Path) -> int | None:
    text = _read(root / "proc/meminfo")
    for line in text.splitlines() if text else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_v2_free(root: Path) -> list[int | None]:
    text = _read(root / "proc/self/cgroup") or ""
    relative = next((line[3:] for line in text.splitlines() if line.startswith("0::")), "/")
    base = root / "sys/fs/cgroup"
    folder = base / relative.strip().lstrip("/")
    folders = [folder, *folder.parents]
    return [
        _free_in(path, "memory.max", "memory.current", "inactive_file")
        for path in folders
        if path == base or base in path.parents
    ]


def _cgroup_v1_free(root: Path) -> list[int | None]:
    folder = root / "sys/fs/cgroup/memory"
    return [
        _free_in(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    ]


def _free_in(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> int | None:
    limit, usage = _read(folder / limit_name), _read(folder / usage_name)
    if limit is None or usage is None or not limit.strip().isdigit():
        return None  # absent, or "max"
    cached = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        if line.startswith(reclaimable + " "):
            cached = int(line.split()[1])
    return int(limit) - int(usage) + cached


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _gib_up(num_bytes: int) -> str:
    return f"{-(-num_bytes * 100 // GIB) / 100:.2f}"
