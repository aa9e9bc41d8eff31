"""Typed, bounded reads of untrusted model settings (GGUF metadata, ``config.json``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sagellm.errors import CorruptFileError

_MISSING: Any = object()


class Fields:
    """A mapping whose values are checked when they are read.

    An absent key and a null value are the same. Without a default a missing key is an error.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        """Wraps ``values``; messages name ``source``, and ``prefix`` precedes every key."""
        self._values = values
        self._source = source
        self._prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(self._prefix + key) is not None

    def value(self, key: str, default: Any = _MISSING) -> Any:
        """The raw value."""
        value = self._values.get(self._prefix + key)
        if value is not None:
            return value
        if default is _MISSING:
            raise CorruptFileError(f"{self._source}: {self._prefix}{key} is missing")
        return default

    def integer(
        self, key: str, default: Any = _MISSING, *, low: int = 1, high: int = 1 << 24
    ) -> int:
        """A whole number in ``low..high``; an array of equal ones counts (per-layer GGUF keys)."""
        value = self.value(key, default)
        if isinstance(value, np.ndarray) and value.size and bool((value == value.flat[0]).all()):
            value = value.flat[0].item()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _MISSING, *, low: float = 0.0) -> float:
        """A finite number, at least ``low``."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "a number")
        if not math.isfinite(value) or value < low:
            raise self._wrong(key, value, f"a finite number of at least {low}")
        return float(value)

    def positive(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        value = self.number(key, default)
        if value <= 0.0:
            raise self._wrong(key, value, "a number above 0")
        return value

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self._source}: {self._prefix}{key} is {str(value)[:80]!r}, expected {expected}"
        )
