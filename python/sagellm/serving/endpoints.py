"""The HTTP side of a route: from a request to `query`, the handler, and its answer."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pydantic_core
from fastapi.exceptions import ResponseValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sagellm.serving.calls import BoundHandler
from sagellm.serving.failures import ErrorRenderer
from sagellm.serving.interruption import TimeLimit, deadline_in
from sagellm.serving.queries import limit_body, read_query
from sagellm.serving.routes import RouterConfig, RouterDef, RouterKind
from sagellm.serving.streaming import ClientDisconnected, EventStream, until_disconnect
from sagellm.serving.tracing import (
    TRACE_HEADER,
    accept_trace_id,
    current_trace_id,
    generate_trace_id,
)

DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499  # never sent: nobody is there to read it
_END: Any = object()
_NOT_YET: Any = object()

logger = logging.getLogger(__name__)


def encode_json(value: Any) -> bytes:
    """Encode a handler's result; NaN and infinities, which JSON lacks, become null."""
    return pydantic_core.to_json(value, inf_nan_mode="null")


def encode_event(item: Any) -> bytes:
    """Encode an item as a server-sent event; text stays text, bytes are taken as ready-made."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        lines = item.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
    return b"data: " + encode_json(item) + b"\n\n"


async def close(iterator: Any) -> None:
    """Close an iterator, if it has an `aclose`."""
    if (aclose := getattr(iterator, "aclose", None)) is not None:
        await aclose()


class Endpoint:
    """Answers the requests of one route."""

    def __init__(
        self, route: RouterDef, config: RouterConfig, handler: BoundHandler, errors: ErrorRenderer
    ) -> None:
        self._route = route
        self._config = config
        self._handler = handler
        self._errors = errors
        self._timeout = config.seconds(route)
        model = route.response_model
        self._adapter = None if model is None else TypeAdapter(model)

    async def __call__(self, request: Request) -> Response:
        """Answer one request; every failure is an answer too."""
        request = limit_body(request, self._config.max_body_bytes)
        state = request.scope.setdefault("state", {})
        given = state.get("trace_id") or accept_trace_id(request.headers.get(TRACE_HEADER))
        state["trace_id"] = given or generate_trace_id()
        current_trace_id.set(state["trace_id"])
        try:
            response = await self._answer(request, given)
        except (ClientDisconnect, ClientDisconnected):
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception as error:
            response = await self._errors.response(request, error)
        response.headers.setdefault(TRACE_HEADER, state["trace_id"])
        return response

    async def _answer(self, request: Request, given_trace_id: str | None) -> Response:
        query: Any = _NOT_YET
        deadline = deadline_in(self._timeout)
        with TimeLimit(deadline):
            query = await read_query(request, self._route.request_model)
            self._settle_trace_id(request, query, given_trace_id)
            if self._route.kind is RouterKind.SSE:
                return await self._stream(query, request, deadline)
            return self._response(await self._handler.result(query, request))
        if query is _NOT_YET:
            raise HTTPException(408, f"The request did not arrive within {self._timeout:g} s")
        raise self.too_late()

    def too_late(self) -> HTTPException:
        """Return the error of a handler that took too long."""
        return HTTPException(504, f"The answer was not ready within {self._timeout:g} s")

    def _settle_trace_id(self, request: Request, query: Any, given: str | None) -> None:
        """Take the id from the header, else from the query; show it to a handler with a dict."""
        state = request.scope["state"]
        if isinstance(query, dict):
            if given is None and (own := accept_trace_id(query.get("trace_id"))) is not None:
                state["trace_id"] = own
                current_trace_id.set(own)
            query.setdefault("trace_id", state["trace_id"])

    def _response(self, result: Any) -> Response:
        if isinstance(result, Response):
            return result
        if self._adapter is not None:
            try:
                result = self._adapter.validate_python(result)
            except ValidationError as error:
                raise ResponseValidationError(error.errors(), body=result) from error
            body = self._adapter.dump_json(result, by_alias=True)
        elif isinstance(result, BaseModel):
            body = result.model_dump_json(by_alias=True).encode()
        else:
            body = encode_json(result)
        return Response(body, media_type="application/json")

    async def _stream(self, query: Any, request: Request, deadline: float | None) -> Response:
        """Await the first item, so that a failure before it has its true status."""
        items = await until_disconnect(request, self._handler.items(query, request))
        if isinstance(items, Response):
            return items
        if not isinstance(items, AsyncIterator):
            items = _only(items)
        try:
            first = await until_disconnect(request, anext(items, _END))
        except BaseException:
            await close(items)
            raise
        events = _Events(self, request, first, items, deadline)
        return EventStream(events, headers=self._config.sse_headers)

    async def error_event(self, request: Request, error: Exception) -> bytes:
        """Encode `error` as the last event of a stream."""
        return (
            b"event: error\ndata: "
            + encode_json(await self._errors.event(request, error))
            + b"\n\n"
        )


async def _only(item: Any) -> AsyncIterator[Any]:
    yield item


class _Events:
    """The encoded events of a stream: its items, then `[DONE]`, or one error event."""

    def __init__(
        self,
        endpoint: Endpoint,
        request: Request,
        first: Any,
        items: AsyncIterator[Any],
        deadline: float | None,
    ) -> None:
        self._endpoint = endpoint
        self._request = request
        self._next = first
        self._items = items
        self._deadline = deadline
        self._over = False

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        try:
            item, self._next = self._next, _NOT_YET
            if item is _NOT_YET:
                item = await self._await_next()
            if item is not _END:
                return encode_event(item)
        except Exception as error:
            self._over = True
            return await self._endpoint.error_event(self._request, error)
        self._over = True
        return DONE

    async def aclose(self) -> None:
        await close(self._items)

    async def _await_next(self) -> Any:
        with TimeLimit(self._deadline):
            return await anext(self._items, _END)
        raise self._endpoint.too_late()
