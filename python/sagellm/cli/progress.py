"""Progress of downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def pull_progress() -> Iterator[Callable[[int, int], None]]:
    """A callback for ``pull`` that draws a bar on standard error once bytes arrive."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("downloading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = None

    def report(done: int, total: int) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task("downloading", total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()
