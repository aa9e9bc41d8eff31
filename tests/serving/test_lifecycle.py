"""Addresses, signals, drain and exit codes, with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sagellm.errors import InvalidArgumentError, UnavailableError
from sagellm.serving import Handler, RouterDef, RouterKind, Server
from serving.support import TIMEOUT_S, client_of, running, socket_in

# Serves on argv[1] with a drain timeout of argv[2]; prints what happens.
PROGRAM = """
import asyncio, atexit, sys, threading
from sagellm.serving import Handler, RouterDef, RouterKind, Server

release = asyncio.Event()

def say(text):
    print(text, flush=True)

async def wait(query):
    say("open")
    await release.wait()
    return "finished"

async def stream(query):
    yield {"i": 0}
    await release.wait()
    yield {"i": 1}

def stuck(query):
    say("open")
    threading.Event().wait()

async def drain():
    say("drain")

routes = [RouterDef("wait", wait), RouterDef("stuck", stuck),
          RouterDef("stream", stream, RouterKind.SSE)]
server = Server({"t": routes}, on_drain=drain if sys.argv[3:] != ["release"] else release.set,
                on_startup=lambda: say("startup"), on_shutdown=lambda: say("shutdown"))
atexit.register(say, "orderly")
Handler(server, socket=sys.argv[1], drain_timeout=float(sys.argv[2])).serve()
say("returned")
"""


class Process:
    def __init__(self, path: str, *arguments: str) -> None:
        command = [sys.executable, "-c", PROGRAM, path, *arguments]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        assert self.child.stderr is not None and self.child.stdout is not None
        self.path = path
        self.log: list[str] = []
        for line in self.child.stderr:
            self.log.append(line)
            if "accepting requests" in line:
                break
        else:
            raise RuntimeError("".join(self.log))
        self.reader = threading.Thread(target=self.log.extend, args=(self.child.stderr,))
        self.reader.start()
        assert self.line() == "startup"

    def line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline().strip()

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.path)
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=TIMEOUT_S)

    def open_request(self, path: str) -> tuple[threading.Thread, list[str]]:
        """Send a request in a thread; return once the handler has begun."""
        result: list[str] = []

        def ask() -> None:
            try:
                with self.client() as client:
                    result.append(client.post(path).text)
            except httpx.HTTPError as error:
                result.append(type(error).__name__)

        thread = threading.Thread(target=ask)
        thread.start()
        assert self.line() == "open"
        return thread, result

    def end(self) -> tuple[int, str]:
        assert self.child.stdout is not None
        code = self.child.wait(TIMEOUT_S)
        self.reader.join(TIMEOUT_S)
        return code, self.child.stdout.read()


@contextlib.contextmanager
def process(folder: Path, *arguments: str) -> Iterator[Process]:
    started = Process(socket_in(folder), *arguments)
    try:
        yield started
    finally:
        started.child.kill()
        started.child.wait()
        started.reader.join(TIMEOUT_S)
        for pipe in (started.child.stdout, started.child.stderr):
            if pipe is not None:
                pipe.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_requests_finish_and_exits_with_zero(
    number: signal.Signals, tmp_path: Path
) -> None:
    with process(tmp_path, "20", "release") as p:
        thread, result = p.open_request("/t/wait")
        with p.client() as client, client.stream("POST", "/t/stream") as answer:
            lines = answer.iter_lines()
            assert next(lines) == 'data: {"i":0}'
            p.child.send_signal(number)  # the drain hook releases both requests
            assert [line for line in lines if line] == ['data: {"i":1}', "data: [DONE]"]
        thread.join(TIMEOUT_S)
        assert result == ['"finished"']
        assert p.end() == (0, "shutdown\nreturned\norderly\n")
        assert not Path(p.path).exists()


def test_a_draining_server_accepts_nothing_more(tmp_path: Path) -> None:
    with process(tmp_path, "20") as p:
        thread, _ = p.open_request("/t/wait")
        p.child.send_signal(signal.SIGTERM)
        assert p.line() == "drain"
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(OSError, match="No such file"):
            late.connect(p.path)
        p.child.send_signal(signal.SIGTERM)
        p.end()
        thread.join(TIMEOUT_S)


@pytest.mark.parametrize("path", ["/t/wait", "/t/stuck"])
def test_requests_are_cut_at_the_drain_timeout_and_the_exit_code_says_so(
    path: str, tmp_path: Path
) -> None:
    with process(tmp_path, "0.1") as p:
        thread, result = p.open_request(path)
        p.child.send_signal(signal.SIGTERM)
        code, output = p.end()
        thread.join(TIMEOUT_S)
        assert (code, output) == (1, "drain\nshutdown\norderly\n")
        assert result != ['"finished"']
        assert any("cutting 1 open requests" in line for line in p.log)


@pytest.mark.parametrize("path", ["/t/wait", "/t/stuck"])
def test_a_second_signal_cuts_at_once(path: str, tmp_path: Path) -> None:
    with process(tmp_path, "600") as p:
        thread, _ = p.open_request(path)
        p.child.send_signal(signal.SIGTERM)
        assert p.line() == "drain"
        p.child.send_signal(signal.SIGTERM)
        assert p.end() == (128 + signal.SIGTERM, "shutdown\norderly\n")
        thread.join(TIMEOUT_S)
        assert not Path(p.path).exists()


def test_a_failing_drain_hook_does_not_stop_the_drain() -> None:
    def fail() -> None:
        raise ValueError("hook")

    with client_of(Server({}, on_drain=fail)) as client:
        assert client.get("/nowhere").status_code == 404


# --- addresses


def nothing() -> Server:
    return Server({"t": [RouterDef("go", lambda query: 1)]}, app_name="my app/1")


def in_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Return the address of a server that is told nothing but its environment."""
    for name in ("HOST", "PORT", "SOCKET"):
        monkeypatch.delenv(f"MODEL_SERVER_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"MODEL_SERVER_{name}", value)
    with running(nothing(), host=None, port=None) as at:
        with at.client() as client:
            assert client.post("/t/go").json() == 1
        return at.address


def test_nothing_given_means_a_private_unix_socket_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    addresses = {in_environment(monkeypatch) for _ in range(2)}
    assert len(addresses) == 2
    assert all(a.startswith(f"unix:{tmp_path}/my-app-1-{os.getpid()}-") for a in addresses)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_chooses_socket_or_tcp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = socket_in(tmp_path)
    assert in_environment(monkeypatch, SOCKET=path) == f"unix:{path}"
    address = in_environment(monkeypatch, SOCKET="", PORT="0", HOST="127.0.0.1")
    assert address.startswith("http://127.0.0.1:")


def test_socket_permissions(tmp_path: Path) -> None:
    for options, mode in (({}, 0o600), ({"socket_mode": 0o660}, 0o660)):
        path = socket_in(tmp_path)
        with running(nothing(), socket=path, **options):
            assert Path(path).stat().st_mode & 0o777 == mode


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = socket_in(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with running(nothing(), socket=path):
        with pytest.raises(UnavailableError, match="another server listens"):
            Handler(nothing(), socket=path).serve()
        assert Path(path).exists()


def test_addresses_that_cannot_work_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"socket": file}, "no socket"),
        ({"socket": tmp_path / ("x" * 200)}, "longer than"),
        ({"socket": tmp_path / "missing" / "s"}, "cannot listen"),
        ({"host": "127.0.0.1", "port": 70000}, "between 0 and 65535"),
        ({"host": "203.0.113.1", "port": 0}, "cannot listen"),
    ]
    for options, words in wrong:
        with pytest.raises(InvalidArgumentError, match=words):
            Handler(nothing(), **options).serve()  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="not both"):
        Handler(nothing(), socket=file, port=1)
    assert file.read_text() == "x"


