"""Environment variables as typed values, read when asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

from sagellm.errors import InvalidArgumentError

_T = TypeVar("_T")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def _to_bool(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _to_float(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


def _to_list(text: str) -> list[str]:
    return [item for part in text.split(",") if (item := part.strip())]


_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_to_bool, "true or false"),
    int: (int, "a whole number"),
    float: (_to_float, "a number"),
}


def read_variable(environ: Mapping[str, str], name: str, default: _T) -> _T:
    """Return the variable as a value of `default`'s type.

    An empty variable counts as unset where a number or a boolean is wanted.

    Raises:
        InvalidArgumentError: its text is no such value; the message names the variable.
    """
    text = environ.get(name)
    if text is None:
        return default
    if isinstance(default, list):
        return _to_list(text)  # type: ignore[return-value]
    if type(default) not in _PARSERS:
        return text  # type: ignore[return-value]
    text = text.strip()
    if not text:
        return default
    parse, wanted = _PARSERS[type(default)]
    try:
        return parse(text)  # type: ignore[no-any-return]
    except ValueError:
        raise InvalidArgumentError(
            f"environment variable {name} is {text!r}: set it to {wanted}, or unset it for "
            f"the default ({default})"
        ) from None


class EnvVar(Generic[_T]):
    """An attribute of an `EnvGroup` that reads one variable; its type is that of the default.

    Args:
        name: the variable.
        default: its value when unset.
    """

    def __init__(self, name: str, default: _T) -> None:
        self.name = name
        self.default = default

    @overload
    def __get__(self, group: None, owner: type) -> EnvVar[_T]: ...
    @overload
    def __get__(self, group: EnvGroup, owner: type) -> _T: ...
    def __get__(self, group: EnvGroup | None, owner: type) -> EnvVar[_T] | _T:
        return self if group is None else read_variable(group.environ, self.name, self.default)

    def __set__(self, group: EnvGroup, value: object) -> None:
        raise AttributeError(f"set the environment variable {self.name} instead")


class EnvGroup:
    """Variables that belong together; subclass it with `EnvVar` attributes for your own."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self.environ = os.environ if environ is None else environ

    def values(self) -> dict[str, Any]:
        """Return every value by attribute name."""
        names = [name for kind in type(self).__mro__[::-1] for name in vars(kind)]
        return {n: getattr(self, n) for n in names if isinstance(getattr(type(self), n), EnvVar)}

    def is_set(self, attribute: str) -> bool:
        """Tell whether the variable behind an attribute is in the environment, even if empty."""
        return getattr(type(self), attribute).name in self.environ


class AppEnv(EnvGroup):
    """The application."""

    name = EnvVar("APP_NAME", "ieops")


class LogEnv(EnvGroup):
    """Logging; see `Log.configure`."""

    level = EnvVar("LOG_LEVEL", "INFO")
    format = EnvVar("LOG_FORMAT", "text")


class ServerEnv(EnvGroup):
    """Where the server listens. An unset socket is an automatic one; an empty one means TCP."""

    host = EnvVar("MODEL_SERVER_HOST", "127.0.0.1")
    port = EnvVar("MODEL_SERVER_PORT", 8001)
    socket = EnvVar("MODEL_SERVER_SOCKET", "")


class ModelEnv(EnvGroup):
    """The model; the timeout is in seconds."""

    path = EnvVar("MODEL_PATH", "")
    name = EnvVar("MODEL_NAME", "model")
    timeout = EnvVar("MODEL_TIMEOUT", 600)
    concurrency = EnvVar("MODEL_THREAD_CONCURRENCY", 8)


class DeviceEnv(EnvGroup):
    """The device that the model runs on."""

    cuda_visible = EnvVar("CUDA_VISIBLE_DEVICES", "0")
    device = EnvVar("DEVICE", "auto")
    torch_dtype = EnvVar("TORCH_DTYPE", "float16")


class ApiEnv(EnvGroup):
    """A remote API that the service calls; the timeout is in seconds."""

    base_url = EnvVar("API_BASE_URL", "")
    key = EnvVar("API_KEY", "")
    timeout = EnvVar("API_TIMEOUT", 30.0)


class StorageEnv(EnvGroup):
    """NFS storage; sizes in bytes, the timeout in milliseconds."""

    nfs_server = EnvVar("IEOPS_NFS_SERVER", "")
    pid = EnvVar("IEOPS_STORAGE_PID", "u-00000000")
    fs_name = EnvVar("IEOPS_STORAGE_FS_NAME", "jfs-dev")
    oid = EnvVar("IEOPS_STORAGE_OID", "gmicloud.ieops")
    uid = EnvVar("IEOPS_STORAGE_UID", "gmicloud.ieops")
    write_chunk_size = EnvVar("IEOPS_NFS_WRITE_CHUNK_SIZE", 524288)
    read_chunk_size = EnvVar("IEOPS_NFS_READ_CHUNK_SIZE", 524288)
    timeout = EnvVar("IEOPS_NFS_TIMEOUT", 30000)


class RegisterEnv(EnvGroup):
    """Registration with a proxy; the interval is in seconds."""

    enabled = EnvVar("IEOPS_REGISTER_ENABLED", False)
    url = EnvVar("IEOPS_REGISTER_URL", "")
    interval = EnvVar("IEOPS_REGISTER_INTERVAL", 10.0)


class Env:
    """All groups, and typed access to any other variable.

    Args:
        environ: read instead of the process's environment.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self.app = AppEnv(environ)
        self.log = LogEnv(environ)
        self.server = ServerEnv(environ)
        self.model = ModelEnv(environ)
        self.device = DeviceEnv(environ)
        self.api = ApiEnv(environ)
        self.storage = StorageEnv(environ)
        self.register = RegisterEnv(environ)

    def get(self, name: str, default: str = "") -> str:
        """Return a variable's text."""
        return self._environ.get(name, default)

    def get_int(self, name: str, default: int = 0) -> int:
        """Return a whole number."""
        return read_variable(self._environ, name, int(default))

    def get_bool(self, name: str, default: bool = False) -> bool:
        """Return a boolean: 1, true, yes, on; 0, false, no, off; in any case."""
        return read_variable(self._environ, name, bool(default))

    def get_float(self, name: str, default: float = 0.0) -> float:
        """Return a number; infinite is one, NaN is not."""
        return read_variable(self._environ, name, float(default))

    def get_list(self, name: str, default: list[str] | None = None) -> list[str]:
        """Return the items between commas, without surrounding blanks and empty items."""
        return read_variable(self._environ, name, list(default or []))


env = Env()
