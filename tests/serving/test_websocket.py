"""WebSocket routes, with a real client."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import HTTPException
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect, unix_connect

from sagellm.serving import RouterConfig, RouterDef, RouterKind, Server
from serving.support import TIMEOUT_S, Running, running, socket_in


def socket_server(handler: Any, config: RouterConfig | None = None, **options: Any) -> Server:
    return Server({"t": [RouterDef("go", handler, RouterKind.WS, **options)]}, config)


def connected(at: Running) -> ClientConnection:
    if at.socket_path:
        return unix_connect(at.socket_path, "ws://localhost/t/go")
    return connect(at.url.replace("http", "ws") + "/t/go", proxy=None)


def ask(connection: ClientConnection, message: Any) -> None:
    connection.send(message if isinstance(message, str | bytes) else json.dumps(message))


def answer(connection: ClientConnection) -> Any:
    return json.loads(connection.recv(TIMEOUT_S))


async def async_items(query: Any) -> AsyncIterator[Any]:
    for i in range(query["n"]):
        yield {"i": i}


def sync_items(query: Any) -> Iterator[Any]:
    for i in range(query["n"]):
        yield {"i": i}


@pytest.mark.parametrize("handler", [async_items, sync_items])
def test_items_of_a_generator_are_frames(handler: Any, tmp_path: Path) -> None:
    with running(socket_server(handler), socket=socket_in(tmp_path)) as at, connected(at) as c:
        for n in (2, 1):
            ask(c, {"n": n})
            assert [answer(c) for _ in range(n)] == [{"i": i} for i in range(n)]


def test_results_of_functions_are_frames_and_bytes_are_accepted() -> None:
    def echo(query: dict[str, Any]) -> dict[str, Any]:
        return query

    with running(socket_server(echo)) as at, connected(at) as c:
        ask(c, {"a": 1, "trace_id": "mine"})
        assert answer(c) == {"a": 1, "trace_id": "mine"}
        ask(c, b'{"a": 2}')
        assert answer(c)["a"] == 2


def test_faults_are_error_frames_and_the_connection_goes_on() -> None:
    async def handler(query: dict[str, Any]) -> Any:
        if query.get("fail") == "http":
            raise HTTPException(400, "Messages required")
        if query.get("fail"):
            raise ValueError("secret")
        return "fine"

    with running(socket_server(handler)) as at, connected(at) as c:
        for message, kind in (
            ("{", "invalid_request"),
            ("[1]", "invalid_request"),
            ({"fail": "http"}, "invalid_request"),
            ({"fail": "other"}, "internal"),
        ):
            ask(c, message)
            error = answer(c)["error"]
            assert error["type"] == kind
            assert "secret" not in error["message"]
        ask(c, {})
        assert c.recv(TIMEOUT_S) == "fine"


def test_a_timeout_is_an_error_frame() -> None:
    async def stall(query: Any) -> None:
        await asyncio.Event().wait()

    with running(socket_server(stall, timeout=0.05)) as at, connected(at) as c:
        ask(c, {})
        assert answer(c)["error"]["type"] == "timeout"


def test_a_client_that_leaves_stops_the_generator() -> None:
    closed = threading.Event()

    async def forever(query: Any) -> AsyncIterator[Any]:
        try:
            yield {"i": 0}
            await asyncio.Event().wait()
        finally:
            closed.set()

    with running(socket_server(forever)) as at:
        with connected(at) as c:
            ask(c, {})
            assert answer(c) == {"i": 0}
        assert closed.wait(TIMEOUT_S)


def test_too_many_waiting_messages_are_refused_at_once() -> None:
    release = threading.Event()

    def wait(query: Any) -> str:
        release.wait(TIMEOUT_S)
        return "done"

    with running(socket_server(wait)) as at, connected(at) as c:
        for _ in range(20):
            ask(c, {})
        assert answer(c)["error"]["type"] == "rate_limit"
        release.set()
        while c.recv(TIMEOUT_S) != "done":
            pass


def test_a_message_beyond_the_limit_closes_the_connection() -> None:
    server = socket_server(lambda query: query, RouterConfig(max_body_bytes=1000))
    with running(server) as at, connected(at) as c:
        ask(c, {"a": "x" * 2000})
        with pytest.raises(ConnectionClosed) as caught:
            c.recv(TIMEOUT_S)
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
