"""The life of KV memory as seen from outside the engine."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Protocol

from pydantic import Field

from sagellm.protocol._model import Count, NonEmpty, PositiveInt, ProtocolModel

DEVICE_PATTERN = r"^[a-z][a-z0-9_]*(:[0-9]+)?$"
"""A device kind, optionally with an index: ``cpu``, ``cuda:0``, ``npu:0``."""


class KVDType(str, Enum):
    """Element type of cached keys and values."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"


class KVLayout(str, Enum):
    """Axis order: b batch, s sequence, h heads, d head dimension."""

    BSHD = "bshd"
    BHSD = "bhsd"


class KVEvictReason(str, Enum):
    """Why KV memory was taken back."""

    MEMORY_PRESSURE = "memory_pressure"
    TTL_EXPIRED = "ttl_expired"
    EXPLICIT_FREE = "explicit_free"


class KVAllocateParams(ProtocolModel):
    """What to allocate: room for ``num_tokens`` tokens in blocks of ``block_size``."""

    request_id: NonEmpty
    num_tokens: PositiveInt
    kv_dtype: Annotated[KVDType, Field(strict=False)]
    layout: Annotated[KVLayout, Field(strict=False)]
    block_size: PositiveInt


class KVHandle(ProtocolModel):
    """Names KV memory on one device; ``num_tokens`` tokens are in it."""

    handle_id: NonEmpty
    request_id: NonEmpty
    num_tokens: Count
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)]


class KVMigrateParams(ProtocolModel):
    """Moves a handle's memory to another device."""

    kv_handle: KVHandle
    target_device: Annotated[str, Field(pattern=DEVICE_PATTERN)]


class KVHooks(Protocol):
    """The verbs. An unknown, stale or already freed handle is an error that names it."""

    def allocate(self, params: KVAllocateParams) -> KVHandle:
        """Reserves memory, all or nothing."""

    def free(self, handle: KVHandle) -> None:
        """Gives memory back."""

    def evict(self, handle: KVHandle, reason: KVEvictReason) -> None:
        """Takes memory back from its owner."""

    def migrate(self, params: KVMigrateParams) -> KVHandle:
        """Copies to the target device, frees the source and returns the new handle."""
