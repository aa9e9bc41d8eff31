"""Random strings and numbers, for names and jitter; not for secrets' sake, but fit for them."""

from __future__ import annotations

import secrets
import string

from sagellm.errors import InvalidArgumentError

_ALPHABET = string.ascii_letters + string.digits


def randstr(length: int = 16) -> str:
    """Return `length` random letters and digits, from the system's secure source."""
    if length < 0:
        raise InvalidArgumentError(f"length is {length}: give a number >= 0")
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def randint(low: int = 0, high: int = 2**31 - 1) -> int:
    """Return a random whole number, both ends included, from the system's secure source."""
    if high < low:
        raise InvalidArgumentError(f"no number lies between {low} and {high}: give low <= high")
    return low + secrets.randbelow(high - low + 1)


async def arandstr(length: int = 16) -> str:
    """Return `randstr(length)`; never waits."""
    return randstr(length)


async def arandint(low: int = 0, high: int = 2**31 - 1) -> int:
    """Return `randint(low, high)`; never waits."""
    return randint(low, high)
