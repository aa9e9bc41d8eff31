"""NCCL, which several NVIDIA devices talk through: where it may lie, and what was found."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from sagellm.backends.cuda import load_cuda

if TYPE_CHECKING:
    from types import ModuleType


def nccl_folders() -> list[str]:
    """Folders of ``nvidia-nccl`` wheels, where the dynamic linker does not look."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package of several wheels
    roots = spec.submodule_search_locations if spec is not None else None
    places = [Path(root) / "nccl" / "lib" for root in roots or ()]
    return [str(place) for place in places if place.is_dir()]


def describe_nccl(module: ModuleType | None = None) -> str:
    """Version and path of the NCCL that would be used.

    Args:
        module: The kernels; None imports ``sagellm._cuda``.

    Raises:
        DeviceUnavailableError: This install has no ``_cuda``, or there is no NCCL, or an old one.
    """
    library = (load_cuda() if module is None else module).Nccl(nccl_folders())
    return f"{library.version_text}, {library.path}"
