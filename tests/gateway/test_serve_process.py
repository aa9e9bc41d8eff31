"""``sagellm serve`` as a process: its lines, its signals, its end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

LIMIT_S = 60


class Served:
    """A running server and what it has written to standard error."""

    def __init__(self, *options: str, program: tuple[str, ...] = ("-m", "sagellm.cli")) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program, "serve", "mock", "--device", "mock", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The first line that matches."""

        def found() -> str | None:
            return next((line for line in self._lines if re.search(pattern, line)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, LIMIT_S)
            line = found()
            assert line is not None, "".join(self._lines)
            return line

    @property
    def url(self) -> str:
        match = re.search(r"http://[\d.:]+", self.wait_for("^serving "))
        assert match is not None
        return match[0]

    def end(self) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        code = self.process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        return code, out, "".join(self._lines)


@contextmanager
def served(*options: str, program: tuple[str, ...] = ("-m", "sagellm.cli")) -> Iterator[Served]:
    server = Served(*options, program=program)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(LIMIT_S)
        server._reader.join(LIMIT_S)
        for pipe in (server.process.stdout, server.process.stderr):
            assert pipe is not None
            pipe.close()


LONG = {"prompt": "Hi", "max_tokens": 4000, "ignore_eos": True, "stream": True}


def test_sigterm_finishes_what_is_at_hand_and_refuses_the_rest() -> None:
    with served("--port", "0", "--drain-timeout", "60") as server:
        url = server.url
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert "1 requests at hand" in server.wait_for("draining")
            ready = httpx.get(f"{url}/ready")
            assert ready.status_code == 503
            refused = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            rest = list(lines)
        assert "data: [DONE]" in rest
        code, out, errors = server.end()
    assert code == 0, errors
    assert "cutting" not in errors
    records = [json.loads(line) for line in out.splitlines()]
    assert {record["status"] for record in records} == {200, 503}
    finished = next(record for record in records if record.get("output_tokens"))
    assert finished["output_tokens"] == 4000


def test_what_outlasts_the_drain_is_cut_with_an_error_event_and_logged() -> None:
    with served("--port", "0", "--drain-timeout", "0") as server:
        url = server.url
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            request_id = answer.headers["x-request-id"]
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        code, _, errors = server.end()
    assert '"error"' in rest
    assert "cutting 1 requests" in errors and request_id in errors
    assert code in (0, 1)


def test_a_second_sigterm_cuts_at_once() -> None:
    with served("--port", "0", "--drain-timeout", "600") as server:
        url = server.url
        with (
            pytest.raises(httpx.HTTPError),
            httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            server.process.send_signal(signal.SIGTERM)
            list(lines)
        code, _, _ = server.end()
    assert code == 128 + signal.SIGTERM


def test_an_idle_server_ends_at_once_and_cleanly() -> None:
    with served("--port", "0") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.process.send_signal(signal.SIGINT)
        code, _, errors = server.end()
    assert code == 0, errors


def test_a_port_in_use_is_one_line_that_names_the_remedy() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        served("--port", str(taken.getsockname()[1])) as server,
    ):
        code, _, errors = server.end()
    assert code == 1
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and "in use" in last and "choose another port" in last
    assert "Traceback" not in errors


def test_a_unix_socket_serves(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served("--socket", str(path), "--no-access-log") as server:
        server.wait_for("^serving ")
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://server") as client:
            assert client.get("/v1/models").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        code, out, _ = server.end()
    assert (code, out) == (0, "")


def test_keys_come_from_a_file_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n")
    with served("--port", "0", "--api-key-file", str(file)) as server:
        models = f"{server.url}/v1/models"
        assert httpx.get(models).status_code == 401
        headers = {"authorization": "Bearer from-file"}
        assert httpx.get(models, headers=headers).status_code == 200
    file.write_text("# nothing\n")
    with served("--port", "0", "--api-key-file", str(file)) as server:
        code, _, errors = server.end()
    assert code == 1
    assert "holds no API key" in errors


STUCK = """
import sys
import threading
from sagellm.backends.mock import MockRunner
from sagellm.cli import main
from sagellm.gateway import gateway

class Hung(MockRunner):
    def step(self, batch, *rest, **options):
        if len(batch.token_ids) > 4:  # the warm-up's steps are shorter
            print("hanging", file=sys.stderr, flush=True)
            threading.Event().wait()
        return super().step(batch, *rest, **options)

gateway._PATIENCE_S = 0.1
from sagellm.engine import loading
loading.MockRunner = Hung
main()
"""


def test_an_engine_that_hangs_in_a_step_does_not_keep_the_process() -> None:
    with served("--port", "0", "--drain-timeout", "0", program=("-c", STUCK)) as server:
        body = {"prompt": "longer than the warm-up", "max_tokens": 2}
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname or "", parts.port or 0)) as peer:
            text = json.dumps(body)
            peer.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\n"
                + f"Content-Length: {len(text)}\r\n\r\n{text}".encode()
            )
            server.wait_for("^hanging")
            server.process.send_signal(signal.SIGTERM)
            code, _, errors = server.end()
    assert code == 1
    assert "the engine hangs in step" in errors
