"""Protocol v0.1: the contract between the parts of sagellm, and between sagellm and its users.

Times are milliseconds (timestamps: Unix seconds), rates tokens per second, memory MB, ratios
0 to 1. Fields are frozen: they keep name, type, constraint and meaning; additions are optional.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagellm.lazy_names import load_name
from sagellm.protocol.errors import Error, ErrorCode
from sagellm.protocol.limits import LIMITS, Limits
from sagellm.protocol.sampling import ResponseFormat, SamplingParams
from sagellm.protocol.timestamps import Timestamps
from sagellm.protocol.types import (
    FinishReason,
    Message,
    Metrics,
    Request,
    Response,
    StreamEvent,
    StreamEventDelta,
    StreamEventEnd,
    StreamEventStart,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from sagellm.protocol.kv_hooks import (
        KVAllocateParams,
        KVDType,
        KVEvictReason,
        KVHandle,
        KVHooks,
        KVLayout,
        KVMigrateParams,
    )

PROTOCOL_VERSION = "0.1"

__all__ = [
    "LIMITS",
    "PROTOCOL_VERSION",
    "Error",
    "ErrorCode",
    "FinishReason",
    "KVAllocateParams",
    "KVDType",
    "KVEvictReason",
    "KVHandle",
    "KVHooks",
    "KVLayout",
    "KVMigrateParams",
    "Limits",
    "Message",
    "Metrics",
    "Request",
    "Response",
    "ResponseFormat",
    "SamplingParams",
    "StreamEvent",
    "StreamEventDelta",
    "StreamEventEnd",
    "StreamEventStart",
    "Timestamps",
    "TokenLogprobs",
]

_HOMES = {name: "sagellm.protocol.kv_hooks" for name in __all__ if name.startswith("KV")}


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
