"""A ``sagellm serve`` process for the time of a measurement."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sagellm.errors import UnavailableError

_HOST = "127.0.0.1"
_POLL_S = 0.1
_STOP_S = 30.0
_LOG_LINES = 3


@contextmanager
def serving(
    model: str, options: Sequence[str] = (), *, ready_timeout_s: float = 600.0
) -> Iterator[str]:
    """The address of a new server with ``model`` loaded; it is stopped at the end.

    Raises:
        UnavailableError: It ended or was not ready in time; the message holds its last words.
    """
    port = _free_port()
    url = f"http://{_HOST}:{port}"
    command = [sys.executable, "-m", "sagellm.cli", "serve", model]
    command += ["--host", _HOST, "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        # A session of its own: Ctrl-C is for the measurement, which then stops the server.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + ready_timeout_s
            while not _is_ready(url):
                if process.poll() is not None:
                    raise UnavailableError(_ended(model, process.returncode, _tail(log.fileno())))
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"`sagellm serve {model}` was not ready in {ready_timeout_s:g} s: "
                        + _tail(log.fileno())
                    )
                time.sleep(_POLL_S)
            yield url
        finally:
            _stop(process)


def _ended(model: str, status: int, words: str) -> str:
    return f"`sagellm serve {model}` ended with status {status} before it was ready: {words}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as log:
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    return " ".join(line.strip() for line in lines[-_LOG_LINES:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
