"""Errors as they travel between parts and to users."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field

from sagellm.protocol._model import NonEmpty, ProtocolModel


class ErrorCode(str, Enum):
    """What kind of failure; ``http_status`` is its HTTP form."""

    INVALID_ARGUMENT = "invalid_argument"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    NOT_IMPLEMENTED = "not_implemented"
    KV_INVALID_HANDLE = "kv_invalid_handle"
    KV_DOUBLE_FREE = "kv_double_free"
    KV_TRANSFER_FAILED = "kv_transfer_failed"
    KV_CHECKSUM_MISMATCH = "kv_checksum_mismatch"
    COMM_TIMEOUT = "comm_timeout"
    COMM_ABORTED = "comm_aborted"

    @property
    def http_status(self) -> int:
        """The status that answers a request which failed with this code."""
        return _HTTP_STATUS[self]


_HTTP_STATUS = {
    ErrorCode.INVALID_ARGUMENT: 400,
    ErrorCode.RESOURCE_EXHAUSTED: 429,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.NOT_IMPLEMENTED: 501,
    ErrorCode.KV_INVALID_HANDLE: 400,
    ErrorCode.KV_DOUBLE_FREE: 400,
    ErrorCode.KV_TRANSFER_FAILED: 503,
    ErrorCode.KV_CHECKSUM_MISMATCH: 503,
    ErrorCode.COMM_TIMEOUT: 504,
    ErrorCode.COMM_ABORTED: 503,
}


class Error(ProtocolModel):
    """A failure, explained.

    Attributes:
        code: An ``ErrorCode`` or its wire name.
        message: What was wrong and what to do; no secrets, no paths.
        retryable: Whether the same request may succeed later; None when unknown.
    """

    code: Annotated[ErrorCode, Field(strict=False)]
    message: NonEmpty
    retryable: bool | None = None
