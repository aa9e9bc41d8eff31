"""Bodies and events as bytes, and errors that happen once an answer has begun."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from sagellm.errors import SagellmError
from sagellm.gateway.errors import ApiError

if TYPE_CHECKING:
    from sagellm.gateway.context import RequestContext

logger = logging.getLogger(__name__)

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Compact ASCII JSON; raises ``ValueError`` on NaN and infinities, which JSON has not."""


def json_response(body: dict[str, Any]) -> Response:
    """A finished body, past any further validation."""
    return Response(encode(body).encode(), media_type="application/json")


def event(kind: str, body: dict[str, Any]) -> str:
    """A named server-sent event."""
    return f"event: {kind}\ndata: {encode(body)}\n\n"


_EVENT_SCHEMA = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def stream_responses(ending: str) -> dict[int | str, dict[str, Any]]:
    """Documents that a route also answers with a stream; the schema is that of each event.

    Args:
        ending: The events that a stream ends with.
    """
    return {
        200: {
            "description": f"The whole answer, or events that end with {ending}",
            "content": {"text/event-stream": {"schema": _EVENT_SCHEMA}},
        }
    }


def stream_error(error: Exception, context: RequestContext) -> ApiError:
    """What a client is told when a stream breaks; an unexpected error is logged in full."""
    if isinstance(error, ApiError):
        answer = error
    elif isinstance(error, SagellmError):
        answer = ApiError.from_error(error)
    else:
        answer = ApiError.internal()
    if answer.status == 500:
        logger.error("%s failed while streaming", context.request_id, exc_info=error)
    context.error = answer.code
    return answer
