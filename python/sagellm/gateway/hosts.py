"""By which names a server may be called: the guard against DNS rebinding.

A web page may give its own name the address 127.0.0.1 and then read, as its own origin, what a
local server answers. The ``Host`` header still tells the page's name.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from sagellm.gateway.errors import ApiError

if TYPE_CHECKING:
    from sagellm.gateway.config import GatewayConfig

_SHOWN_CHARS = 100


class HostFilter:
    """Refuses requests whose ``Host`` is none of the names of this server.

    Loopback addresses and ``localhost`` always pass; a request without the header does too, which
    no browser sends.
    """

    def __init__(self, names: frozenset[str]) -> None:
        """Lets these names through, given in lower case and without ports."""
        self._names = names

    def check(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Looks at the headers of a request.

        Raises:
            ApiError: 421.
        """
        for key, value in headers:
            if key == b"host":
                name = _without_port(value.decode("latin-1").strip().lower())
                if name not in self._names and not _is_local(name):
                    shown = name[:_SHOWN_CHARS]
                    raise ApiError(
                        421,
                        f"this server is not called {shown!r}; use localhost, or start it with "
                        f"--allowed-host {shown}",
                        code="unknown_host",
                    )


def host_filter(config: GatewayConfig) -> HostFilter | None:
    """The filter that a configuration asks for; None lets every name through.

    Without ``allowed_hosts`` there is one where a page could do harm: on a loopback address
    without API keys.
    """
    if "*" in config.allowed_hosts or config.socket is not None:
        return None
    if not config.allowed_hosts and (config.api_keys or not _is_local(config.host.lower())):
        return None
    names = {config.host, *config.allowed_hosts}
    return HostFilter(frozenset(name.lower().rstrip(".") for name in names))


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).rstrip(".")


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):  # names that never leave the machine
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
