"""Answers that end when their client goes away: event streams, and single answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sagellm.serving.interruption import DisconnectWatch

SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_T = TypeVar("_T")


class ClientDisconnected(Exception):
    """The client went away before its answer was ready; nobody is left to read an error."""


class EventStream(Response):
    """A streaming answer of ready-made server-sent events, one `send` per chunk and nothing more.

    When the client goes away, the iterator is cancelled at the point where it waits. However the
    stream ends, `chunks.aclose()` (where there is one) and then `on_close` are called, once.

    Args:
        chunks: encoded events, each ended by a blank line. It must not fail: turn an error into an
            error event. If it does fail, the connection is cut so that the client sees a broken
            stream.
        on_close: releases what the stream holds, for example by cancelling its request.
        headers: added to the defaults (no caching, no proxy buffering) or replacing them.
        status_code: the HTTP status.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None] | None = None,
        headers: Mapping[str, str] | None = None,
        status_code: int = 200,
    ) -> None:
        self.status_code = status_code
        self.background = None
        self.init_headers({**SSE_HEADERS, **{k.lower(): v for k, v in (headers or {}).items()}})
        self._chunks = chunks
        self._on_close = on_close

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Set the headers of a body whose length is unknown."""
        values = {"content-type": "text/event-stream; charset=utf-8", **(headers or {})}
        self.raw_headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in values.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream: the ASGI interface."""
        try:
            with DisconnectWatch(receive) as watch:
                await self._send_all(send, watch)
        finally:
            try:
                await self.aclose()
            finally:
                if self.background is not None:
                    await self.background()

    async def aclose(self) -> None:
        """Close the iterator and call `on_close`; harmless when repeated."""
        on_close, self._on_close = self._on_close, None
        close = getattr(self._chunks, "aclose", None)
        try:
            if close is not None:
                await close()
        finally:
            if on_close is not None:
                on_close()

    async def _send_all(self, send: Send, watch: DisconnectWatch) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        async for chunk in self._chunks:
            if watch.fired:  # the iterator caught its cancellation and went on
                return
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(request: Request, work: Awaitable[_T]) -> _T:
    """Await `work`, or cancel it when the client goes away.

    Read the request's body first: what is left of it is dropped here.

    Raises:
        ClientDisconnected: the client went away. The server ends the request without an answer.
    """
    with DisconnectWatch(request.receive) as watch:
        result = await work
    if watch.fired:
        raise ClientDisconnected
    return result
