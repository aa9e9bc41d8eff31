"""sagellm: an LLM inference engine. See ``sagellm.LLM`` for a start.

Names load on first use, so that ``import sagellm.protocol`` costs pydantic alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sagellm.lazy_names import load_name

if TYPE_CHECKING:
    from sagellm import errors, protocol
    from sagellm.engine.async_engine import AsyncEngine
    from sagellm.engine.config import EngineConfig
    from sagellm.engine.engine import Engine
    from sagellm.engine.llm import LLM, logits, new_request
    from sagellm.errors import (
        CorruptFileError,
        DeviceUnavailableError,
        InvalidArgumentError,
        ModelNotFoundError,
        ResourceExhaustedError,
        SagellmError,
        UnavailableError,
        UnsupportedError,
    )

_HOMES = {
    "LLM": "sagellm.engine.llm",
    "logits": "sagellm.engine.llm",
    "new_request": "sagellm.engine.llm",
    "AsyncEngine": "sagellm.engine.async_engine",
    "Engine": "sagellm.engine.engine",
    "EngineConfig": "sagellm.engine.config",
    "CorruptFileError": "sagellm.errors",
    "DeviceUnavailableError": "sagellm.errors",
    "InvalidArgumentError": "sagellm.errors",
    "ModelNotFoundError": "sagellm.errors",
    "ResourceExhaustedError": "sagellm.errors",
    "SagellmError": "sagellm.errors",
    "UnavailableError": "sagellm.errors",
    "UnsupportedError": "sagellm.errors",
    "errors": "sagellm.errors",
    "protocol": "sagellm.protocol",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CorruptFileError",
    "DeviceUnavailableError",
    "Engine",
    "EngineConfig",
    "InvalidArgumentError",
    "ModelNotFoundError",
    "ResourceExhaustedError",
    "SagellmError",
    "UnavailableError",
    "UnsupportedError",
    "errors",
    "logits",
    "new_request",
    "protocol",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        version = importlib.import_module("importlib.metadata").version("sagellm")
        globals()[name] = version
        return version
    return load_name(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
