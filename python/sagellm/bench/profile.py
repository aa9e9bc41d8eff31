"""``--profile``: a CPU profile of what a benchmark does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sagellm.errors import InvalidArgumentError
from sagellm.native import load_core


@contextmanager
def profiled(path: Path | None) -> Iterator[None]:
    """Writes a profile of the body to ``path``; nothing happens without one.

    Raises:
        InvalidArgumentError: This build has no profiler.
    """
    if path is None:
        yield
        return
    profiler = load_core().profiler
    if not profiler.available:
        raise InvalidArgumentError(
            "this build has no profiler; install gperftools (libgoogle-perftools-dev) and "
            "reinstall with SAGE_ENABLE_GPERFTOOLS=1"
        )
    profiler.start(str(path))
    try:
        yield
    finally:
        profiler.stop()
