"""What is known of a request besides its body."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

SCOPE_KEY = "sagellm.context"

_LABEL = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """One HTTP request; the middleware makes it, those behind it add what they learn.

    Attributes:
        request_id: Made by the server; what abort and logs go by.
        trace_id: From ``traceparent`` or ``X-Trace-Id``, else made by the server.
        client_request_id: The client's ``X-Request-Id``: a label, never a key.
        traceparent: The W3C header as it came, for tracing.
        arrived_at: Unix seconds.
        started_at: Seconds of ``time.perf_counter``, for durations.
        method, route: Of the HTTP request; ``route`` is the path without its query.
        pattern: The route's path as it was declared; None if no route was found.
        client: Address of the peer, empty on a Unix socket.
        key_number: Which API key was used, from 1; None without keys.
        model: The model that was asked for, as far as known.
        num_completions: For the engine to make; see ``fair_share``.
        num_prompt_tokens, num_output_tokens, num_cached_tokens: Sums over the engine's requests.
        finish_reasons: One per completion that ended.
        prompt: Its beginning, only if prompts are logged.
        status: Of the answer; 0 before it.
        error: Code of an error answer, or why the answer broke off.
    """

    request_id: str
    trace_id: str
    client_request_id: str | None = None
    traceparent: str | None = None
    arrived_at: float = field(default_factory=time.time)
    started_at: float = field(default_factory=time.perf_counter)
    method: str = ""
    route: str = ""
    pattern: str | None = None
    client: str = ""
    key_number: int | None = None
    model: str | None = None
    num_completions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    prompt: str | None = None
    status: int = 0
    error: str | None = None


def new_context(
    *,
    method: str = "",
    route: str = "",
    client: str = "",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> RequestContext:
    """Makes the context of an arriving request.

    Args:
        method: Of the request.
        route: Its path without the query.
        client: Address of the peer.
        headers: As ASGI gives them. A label that is too long or not printable ASCII is dropped.
    """
    label = trace = parent = None
    for name, value in headers:
        if name == b"x-request-id":
            label = _label(value)
        elif name == b"x-trace-id":
            trace = _label(value)
        elif name == b"traceparent":
            parent = _label(value)
    match = _TRACEPARENT.fullmatch(parent) if parent else None
    if match is None:
        parent = None
    elif trace is None:
        trace = match[1]
    return RequestContext(
        request_id=f"req-{uuid.uuid4().hex}",
        trace_id=trace or uuid.uuid4().hex,
        client_request_id=label,
        traceparent=parent,
        method=method,
        route=route,
        client=client,
    )


def context_of(request: HTTPConnection) -> RequestContext:
    """The context that the middleware made for a request."""
    context = request.scope[SCOPE_KEY]
    assert isinstance(context, RequestContext)
    return context


def _label(value: bytes) -> str | None:
    text = value.decode("latin-1")
    return text if _LABEL.fullmatch(text) else None
