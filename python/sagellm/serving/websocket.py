"""The WebSocket side of a route: JSON messages in, the handler's results out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.websockets import WebSocket, WebSocketDisconnect

from sagellm.serving.calls import BoundHandler
from sagellm.serving.endpoints import close, encode_json
from sagellm.serving.failures import ErrorRenderer
from sagellm.serving.interruption import TimeLimit, deadline_in
from sagellm.serving.queries import parse_object, validate
from sagellm.serving.routes import RouterConfig, RouterDef
from sagellm.serving.tracing import (
    TRACE_HEADER,
    accept_trace_id,
    current_trace_id,
    generate_trace_id,
)

MAX_WAITING_MESSAGES = 16

logger = logging.getLogger(__name__)


class WebSocketEndpoint:
    """Serves the connections of one route.

    Messages of a connection are answered one after the other; each is a JSON object and becomes the
    handler's `query`. A failure is answered by `{"error": {...}}` and the connection goes on. When
    the client leaves, the handler at work is cancelled and its generator closed.
    """

    def __init__(
        self, route: RouterDef, config: RouterConfig, handler: BoundHandler, errors: ErrorRenderer
    ) -> None:
        self._route = route
        self._handler = handler
        self._errors = errors
        self._timeout = config.seconds(route)

    async def serve(self, socket: WebSocket) -> None:
        """Serve one connection until its client leaves."""
        state = socket.scope.setdefault("state", {})
        given = state.get("trace_id") or accept_trace_id(socket.headers.get(TRACE_HEADER))
        trace_id = state["trace_id"] = given or generate_trace_id()
        await socket.accept(headers=[(TRACE_HEADER.lower().encode(), trace_id.encode())])
        waiting: asyncio.Queue[str | bytes] = asyncio.Queue(MAX_WAITING_MESSAGES)
        worker = asyncio.create_task(self._answer_all(socket, waiting))
        try:
            while (message := await socket.receive())["type"] == "websocket.receive":
                text = message.get("text")
                await self._enqueue(socket, waiting, message["bytes"] if text is None else text)
        finally:
            worker.cancel()
            await asyncio.wait([worker])
            if not worker.cancelled() and (error := worker.exception()) is not None:
                logger.error("%s failed", socket.url.path, exc_info=error)

    async def _enqueue(
        self, socket: WebSocket, waiting: asyncio.Queue[str | bytes], data: str | bytes
    ) -> None:
        if waiting.full():
            text = f"{MAX_WAITING_MESSAGES} messages wait already: read their answers first"
            await self._send_error(socket, HTTPException(429, text))
        else:
            waiting.put_nowait(data)

    async def _answer_all(self, socket: WebSocket, waiting: asyncio.Queue[str | bytes]) -> None:
        while True:
            data = await waiting.get()
            try:
                with TimeLimit(deadline_in(self._timeout)) as limit:
                    await self._answer(socket, data)
                if limit.fired:
                    raise HTTPException(504, f"The answer was not ready within {self._timeout:g} s")
            except WebSocketDisconnect:
                return
            except Exception as error:
                await self._send_error(socket, error)

    async def _answer(self, socket: WebSocket, data: str | bytes) -> None:
        query: Any = parse_object(data, "message")
        trace_id = accept_trace_id(query.get("trace_id")) or socket.scope["state"]["trace_id"]
        current_trace_id.set(trace_id)
        if self._route.request_model is not None:
            query = validate(self._route.request_model, query, "message")
        else:
            query.setdefault("trace_id", trace_id)
        items = await self._handler.items(query, socket)
        if not isinstance(items, AsyncIterator):
            await self._send(socket, items)
            return
        try:
            async for item in items:
                await self._send(socket, item)
        finally:
            await close(items)

    async def _send_error(self, socket: WebSocket, error: Exception) -> None:
        try:
            await self._send(socket, await self._errors.event(socket, error))
        except (WebSocketDisconnect, RuntimeError):
            logger.debug("the client left before its error frame", exc_info=True)

    @staticmethod
    async def _send(socket: WebSocket, item: Any) -> None:
        await socket.send_text(item if isinstance(item, str) else encode_json(item).decode())
