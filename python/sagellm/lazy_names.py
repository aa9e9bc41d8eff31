"""Names of a package that load on first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def load_name(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What a package's ``__getattr__`` returns; the package keeps it from then on.

    Args:
        package: The package's ``__name__``.
        homes: Name to the module that defines it; the home of a submodule is the submodule.
        name: What the package lacks.

    Raises:
        AttributeError: The package has no such name.
    """
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if home == f"{package}.{name}" else getattr(module, name)
    setattr(sys.modules[package], name, value)
    return value
