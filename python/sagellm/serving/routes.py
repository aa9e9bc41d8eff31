"""What a service declares: its routes and what they share."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from sagellm.errors import InvalidArgumentError

Handler = Callable[..., Any]


class RouterKind(str, enum.Enum):
    """How a route answers."""

    API = "api"
    SSE = "sse"
    WS = "ws"


class HTTPMethod(str, enum.Enum):
    """The HTTP method of a route; WebSocket routes have none."""

    GET = "GET"
    POST = "POST"
    PUT = "PUT"
    PATCH = "PATCH"
    DELETE = "DELETE"


def check_timeout(seconds: float | None, name: str) -> None:
    """Reject a limit that is no positive number of seconds."""
    if seconds is not None and not seconds > 0:
        raise InvalidArgumentError(f"{name} is {seconds}: give seconds > 0, or math.inf for none")


@dataclass(frozen=True, slots=True)
class RouterDef:
    """One route.

    Args:
        path: below the server's prefix and the group's name; empty for the group itself.
        handler: a function, coroutine function, generator or async generator. It gets `query`, and
            the Starlette request (or WebSocket) if it declares a parameter named `request`.
        kind: how it answers; a generator needs SSE or WS.
        method: its HTTP method.
        summary: one line for the OpenAPI document.
        timeout: seconds until 504, over the router configuration's; `math.inf` for none. Time until
            a single answer, or for the whole of an event stream or of one WebSocket message's
            answer.
        request_model: validates the JSON body (GET, DELETE: the query parameters) and documents it.
        response_model: validates what the handler returns, unless that is a `Response`, and
            documents it.
        responses: further answers for the OpenAPI document, by status, as FastAPI takes them.
        tags: groups in the OpenAPI document; the route group's name by default.
        description: longer text for the OpenAPI document.
        include_in_schema: whether the OpenAPI document shows the route.
    """

    path: str
    handler: Handler
    kind: RouterKind = RouterKind.API
    method: HTTPMethod = HTTPMethod.POST
    summary: str = ""
    timeout: float | None = None
    request_model: type[BaseModel] | None = None
    response_model: Any = None
    responses: Mapping[int | str, Mapping[str, Any]] | None = None
    tags: Sequence[str] = ()
    description: str = ""
    include_in_schema: bool = True

    def __post_init__(self) -> None:
        if not callable(self.handler):
            raise InvalidArgumentError(f"route {self.path!r}: the handler is not callable")
        object.__setattr__(self, "kind", RouterKind(self.kind))
        object.__setattr__(self, "method", HTTPMethod(self.method))
        check_timeout(self.timeout, f"timeout of route {self.path!r}")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """What all routes of a server share.

    Args:
        timeout: seconds for a route without its own; None or `math.inf` for none.
        sse_headers: headers of event streams, added to those against caching and proxy buffering.
        max_body_bytes: the largest request body, noticed while reading: 413 beyond it. A larger
            WebSocket message closes its connection.
        thread_concurrency: threads for sync handlers and sync generators; work beyond them waits.
    """

    timeout: float | None = 600.0
    sse_headers: Mapping[str, str] = field(default_factory=dict)
    max_body_bytes: int = 32 * 2**20
    thread_concurrency: int = 8

    def __post_init__(self) -> None:
        check_timeout(self.timeout, "RouterConfig.timeout")
        for name in ("max_body_bytes", "thread_concurrency"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(
                    f"RouterConfig.{name} is {getattr(self, name)}: give >= 1"
                )

    def seconds(self, route: RouterDef) -> float | None:
        """The time limit of `route`; None for none."""
        seconds = self.timeout if route.timeout is None else route.timeout
        return None if seconds is None or math.isinf(seconds) else seconds
