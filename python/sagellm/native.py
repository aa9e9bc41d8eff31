"""The one door to the native core: present, or an error that says how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from sagellm.errors import DeviceUnavailableError


def load_core() -> ModuleType:
    """Imports ``sagellm._core``.

    Raises:
        DeviceUnavailableError: This install has none, or it does not load.
    """
    try:
        return importlib.import_module("sagellm._core")
    except ImportError as error:
        raise DeviceUnavailableError(
            f"the native core is not installed ({error}); reinstall without "
            "SAGE_SKIP_C_EXTENSIONS, or choose device 'reference'"
        ) from None
