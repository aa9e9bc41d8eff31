"""The serving SDK: handlers become an HTTP service on FastAPI and uvicorn.

See docs/serving-sdk.md.
"""

from __future__ import annotations

from sagellm.serving.environment import (
    ApiEnv,
    AppEnv,
    DeviceEnv,
    Env,
    EnvGroup,
    EnvVar,
    LogEnv,
    ModelEnv,
    RegisterEnv,
    ServerEnv,
    StorageEnv,
    env,
)
from sagellm.serving.failures import ErrorResponse, ExceptionHandler, format_error_response
from sagellm.serving.lifecycle import Handler
from sagellm.serving.logs import Log, log
from sagellm.serving.routes import HTTPMethod, RouterConfig, RouterDef, RouterKind
from sagellm.serving.server import Server
from sagellm.serving.streaming import ClientDisconnected, EventStream, until_disconnect
from sagellm.serving.subprocesses import SubprocessManager
from sagellm.serving.tracing import TRACE_HEADER, generate_trace_id
from sagellm.serving.values import arandint, arandstr, randint, randstr

__all__ = [
    "TRACE_HEADER",
    "ApiEnv",
    "AppEnv",
    "ClientDisconnected",
    "DeviceEnv",
    "Env",
    "EnvGroup",
    "EnvVar",
    "ErrorResponse",
    "EventStream",
    "ExceptionHandler",
    "HTTPMethod",
    "Handler",
    "Log",
    "LogEnv",
    "ModelEnv",
    "RegisterEnv",
    "RouterConfig",
    "RouterDef",
    "RouterKind",
    "Server",
    "ServerEnv",
    "StorageEnv",
    "SubprocessManager",
    "arandint",
    "arandstr",
    "env",
    "format_error_response",
    "generate_trace_id",
    "log",
    "randint",
    "randstr",
    "until_disconnect",
]
