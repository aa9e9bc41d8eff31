"""What the OpenAPI document says beyond the routes: error answers and API keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from sagellm.gateway.errors import is_anthropic
from sagellm.gateway.middleware import OPEN_PATHS
from sagellm.serving import HTTPMethod, RouterDef

if TYPE_CHECKING:
    from fastapi import FastAPI

_ERRORS = {
    400: "The request is not valid, or asks for what this server cannot do",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not JSON, or is compressed",
    421: "The Host header is no name of this server",
    429: "The queue is full; Retry-After tells when to try again",
    431: "The headers are too large",
    500: "The server failed; its log has the request's id",
    503: "The server is shutting down or its engine has ended; Retry-After tells when to try again",
    504: "The answer took longer than the request's or the server's time limit",
}
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_WITHOUT_BODY = (400, 401, 404, 421, 429, 431, 500, 503, 504)


class OpenAiErrorDetail(BaseModel):
    """What went wrong and what to do; ``param`` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiErrorResponse(BaseModel):
    """Every error answer outside of Anthropic's API."""

    error: OpenAiErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong and what to do."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """Every error answer of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None = None


def error_responses(group: str, route: RouterDef) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, as FastAPI documents them."""
    path = f"/{group}/{route.path}".rstrip("/")
    model = AnthropicErrorResponse if is_anthropic(path) else OpenAiErrorResponse
    has_body = route.method not in (HTTPMethod.GET, HTTPMethod.DELETE)
    return {
        status: {"model": model, "description": text}
        for status, text in _ERRORS.items()
        if has_body or status in _WITHOUT_BODY
    }


def describe_api(app: FastAPI, *, has_keys: bool, public: bool) -> None:
    """Lets the document of ``app`` tell what the middlewares and the exception handler do.

    Args:
        app: With all routes.
        has_keys: API keys are on.
        public: ``/metrics`` needs none.
    """
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            _drop_unused_validation(document)
            _drop_unknown_bodies(document)
            _write_whole_bounds(document)
            if has_keys:
                _require_keys(document, OPEN_PATHS | ({"/metrics"} if public else set()))
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the place FastAPI has for it


def _drop_unused_validation(document: dict[str, Any]) -> None:
    """Takes out FastAPI's 422: validation errors are 400 here."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    schemas = document.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _drop_unknown_bodies(document: dict[str, Any]) -> None:
    """Takes out FastAPI's JSON without a schema where a route says what its body really is."""
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation["responses"].get("200", {}).get("content", {})
            if len(content) > 1 and not content.get("application/json", {}).get("schema", True):
                del content["application/json"]


def _write_whole_bounds(part: Any) -> None:
    """Writes bounds as integers where they are: FastAPI's 1.8446744073709552e+19 is not 2**64."""
    if isinstance(part, list):
        for item in part:
            _write_whole_bounds(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in _BOUNDS and isinstance(value, float) and value.is_integer():
                part[key] = int(value)
            else:
                _write_whole_bounds(value)


def _require_keys(document: dict[str, Any], open_paths: frozenset[str] | set[str]) -> None:
    document.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in document["paths"].items():
        if path not in open_paths:
            for operation in operations.values():
                operation["security"] = [{"bearer": []}, {"apiKey": []}]
