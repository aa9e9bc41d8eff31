"""What every request passes before its route: identity, admission, and its body. Pure ASGI.

The order, outermost first: ``ContextMiddleware`` (ids, access log, the last net for exceptions),
``AdmissionMiddleware`` (headers, API key, draining, fair share), ``BodyMiddleware`` (type, size and
time of the body, checked while reading).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import re
from typing import TYPE_CHECKING

from sagellm.gateway.context import SCOPE_KEY, RequestContext, new_context
from sagellm.gateway.errors import ApiError
from sagellm.gateway.hosts import host_filter
from sagellm.protocol import LIMITS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sagellm.gateway.access_log import AccessLog
    from sagellm.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})
"""Answered without an API key and while draining."""

CLIENT_CLOSED = 499
"""The status in logs of a request whose client left before the answer; never sent."""

_JSON_TYPE = re.compile(rb"application/[\w.-]+\+json")
_LINGER_S = 2.0
_SHORT_BODY = 64 * 1024  # bytes; no more is read for the sake of keeping a connection


class ContextMiddleware:
    """Gives each request its ids, logs it when it is over, and turns stray exceptions into 500."""

    def __init__(self, app: ASGIApp, gateway: Gateway, access_log: AccessLog | None) -> None:
        self._app = app
        self._gateway = gateway
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "websocket":  # no route speaks it
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        context = new_context(
            method=scope["method"],
            route=scope["path"],
            client=client[0] if client else "",
            headers=scope["headers"],
        )
        scope[SCOPE_KEY] = context
        scope.setdefault("state", {})["trace_id"] = context.trace_id  # where the SDK looks for it
        ids = [
            (b"x-request-id", context.request_id.encode()),
            (b"request-id", context.request_id.encode()),
            (b"x-trace-id", context.trace_id.encode()),
        ]
        is_complete = False

        async def send_with_ids(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                context.status = message["status"]
                own = {name for name, _ in ids}
                headers = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in own]
                message = {**message, "headers": [*headers, *ids]}
            elif not message.get("more_body", False):
                is_complete = True
            await send(message)

        if context.route not in OPEN_PATHS:
            self._gateway.at_hand[context.request_id] = context
        try:
            await self._serve(scope, receive, send_with_ids, context)
        finally:
            self._gateway.at_hand.pop(context.request_id, None)
            context.pattern = getattr(scope.get("route"), "path", None)
            context.status = context.status or CLIENT_CLOSED
            if not is_complete or context.status == CLIENT_CLOSED:
                context.error = context.error or "client_disconnected"
            self._gateway.metrics.http_finished(context)
            if self._access_log is not None:
                self._access_log.write(context)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, context: RequestContext
    ) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception:
            logger.exception("request %s failed", context.request_id)
            context.error = "internal_error"
            if context.status:
                raise  # an answer has begun: only breaking it off tells the client
            await send_error(scope, send, ApiError.internal())


class AdmissionMiddleware:
    """Refuses at once what may not or cannot be served now."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        config = gateway.config
        # Digests have one length, so that comparing tells nothing about a key's.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in config.api_keys]
        self._without_key = OPEN_PATHS | ({"/metrics"} if config.metrics_public else set())
        self._hosts = host_filter(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await send_error(scope, send, error, receive)
            return
        if scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        context: RequestContext = scope[SCOPE_KEY]
        try:
            self._gateway.share.enter(context)
        except ApiError as error:
            await send_error(scope, send, error, receive)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._gateway.share.leave(context)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if size > LIMITS.header_bytes:
            raise ApiError(431, f"the headers have {size} bytes; at most {LIMITS.header_bytes}")
        if self._hosts is not None:
            self._hosts.check(headers)
        if scope["path"] in self._without_key:
            return
        if self._digests:
            self._authenticate(scope)
        if scope["path"] not in OPEN_PATHS and scope["path"] != "/metrics":
            self._gateway.require_open()

    def _authenticate(self, scope: Scope) -> None:
        given = _api_key(scope["headers"])
        if given is None:
            raise ApiError(
                401,
                "no API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="missing_api_key",
            )
        digest = hashlib.sha256(given).digest()
        number = None
        for index, known in enumerate(self._digests, 1):  # all of them, whichever matches
            if hmac.compare_digest(digest, known):
                number = index
        if number is None:
            raise ApiError(401, "the API key is wrong; ask the server's operator for one")
        context: RequestContext = scope[SCOPE_KEY]
        context.key_number = number


class BodyMiddleware:
    """Reads the body within its limits before the route runs, so that no route can forget to."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._timeout_s = gateway.config.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request with its whole body, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = _content_length(headers)
        if length == 0 and b"transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        try:
            _check_type(headers)
            if length > LIMITS.body_bytes:
                raise _too_large()
            body = await asyncio.wait_for(_read(receive), self._timeout_s)
        except ApiError as error:
            await send_error(scope, send, error, receive)
            return
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self._timeout_s:g} seconds"
            await send_error(scope, send, ApiError(408, message), receive)
            return
        if body is None:
            return  # the client left
        waiting: list[bytes] = [body]
        del body

        async def replay() -> Message:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)


async def send_error(
    scope: Scope, send: Send, error: ApiError, receive: Receive | None = None
) -> None:
    """Answers with an error in the shape of the path's API.

    Args:
        scope: Of the request.
        send: Of the request.
        error: The answer.
        receive: Given when the body has not been read. If much of it may follow, the connection
            ends with this answer, after a pause in which the client can read it.
    """
    context: RequestContext = scope[SCOPE_KEY]
    context.error = context.error or error.code
    body = json.dumps(error.body(scope["path"], context.request_id)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(k.lower().encode(), v.encode()) for k, v in error.headers().items()]
    is_late = error.status == 408  # there is no use in waiting for the rest
    closes = receive is not None and (is_late or _has_long_body(dict(scope["headers"])))
    if closes:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": closes})
    if closes and receive is not None:
        patience = 0 if is_late else _LINGER_S
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), patience)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    """Reads the rest of a body, so that closing does not reset the connection under an answer."""
    left = LIMITS.body_bytes
    while left > 0:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        left -= len(message.get("body", b""))


def _has_long_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or _content_length(headers) > _SHORT_BODY


def _api_key(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and value:
            return value
    return None


def _content_length(headers: dict[bytes, bytes]) -> int:
    text = headers.get(b"content-length", b"0")
    return int(text) if text.isdigit() else 0  # the HTTP parser has refused others


def _check_type(headers: dict[bytes, bytes]) -> None:
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise ApiError(415, "compressed bodies are not supported; send the JSON as it is")
    given = headers.get(b"content-type")
    if given is None and b"origin" not in headers:  # a browser could post that without asking
        return
    kind = (given or b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not _JSON_TYPE.fullmatch(kind):
        raise ApiError(415, "the body must be JSON; send 'Content-Type: application/json'")


def _too_large() -> ApiError:
    return ApiError(413, f"the body has more than {LIMITS.body_bytes} bytes; send less")


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client leaves before its end."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > LIMITS.body_bytes:
            raise _too_large()
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
