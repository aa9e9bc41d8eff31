"""The command line on a real terminal: prompts, keys that become signals, progress bars."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.support import command, environment, read_until, running

# Takes standard input as the controlling terminal, then becomes the command.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def test_chat_is_led_by_keys(endless: Path) -> None:
    keyboard, terminal = pty.openpty()
    line = command("chat", endless, "--temperature", "0", "--max-tokens", "150000")
    with running(
        [sys.executable, "-c", TAKE_TERMINAL, *line],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        read_until(keyboard, b"> ")
        os.write(keyboard, b"hello\n")
        read_until(keyboard, b"hello\r\n")  # the echo
        assert os.read(keyboard, 1)  # the answer has begun
        os.write(keyboard, b"\x03")  # Ctrl-C
        read_until(keyboard, b"(stopped)")
        read_until(keyboard, b"> ")
        os.write(keyboard, b"\x04")  # Ctrl-D
        with contextlib.suppress(OSError):  # what the last user of a terminal leaves behind
            while os.read(keyboard, 4096):
                pass
        assert process.wait() == 0
    os.close(keyboard)


@pytest.mark.native
def test_ctrl_c_ends_a_measurement() -> None:
    """The progress bar tells that it runs; these cases would take hours."""
    screen, terminal = pty.openpty()
    cases = ("kernels", "--formats", "F32", "--tokens", ",".join(["256"] * 10_000), "--json")
    with running(
        command(*cases, module="sagellm.bench"),
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment(TERM="xterm"),
    ) as process:
        os.close(terminal)
        read_until(screen, b"kernels")
        process.send_signal(signal.SIGINT)
        shown = read_until(screen, b"interrupted\r\n")
        output, _ = process.communicate()
    os.close(screen)
    assert process.returncode == 130
    assert output == b""
    assert b"Traceback" not in shown
