"""A driver script as a process: its events, its memory, its end."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sagellm.bench import machine_processes
from sagellm.errors import UnavailableError

_CHUNK = 65536
_LAST_WORDS = 400
_EXIT_S = 60.0

Event = dict[str, Any]


class DriverProcess:
    """A running driver; use ``started``."""

    def __init__(self, process: subprocess.Popen[bytes], log: int) -> None:
        self._process = process
        self._log = log
        self._deadline = 0.0
        self._waiting = b""

    def events(self, timeout_s: float) -> Iterator[Event]:
        """What the driver tells in one turn; it goes on when the next event is asked for.

        After the last event it waits for ``finish``, or for ``pause`` and later ``again``.

        Raises:
            UnavailableError: It failed, or was not done in time; the message holds its last words.
        """
        self._deadline = time.monotonic() + timeout_s
        while True:
            line = self._line()
            if not line:
                raise UnavailableError(self._ended())
            event = json.loads(line)
            yield event
            if event["event"] == "end":
                return
            self._answer("go")

    def peak_memory_mb(self) -> float:
        """Of the driver and all that it started and that still runs."""
        return machine_processes.peak_memory_mb(self._process.pid)

    def cpu_seconds(self) -> float:
        """Of the driver and all that it started and that still runs."""
        return machine_processes.cpu_seconds(self._process.pid)

    def has_ended(self) -> bool:
        """Whether the driver itself is gone."""
        return self._process.poll() is not None

    def pause(self) -> None:
        """Stops it and all that it started; they keep their memory.

        Raises:
            UnavailableError: One of them goes on.
        """
        machine_processes.stop(self._process.pid)

    def again(self, seed: int) -> None:
        """Continues it after a pause, for another turn."""
        machine_processes.resume(self._process.pid)
        self._answer(f"again {seed}")

    def finish(self) -> None:
        """Lets it end by itself after its last event."""
        self._answer("go")
        self._wait()

    def _wait(self) -> None:
        try:
            self._process.wait(min(_EXIT_S, max(0.0, self._deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            return  # it is ended with force; all that it measured was told

    def _answer(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # the next line says that it ended

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._waiting:
                if not selector.select(max(0.0, self._deadline - time.monotonic())):
                    raise UnavailableError(f"it took longer than --timeout: {self._words()}")
                chunk = os.read(descriptor, _CHUNK)
                if not chunk:
                    return b""
                self._waiting += chunk
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line

    def _ended(self) -> str:
        self._wait()
        status = self._process.poll()
        how = "closed its output" if status is None else f"ended with status {status}"
        return f"it {how}: {self._words()}"

    def _words(self) -> str:
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, _LAST_WORDS, max(0, size - _LAST_WORDS))
        return " ".join(text.decode(errors="replace").split()) or "it said nothing"


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[DriverProcess]:
    """Starts a driver in a session of its own; nothing of that session is left at the end."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is for the comparison, which then ends the driver
        )
        try:
            yield DriverProcess(process, log.fileno())
        finally:
            machine_processes.end(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return  # what was left to write was for a process that has ended
