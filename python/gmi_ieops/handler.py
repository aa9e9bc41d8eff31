"""`sagellm.serving` under its original name: servers and routes."""

from sagellm.serving import (
    Handler,
    HTTPMethod,
    RouterConfig,
    RouterDef,
    RouterKind,
    Server,
    format_error_response,
    generate_trace_id,
)

__all__ = [
    "HTTPMethod",
    "Handler",
    "RouterConfig",
    "RouterDef",
    "RouterKind",
    "Server",
    "format_error_response",
    "generate_trace_id",
]
