"""Real servers for the tests: uvicorn on a Unix socket or 127.0.0.1."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from sagellm.serving import Handler, Server

TIMEOUT_S = 20.0


class Running:
    """A server in a thread, and a client for it."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.address = handler.address

    @property
    def socket_path(self) -> str | None:
        return self.address[len("unix:") :] if self.address.startswith("unix:") else None

    @property
    def url(self) -> str:
        return "http://localhost" if self.socket_path else self.address

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.socket_path)
        return httpx.Client(transport=transport, base_url=self.url, timeout=TIMEOUT_S)

    def async_client(self) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(uds=self.socket_path)
        return httpx.AsyncClient(transport=transport, base_url=self.url, timeout=TIMEOUT_S)


@contextlib.contextmanager
def running(server: Server, **options: Any) -> Iterator[Running]:
    """Serve in a thread, by default on a free port of 127.0.0.1."""
    if not options.get("socket"):
        options = {"host": "127.0.0.1", "port": 0, **options}
    handler = Handler(server, **options)
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            handler.serve()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        limit = time.monotonic() + TIMEOUT_S
        while not handler.started.wait(0.02):
            if not thread.is_alive() or time.monotonic() > limit:
                raise RuntimeError(f"the server did not start: {failures}")
        yield Running(handler)
    finally:
        handler.stop()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the server did not stop"
    if failures:
        raise failures[0]


@contextlib.contextmanager
def client_of(server: Server, **options: Any) -> Iterator[httpx.Client]:
    with running(server, **options) as at, at.client() as client:
        yield client


def socket_in(folder: Path) -> str:
    return str(folder / "server.sock")
