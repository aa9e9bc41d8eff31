"""What a handler receives as `query`: the JSON body, or the query parameters."""

from __future__ import annotations

from typing import Any

import pydantic_core
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

_BODYLESS = frozenset({"GET", "HEAD", "DELETE"})


def parse_object(data: bytes | str, what: str = "body") -> dict[str, Any]:
    """Parse a JSON object.

    Refuses what strict JSON refuses: NaN and infinities, lone surrogates, nesting without end.

    Raises:
        HTTPException: 400 with the place of the fault, or because it is no object.
    """
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"The {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
        found = kind.get(type(value), "a number")
        raise HTTPException(400, f"The {what} must be a JSON object, but it is {found}")
    return value


def validate(model: type[BaseModel], values: dict[str, Any], place: str) -> BaseModel:
    """Validate `values`; a RequestValidationError names every wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [{**p, "loc": (place, *p["loc"])} for p in error.errors(include_url=False)]
        raise RequestValidationError(problems, body=values) from error


async def read_query(request: Request, model: type[BaseModel] | None) -> Any:
    """Return the handler's `query`: an instance of `model`, or a dict without one.

    A dict also has the route's path parameters. A query parameter given twice is a list.
    """
    if request.method in _BODYLESS:
        values = _query_parameters(request)
        place = "query"
    else:
        values = await _json_body(request, required=model is not None)
        place = "body"
    if model is not None:
        return validate(model, values, place)
    if request.path_params:
        values.update(request.path_params)
    return values


def _query_parameters(request: Request) -> dict[str, Any]:
    parameters = request.query_params
    values: dict[str, Any] = dict(parameters)
    if len(values) != len(parameters.multi_items()):
        for name in values:
            given = parameters.getlist(name)
            values[name] = given if len(given) > 1 else given[0]
    return values


async def _json_body(request: Request, *, required: bool) -> dict[str, Any]:
    _check_content_type(request)
    body = await request.body()
    if body or required:
        return parse_object(body)
    return {}


def _check_content_type(request: Request) -> None:
    """Refuse what a foreign web page can post without asking: that is never marked as JSON."""
    given = request.headers.get("content-type")
    if given is None:
        if "origin" not in request.headers:
            return
    elif (kind := given.split(";", 1)[0].strip().lower()) == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        return
    message = f"The content type {given or '(none)'} is not supported: send application/json"
    raise HTTPException(415, message)


def limit_body(request: Request, max_bytes: int) -> Request:
    """Return `request` with a body that ends in a 413 as soon as it is larger than `max_bytes`."""
    if request.method in _BODYLESS:
        return request
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            if size > max_bytes:
                raise HTTPException(413, f"The body is larger than {max_bytes} bytes")
        return message

    return Request(request.scope, receive)
