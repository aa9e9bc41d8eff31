"""A child process that is started, watched, stopped and always reaped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from sagellm.errors import InvalidArgumentError, UnavailableError

_CHUNK_BYTES = 64 * 1024


class SubprocessManager:
    """One child process in its own session; it and its own children are stopped together.

    A thread reaps the child as soon as it exits, so it never stays a zombie; another keeps the end
    of its output. Usable as a context manager: started on entry, stopped on exit.

    Args:
        command: program and arguments; no shell is involved.
        env: variables added to this process's environment.
        cwd: the folder to run in.
        stop_timeout: seconds between the request to end (SIGTERM) and SIGKILL.
        max_output_bytes: how much of the end of stdout and stderr is kept.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stop_timeout: float = 10.0,
        max_output_bytes: int = 2**20,
    ) -> None:
        if isinstance(command, str) or not command:
            raise InvalidArgumentError("command must be a list: a program and its arguments")
        self._command = [str(part) for part in command]
        self._env = dict(env or {})
        self._cwd = cwd
        self._stop_timeout = stop_timeout
        self._max_output_bytes = max_output_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = threading.Event()
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self._chunks: deque[bytes] = deque()
        self._num_bytes = 0

    def start(self) -> None:
        """Start the child.

        Raises:
            InvalidArgumentError: it runs already, or there is no such program or folder.
        """
        if self.is_running():
            raise InvalidArgumentError(f"{self._command[0]} runs already: stop it first")
        try:
            process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._env},
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise InvalidArgumentError(f"cannot start {self._command[0]}: {error}") from error
        self._process = process
        self._exited = exited = threading.Event()
        self._chunks, self._num_bytes = deque(), 0
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()
        threading.Thread(target=_reap, args=(process, exited), daemon=True).start()

    def stop(self, timeout: float | None = None) -> int | None:
        """Ask the child to end, kill it if it does not, and return its exit code.

        Args:
            timeout: seconds between the two, over `stop_timeout`.

        Returns:
            The exit code, negative for a signal; None if it was never started.
        """
        if self._process is None:
            return None
        if not self._exited.is_set():
            self._signal(signal.SIGTERM)
            if not self._exited.wait(self._stop_timeout if timeout is None else timeout):
                self._signal(signal.SIGKILL)
        return self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the child's exit and return its exit code.

        Raises:
            UnavailableError: it was never started.
            TimeoutError: it still runs after `timeout` seconds.
        """
        if self._process is None:
            raise UnavailableError(f"{self._command[0]} has not been started: call start()")
        if not self._exited.wait(timeout):
            raise TimeoutError(f"{self._command[0]} still runs after {timeout} s")
        if self._reader is not None:
            self._reader.join(1.0)  # longer only if a grandchild in another session holds the pipe
        return self._process.returncode

    def is_running(self) -> bool:
        """Tell whether the child has been started and has not exited."""
        return self._process is not None and not self._exited.is_set()

    @property
    def pid(self) -> int | None:
        """The child's process id; None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None before the exit."""
        return self._process.returncode if self._process and self._exited.is_set() else None

    def output(self) -> str:
        """Return the end of what the child has written to stdout and stderr."""
        with self._lock:
            data = b"".join(self._chunks)
        return data[-self._max_output_bytes :].decode(errors="replace")

    def __enter__(self) -> SubprocessManager:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                return  # it has just exited

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), _CHUNK_BYTES):
                with self._lock:
                    self._chunks.append(chunk)
                    self._num_bytes += len(chunk)
                    while self._num_bytes - len(self._chunks[0]) >= self._max_output_bytes:
                        self._num_bytes -= len(self._chunks.popleft())


def _reap(process: subprocess.Popen[bytes], exited: threading.Event) -> None:
    process.wait()
    exited.set()
