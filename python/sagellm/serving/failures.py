"""Errors as answers: one JSON shape, true status codes, no internals."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import pydantic_core
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response

from sagellm import errors

ExceptionHandler = Callable[[Any, Exception], "Response | Awaitable[Response | None] | None"]

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request",
    401: "authentication",
    403: "permission",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "rate_limit",
    500: "internal",
    503: "unavailable",
    504: "timeout",
}
# The first class that fits decides.
_STATUS: tuple[tuple[type[errors.SagellmError], int], ...] = (
    (errors.InvalidArgumentError, 400),
    (errors.UnsupportedError, 400),
    (errors.ModelNotFoundError, 404),
    (errors.ResourceExhaustedError, 503),
    (errors.DeviceUnavailableError, 503),
    (errors.UnavailableError, 503),
)


class ErrorResponse(BaseModel):
    """The body of every answer that is an error."""

    message: str = Field(description="What went wrong, and what to do about it.")
    type: str = Field(description="A name for programs, for example invalid_request.")


def describe(error: Exception) -> tuple[int, str, str]:
    """Return the HTTP status, message and type of `error`; nothing of an unexpected one."""
    if isinstance(error, HTTPException):
        detail = error.detail
        text = detail if isinstance(detail, str) else pydantic_core.to_json(detail).decode()
        return error.status_code, text, _TYPES.get(error.status_code, "error")
    if isinstance(error, RequestValidationError):
        return 422, "; ".join(map(_one_problem, error.errors())), _TYPES[422]
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return status, str(error), _TYPES[status]
    return 500, "Internal error: the server's log has it under this answer's trace id", _TYPES[500]


def _one_problem(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem.get("loc", ()))
    return f"{place}: {problem.get('msg', 'invalid')}" if place else str(problem.get("msg"))


def format_error_response(error: Exception | str, error_type: str | None = None) -> dict[str, str]:
    """Return the body of an error answer: `{"message": ..., "type": ...}`.

    Args:
        error: an exception, or the message itself.
        error_type: overrides the type found for an exception; "error" for a message without one.
    """
    if isinstance(error, str):
        return {"message": error, "type": error_type or "error"}
    _, message, found = describe(error)
    return {"message": message, "type": error_type or found}


class ErrorRenderer:
    """Turns exceptions into responses, asking the service's own handler first."""

    def __init__(self, handler: ExceptionHandler | None = None) -> None:
        self._handler = handler

    async def response(self, connection: HTTPConnection, error: Exception) -> Response:
        """Return the answer for `error`; never raises."""
        if self._handler is not None:
            try:
                answer = self._handler(connection, error)
                if inspect.isawaitable(answer):
                    answer = await answer
            except Exception:
                logger.exception("the exception handler failed on %r", error)
            else:
                if answer is not None:
                    return answer
        status, _, _ = describe(error)
        if status == 500:
            logger.error("%s failed", connection.url.path, exc_info=error)
        body = pydantic_core.to_json(format_error_response(error))
        if status in (204, 304) or status < 200:
            body = b""
        headers = getattr(error, "headers", None) if isinstance(error, HTTPException) else None
        return Response(body, status, headers, "application/json")

    async def event(self, connection: HTTPConnection, error: Exception) -> dict[str, Any]:
        """Return `error` as the object of a stream's last event: `{"error": {...}}`."""
        response = await self.response(connection, error)
        try:
            body = pydantic_core.from_json(bytes(response.body))
        except ValueError:
            body = format_error_response(HTTPStatus(response.status_code).phrase)
        return body if isinstance(body, dict) and "error" in body else {"error": body}
