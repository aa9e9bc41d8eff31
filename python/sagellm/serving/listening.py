"""The socket that a server listens on: a Unix socket or TCP."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
import tempfile
from pathlib import Path

from sagellm.errors import InvalidArgumentError, UnavailableError

_MAX_UNIX_PATH = 107  # sockaddr_un, less the final zero
SOCKET_MODE = 0o600


def automatic_path(name: str) -> Path:
    """Return an unused socket path in the folder for temporary files."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:32] or "server"
    return Path(tempfile.gettempdir()) / f"{safe}-{os.getpid()}-{secrets.token_hex(4)}.sock"


def bind_tcp(host: str, port: int) -> socket.socket:
    """Bind, but do not listen yet: clients are refused until the service has started.

    Raises:
        InvalidArgumentError: no such port or address.
        UnavailableError: the port is in use.
    """
    if not 0 <= port <= 65535:
        raise InvalidArgumentError(f"port {port} is not between 0 and 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidArgumentError(
            f"host {host!r} is no address of this machine: {error}"
        ) from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            message = f"{host}:{port} is in use: stop the other server or choose another port"
            raise UnavailableError(message) from error
        raise InvalidArgumentError(f"cannot listen on {host}:{port}: {error}") from error
    return bound


def bind_unix(path: Path, mode: int = SOCKET_MODE) -> socket.socket:
    """Bind to a path, replacing the socket that a dead server left there.

    Raises:
        InvalidArgumentError: the path is too long, its folder is missing, or it is no socket.
        UnavailableError: another server listens there.
    """
    if len(os.fsencode(path)) > _MAX_UNIX_PATH:
        raise InvalidArgumentError(f"socket path {path} is longer than {_MAX_UNIX_PATH} bytes")
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(str(path))
        path.chmod(mode)
    except OSError as error:
        bound.close()
        raise InvalidArgumentError(f"cannot listen on socket {path}: {error}") from error
    return bound


def _remove_stale(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidArgumentError(f"cannot listen on socket {path}: {error}") from error
    if not stat.S_ISSOCK(kind):
        raise InvalidArgumentError(f"{path} exists and is no socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise UnavailableError(f"socket {path} cannot be taken over: {error}") from error
    raise UnavailableError(f"another server listens on {path}: stop it or choose another path")


def address_of(bound: socket.socket) -> str:
    """Return `http://host:port` or `unix:/path`."""
    name = bound.getsockname()
    if bound.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"


class SocketFile:
    """Remembers the file behind a Unix socket and removes it, unless it has become another's."""

    def __init__(self, bound: socket.socket) -> None:
        self._path = Path(bound.getsockname()) if bound.family == socket.AF_UNIX else None
        self._inode = self._path.lstat().st_ino if self._path else 0

    def remove(self) -> None:
        """Remove the file; harmless when repeated."""
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                if self._path.lstat().st_ino == self._inode:
                    self._path.unlink()
