"""A server's life: bind, start, serve, drain, exit."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from sagellm.errors import InvalidArgumentError
from sagellm.serving.environment import Env, env
from sagellm.serving.listening import (
    SOCKET_MODE,
    SocketFile,
    address_of,
    automatic_path,
    bind_tcp,
    bind_unix,
)
from sagellm.serving.logs import log
from sagellm.serving.protocol import BoundedHttpProtocol
from sagellm.serving.server import Hook, Server, run_hook

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TICK_S = 0.05  # how often the drain looks for a second signal
_CUT_GRACE_S = 1.0  # for the clean-up of cut requests, and of everything after a second signal
EXIT_CUT = 1

logger = logging.getLogger(__name__)


class Handler:
    """Runs a `Server` in this process.

    It listens on a Unix socket or TCP: `socket` or `host`/`port` if given here, else as the
    environment says (`MODEL_SERVER_SOCKET`, `MODEL_SERVER_HOST`, `MODEL_SERVER_PORT`), else on a
    Unix socket with an automatic path. An empty socket means TCP. The address is logged and is
    `address`.

    Args:
        server: what to serve.
        host: TCP address to listen on.
        port: TCP port; 0 for a free one.
        socket: path of the Unix socket.
        drain_timeout: seconds that open requests have to finish once the server is told to stop.
        on_drain: called when nothing more is accepted, while open requests go on; after the
            server's own.
        socket_mode: permissions of the Unix socket.
        keep_alive_timeout: seconds until an idle connection is closed.

    Raises:
        InvalidArgumentError: both a socket and a host or port are given.
    """

    def __init__(
        self,
        server: Server,
        host: str | None = None,
        port: int | None = None,
        socket: str | Path | None = None,
        drain_timeout: float = 30.0,
        on_drain: Hook | None = None,
        socket_mode: int = SOCKET_MODE,
        keep_alive_timeout: int = 65,
    ) -> None:
        if socket and (host is not None or port is not None):
            raise InvalidArgumentError("give either a socket or a host and port, not both")
        if not drain_timeout >= 0:
            raise InvalidArgumentError(f"drain_timeout is {drain_timeout}: give seconds >= 0")
        self._server = server
        self._host = host
        self._port = port
        self._socket = None if socket is None else str(socket)
        self._socket_mode = socket_mode
        self._drain_timeout = drain_timeout
        self._hooks = [hook for hook in (server.on_drain, on_drain) if hook is not None]
        self._keep_alive_timeout = keep_alive_timeout
        self._runner: _Runner | None = None
        self.started = threading.Event()
        self.address = ""

    def serve(self) -> None:
        """Serve until SIGTERM or SIGINT, or `stop()`; then drain.

        The first signal stops accepting, calls the drain hooks and waits for open requests up to
        `drain_timeout`; the shutdown hook follows. A second signal cuts everything at once. Outside
        the main thread there are no signals, only `stop()`.

        Raises:
            InvalidArgumentError: an address or setting that cannot work.
            UnavailableError: the address is in use.
            SystemExit: 1 if requests had to be cut at the drain timeout, 128 plus the signal's
                number after a second signal. A clean end returns.
        """
        log.configure()
        bound = self._bind()
        file = SocketFile(bound)
        self.address = address_of(bound)
        runner = _Runner(self._config(), self._drain_timeout, self._hooks, self.started, file)
        self._runner = runner
        logger.info("%s: starting on %s", self._server.name, self.address)
        try:
            runner.run(sockets=[bound])
        except SystemExit:
            if self._server.startup_failure is None:
                raise
        finally:
            self._runner = None
            self.started.clear()
            bound.close()
            file.remove()
        if self._server.startup_failure is not None:
            raise self._server.startup_failure
        if runner.forced_by is not None:
            raise SystemExit(128 + runner.forced_by)
        if runner.num_cut:
            raise SystemExit(EXIT_CUT)

    def stop(self) -> None:
        """Drain and return from `serve()`; from any thread."""
        if (runner := self._runner) is not None:
            runner.should_exit = True

    def _bind(self, variables: Env = env) -> socket.socket:
        path = self._socket
        if path is None and self._host is None and self._port is None:
            given = variables.server.is_set("socket")
            path = variables.server.socket if given else str(automatic_path(self._server.name))
        if path:
            return bind_unix(Path(path), self._socket_mode)
        host = variables.server.host if self._host is None else self._host
        return bind_tcp(host, variables.server.port if self._port is None else self._port)

    def _config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self._server.app,
            http=BoundedHttpProtocol,
            loop="uvloop" if importlib.util.find_spec("uvloop") else "asyncio",
            ws="websockets-sansio",
            ws_max_size=self._server.config.max_body_bytes,
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=self._keep_alive_timeout,
        )


class _Runner(uvicorn.Server):
    """uvicorn's server with our signals and our drain."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain_timeout: float,
        hooks: list[Hook],
        ready: threading.Event,
        file: SocketFile,
    ) -> None:
        super().__init__(config)
        self._drain_timeout = drain_timeout
        self._hooks = hooks
        self._ready = ready
        self._file = file
        self.num_cut = 0
        self.forced_by: int | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals while the block runs; a clean drain ends with exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal; cut on the second, whatever still runs."""
        if not self.should_exit:
            self.should_exit = True
            return
        if self.forced_by is None:
            self.forced_by = sig
            self.force_exit = True
            timer = threading.Timer(_CUT_GRACE_S, self._exit_now)
            timer.daemon = True
            timer.start()
        else:
            self._exit_now()

    def _exit_now(self) -> None:
        self._file.remove()
        os._exit(128 + (self.forced_by or signal.SIGTERM))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell who waits for it."""
        await super().startup(sockets=sockets)
        if self.started:
            logger.info("accepting requests")
            self._ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, wait for open requests, cut the rest, run the shutdown hook."""
        for listener in self.servers:
            listener.close()
        for bound in sockets or []:
            bound.close()
        self._file.remove()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # after its open request, if it has one
        logger.info("draining: %d open requests", len(self.server_state.tasks))
        await self._drain()
        await self._cut()
        if not self.force_exit:
            await self.lifespan.shutdown()
            logger.info("stopped")

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_timeout
        hooks = asyncio.create_task(self._run_hooks())
        while not self.force_exit:
            waiting = {*self.server_state.tasks, *(() if hooks.done() else (hooks,))}
            left = deadline - loop.time()
            if not waiting or left <= 0:
                break
            await asyncio.wait(waiting, timeout=min(_TICK_S, left))
        if not hooks.done():
            logger.error("a drain hook did not end in time")
            hooks.cancel()

    async def _run_hooks(self) -> None:
        for hook in self._hooks:
            try:
                await run_hook(hook)
            except Exception:
                logger.exception("a drain hook failed")

    async def _cut(self) -> None:
        tasks = set(self.server_state.tasks)
        self.num_cut = len(tasks)
        if not tasks:
            return
        logger.warning("cutting %d open requests", self.num_cut)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_CUT_GRACE_S)
