"""The gateway's knobs, checked once at start."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sagellm.errors import InvalidArgumentError
from sagellm.text.tool_formats import tool_format

_KEY = re.compile(r"[\x21-\x7e]+")  # what a header can carry without quoting


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How the server listens, whom it lets in, and how long it waits.

    Attributes:
        host, port: Where to listen; port 0 takes a free one.
        socket: Path of a Unix socket to listen on instead.
        api_keys: Keys of which a request needs one; empty lets everybody in.
        served_model_name: What clients may call the model, the first one in answers; empty takes
            the model's own name.
        cors_origins: Origins that browsers may call from; ``("*",)`` is all.
        allowed_hosts: Names that clients may call the server by (``Host``), beside localhost and
            ``host``; ``*`` is any. Empty: those two alone on a loopback address without API keys,
            so that no web page gets in under a name of its own; otherwise any.
        request_timeout_s: Seconds until a request is answered 504; None waits forever.
        body_timeout_s: Seconds for a client to send its whole body, else 408.
        drain_timeout_s: Seconds that requests at hand may take after SIGTERM.
        drain_notice_s: Seconds to go on listening (``/ready`` and new requests are 503) after
            SIGTERM even when nothing is at hand, so that load balancers notice.
        stall_timeout_s: Seconds without an engine step, while there is work, until ``/health``
            answers 503.
        max_requests_per_key: Requests at hand per API key (without keys: per client address), else
            429; one for many completions counts as all of them. None: with several keys, half of
            what may run and wait, so that no key alone fills the queue; otherwise any number.
        tool_call_format: How the generation model writes tool calls, by name in
            ``TOOL_CALL_FORMATS``; ``auto`` asks its chat template. With a name, a template that
            knows no tools gets them as text in the system message.
        reasoning_tags: Texts around the model's reasoning; None asks the chat template.
        access_log: One JSON line per request on standard output.
        log_prompts: Put the beginning of each prompt into the access log.
        metrics_public: ``/metrics`` needs no API key.
        otlp_endpoint: Base URL of an OpenTelemetry collector that spans are sent to over HTTP; None
            makes none.
        warm_up: Run a token through the models before ``/ready`` says yes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    socket: str | None = None
    api_keys: tuple[str, ...] = ()
    served_model_name: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    request_timeout_s: float | None = 600.0
    body_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    drain_notice_s: float = 0.0
    stall_timeout_s: float = 60.0
    max_requests_per_key: int | None = None
    tool_call_format: str = "auto"
    reasoning_tags: tuple[str, str] | None = None
    access_log: bool = True
    log_prompts: bool = False
    metrics_public: bool = False
    otlp_endpoint: str | None = None
    warm_up: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidArgumentError(f"port is {self.port}; choose one from 0 to 65535")
        for name in ("request_timeout_s", "body_timeout_s", "stall_timeout_s"):
            _require_seconds(name, getattr(self, name), above=True)
        for name in ("drain_timeout_s", "drain_notice_s"):
            _require_seconds(name, getattr(self, name), above=False)
        if self.max_requests_per_key is not None and self.max_requests_per_key < 1:
            raise InvalidArgumentError(
                f"max_requests_per_key is {self.max_requests_per_key}; give at least 1"
            )
        if self.tool_call_format != "auto":
            tool_format(self.tool_call_format)
        if self.reasoning_tags is not None and not all(self.reasoning_tags):
            raise InvalidArgumentError("a reasoning tag is empty; give both, such as <think>")
        for number, key in enumerate(self.api_keys, 1):
            if not _KEY.fullmatch(key):  # the key itself stays out of messages
                raise InvalidArgumentError(
                    f"API key {number} is empty or holds spaces or non-ASCII characters"
                )


def _require_seconds(name: str, value: float | None, *, above: bool) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise InvalidArgumentError(
            f"{name} is {value}; give {'seconds above 0' if above else '0 or more seconds'}"
        )
