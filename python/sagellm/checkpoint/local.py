"""What the model store, downloads and those who need neither have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""


def local_path(name_or_path: str | Path) -> Path | None:
    """The file or folder that was named, if there is one."""
    text = str(name_or_path)
    path = Path(text).expanduser()
    return path if text and path.exists() else None
