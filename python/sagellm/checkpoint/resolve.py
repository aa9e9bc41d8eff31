"""From what a user typed to a model's files."""

from __future__ import annotations

import importlib
from pathlib import Path

from sagellm.checkpoint.local import Progress, local_path


def resolve_model(
    name_or_path: str | Path, *, auto_pull: bool = False, progress: Progress | None = None
) -> Path:
    """``ModelStore.resolve`` on the default store, which loads only for names."""
    path = local_path(name_or_path)
    if path is None:
        store = importlib.import_module("sagellm.checkpoint.store").ModelStore()
        path = store.resolve(name_or_path, auto_pull=auto_pull, progress=progress)
    return path
