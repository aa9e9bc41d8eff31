"""Real processes of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

LIMIT_S = 120  # a process that takes longer hangs


def command(*args: object, module: str = "sagellm.cli") -> list[str]:
    """The words of ``sagellm ARGS``, or of another module's command line."""
    return [sys.executable, "-m", module, *map(str, args)]


def environment(**settings: str) -> dict[str, str]:
    """The environment of this process with some changes."""
    return os.environ | settings


def run(
    *args: object, stdin: str = "", module: str = "sagellm.cli", **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``sagellm ARGS`` to its end; ``settings`` are environment variables."""
    result = subprocess.run(
        command(*args, module=module),
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT_S,
        env=environment(**settings),
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


def succeed(*args: object, **options: Any) -> str:
    """The standard output of a command that has to succeed."""
    result = run(*args, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(*args: object, **options: Any) -> str:
    """The one line of a command that has to fail; nothing else may be printed."""
    result = run(*args, **options)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@contextmanager
def running(line: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed if the test ends before it."""
    with subprocess.Popen(line, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def read_until(descriptor: int, text: bytes) -> bytes:
    """Reads a stream byte by byte, up to the end of ``text``."""
    seen = b""
    while not seen.endswith(text):
        byte = os.read(descriptor, 1)
        assert byte, f"the stream ended after {seen!r}"
        seen += byte
    return seen
