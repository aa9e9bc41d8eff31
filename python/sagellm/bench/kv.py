"""The KV allocator and prefix index, timed inside the native core."""

from __future__ import annotations

from typing import Any

from sagellm.bench import report
from sagellm.native import load_core


def run(*, num_blocks: int) -> dict[str, Any]:
    """Nanoseconds per block: allocate + free, and the prefix path (match, publish, free)."""
    return dict(load_core().kv.benchmark(num_blocks))


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """Prints the result."""
    if as_json:
        report.print_json(result)
    else:
        report.print_table("KV cache", ("figure", "value"), list(result.items()))