def test_a_port_in_use_is_refused() -> None:
    with running(nothing()) as at, pytest.raises(UnavailableError, match="in use"):
        Handler(nothing(), host="127.0.0.1", port=int(at.address.rsplit(":", 1)[1])).serve()


# --- the head of a request


def raw(at_address: str, data: bytes) -> bytes:
    host, port = at_address.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
        return received


@pytest.mark.parametrize("filler", [b"x: " + b"a" * 100_000, b"x: y\r\n" * 16_000])
def test_a_head_that_is_too_large_is_refused(filler: bytes) -> None:
    with running(nothing()) as at:
        # The answer may be lost: a connection closed with data unread is reset.
        assert raw(at.address, b"GET / HTTP/1.1\r\n" + filler)[:12] in (b"HTTP/1.1 400", b"")
        with at.client() as client:
            assert client.post("/t/go", headers={"x-long": "a" * 30_000}).json() == 1
            assert client.post("/t/go").json() == 1


def test_a_head_that_does_not_come_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagellm.serving.protocol.HEAD_TIMEOUT_S", 0.2)
    with running(nothing()) as at:
        for begun in (b"", b"GET / HT"):
            assert raw(at.address, begun) == b""
        with at.client() as client:
            assert client.post("/t/go").json() == 1


def test_what_is_not_http_is_refused() -> None:
    with running(nothing()) as at:
        assert raw(at.address, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_websocket_and_an_http_route_may_share_a_path() -> None:
    def echo(query: Any) -> Any:
        return query

    server = Server({"t": [RouterDef("go", echo, RouterKind.WS), RouterDef("go", echo)]})
    with client_of(server) as client:
        assert client.post("/t/go", json={"a": 1}).json()["a"] == 1
