"""Errors as clients see them, in OpenAI's and in Anthropic's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagellm.errors import (
    InvalidArgumentError,
    ModelNotFoundError,
    QueueFullError,
    ResourceExhaustedError,
    SagellmError,
    UnavailableError,
    UnsupportedError,
)
from sagellm.protocol import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sagellm.engine.request import Failure

RETRY_SOON_S = 1
RETRY_LATER_S = 5

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: HTTP status.
        message: What was wrong and what to do; no secrets, no paths.
        type: OpenAI's kind of error; follows from the status if not given.
        code: A word for programs; follows from the status if not given.
        param: The field at fault.
        retry_after_s: Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _OPENAI_TYPES.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.code = code or _CODES.get(status)
        self.param = param
        self.retry_after_s = retry_after_s

    @classmethod
    def from_error(cls, error: SagellmError) -> ApiError:
        """The answer to an error that was raised on purpose; 500 without details for others."""
        message = str(error)
        if isinstance(error, QueueFullError):
            return cls(429, message, code="queue_full", retry_after_s=RETRY_SOON_S)
        if isinstance(error, ResourceExhaustedError):  # it could never run here: no use to retry
            return cls(400, message, code="resource_exhausted")
        if isinstance(error, InvalidArgumentError):
            return cls(400, message, code="invalid_value")
        if isinstance(error, UnsupportedError):
            return cls(400, message, code="unsupported")
        if isinstance(error, ModelNotFoundError):
            return cls(404, message, code="model_not_found")
        if isinstance(error, UnavailableError):
            return cls(503, message, retry_after_s=RETRY_LATER_S)
        return cls.internal()

    @classmethod
    def from_failure(cls, failure: Failure) -> ApiError:
        """The answer to a request that failed inside the engine."""
        status, code = failure.code.http_status, failure.code.value
        if failure.code is ErrorCode.NOT_IMPLEMENTED:
            status, code = 400, "unsupported"
        retry = RETRY_SOON_S if failure.retryable and status in (429, 503) else None
        return cls(status, failure.message, code=code, retry_after_s=retry)

    @classmethod
    def internal(cls) -> ApiError:
        """A fault of the server; what it was stands in its log, under the request's id."""
        return cls(500, "the server failed on this request; its log tells why, by request id")

    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def openai(self, request_id: str | None = None) -> dict[str, Any]:
        """The body in OpenAI's shape; a server fault's message names the request."""
        return {
            "error": {
                "message": self._message(request_id),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self, request_id: str | None = None) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        default = "invalid_request_error" if self.status < 500 else "api_error"
        message = self._message(request_id)
        if self.param and self.param not in message:  # this shape has no place of its own for it
            message = f"{self.param}: {message}"
        kind = _ANTHROPIC_TYPES.get(self.status, default)
        body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message}}
        if request_id is not None:
            body["request_id"] = request_id
        return body

    def body(self, path: str, request_id: str | None = None) -> dict[str, Any]:
        """The body in the shape of the API that ``path`` belongs to."""
        shape = self.anthropic if is_anthropic(path) else self.openai
        return shape(request_id)

    def _message(self, request_id: str | None) -> str:
        if self.status == 500 and request_id is not None:
            return f"{self.message} ({request_id})"
        return self.message


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def describe_validation(
    errors: list[Mapping[str, Any]], body: Any = None
) -> tuple[str, str | None]:
    """One message and the field of the first problem, from pydantic's list of problems.

    Args:
        errors: ``loc`` and ``msg`` of each; values that were sent do not enter the message.
        body: What was checked, if at hand: tells fields from the tags of unions.
    """
    shown = []
    first: str | None = None
    for problem in errors[:8]:
        loc = [part for part in problem["loc"] if part != "body"]
        if body is not None:
            loc = _fields(loc, body, is_missing=problem.get("type") == "missing")
        place = ".".join(map(_short, loc))
        text = str(problem["msg"]).removeprefix("Value error, ")
        if problem.get("type") == "extra_forbidden":
            text = "this field is not supported; leave it out"
        if first is None and place:
            first = place
        shown.append(f"{place}: {text}" if place else text)
    if len(errors) > 8:
        shown.append(f"and {len(errors) - 8} more")
    return "; ".join(shown), first


def _fields(loc: list[Any], body: Any, *, is_missing: bool) -> list[Any]:
    """A place without the tags of unions, which pydantic writes between the names of fields."""
    fields, value = [], body
    for part in loc[:-1] if is_missing else loc:
        is_field = part in value if isinstance(value, dict) else isinstance(part, int)
        if is_field:
            value = value[part]
            fields.append(part)
    return [*fields, *loc[-1:]] if is_missing else fields


def _short(part: object) -> str:
    text = str(part)
    return text if len(text) <= 64 else f"{text[:64]}..."
