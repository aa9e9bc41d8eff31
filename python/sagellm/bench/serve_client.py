"""One streaming request to an OpenAI-compatible server, with the time of every event.

The client shares the machine with the server under test, so while a stream runs it only splits
lines and notes times; JSON is read after the measurement.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from sagellm.bench.serve_metrics import Failure, RequestTiming
from sagellm.errors import InvalidArgumentError, UnavailableError, UnsupportedError

if TYPE_CHECKING:
    import aiohttp

clock = time.perf_counter

_MESSAGE_CHARS = 300
_BUSY = (429, 503)


def require_aiohttp() -> ModuleType:
    """The module aiohttp.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        import aiohttp
    except ImportError:
        raise UnsupportedError("bench serve needs aiohttp; pip install 'sagellm[bench]'") from None
    return aiohttp


class SseSplitter:
    """Cuts a byte stream of server-sent events into the data of each event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, chunk: bytes) -> list[bytes]:
        """The events that are complete after ``chunk``."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A request and what came back, unread."""

    start: float
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    failure: Failure | None = None
    late_s: float = 0.0
    asked_prompt_tokens: int | None = None
    asked_output_tokens: int | None = None

    def answer(self) -> Answer:
        """Reads the events."""
        return _read(self)

    def timing(self) -> RequestTiming:
        """What the metrics need."""
        answer = self.answer()
        usage = answer.usage
        details = usage.get("prompt_tokens_details")
        counted = _whole(usage.get("completion_tokens"))
        return RequestTiming(
            start=self.start,
            token_times=tuple(answer.token_times),
            end=answer.end if answer.failure is None else self.end,
            output_tokens=len(answer.token_times) if counted is None else counted,
            prompt_tokens=_whole(usage.get("prompt_tokens")),
            cached_tokens=_whole(
                details.get("cached_tokens") if isinstance(details, dict) else None
            ),
            asked_prompt_tokens=self.asked_prompt_tokens,
            asked_output_tokens=self.asked_output_tokens,
            counted_from="events" if counted is None else "usage",
            late_s=self.late_s,
            failure=answer.failure,
        )


@dataclass(slots=True, kw_only=True)
class Answer:
    """The content of a stream.

    Attributes:
        token_times: When events with text came. Roles, usage and keep-alives are no tokens. An
            answer whose tokens have no text counts as one event, the one that finished it.
        end: The last event with a choice.
    """

    text: str
    token_times: list[float]
    end: float
    usage: dict[str, Any]
    failure: Failure | None


def _read(exchange: Exchange) -> Answer:
    pieces: list[str] = []
    token_times: list[float] = []
    usage: dict[str, Any] = {}
    end = exchange.end
    failure = exchange.failure
    complete = False
    for moment, payload in zip(exchange.times, exchange.payloads, strict=True):
        if payload == b"[DONE]":
            complete = True
            continue
        event = _load(payload)
        if event is None or "error" in event:
            failure = failure or _failed_event(event, payload)
            continue
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            end = moment
            piece, content = _generated(choice)
            pieces.append(content)
            finished = choice.get("finish_reason") is not None
            complete = complete or finished
            if piece or (finished and not token_times):
                token_times.append(moment)
    if failure is None and not complete:
        failure = Failure(kind="truncated", message="the stream ended before the answer did")
    elif failure is None and not token_times:
        failure = Failure(kind="empty", message="the stream ended without an answer")
    return Answer(
        text="".join(pieces), token_times=token_times, end=end, usage=usage, failure=failure
    )


def _load(payload: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(payload)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _failed_event(event: dict[str, Any] | None, payload: bytes) -> Failure:
    if event is None:
        return Failure(kind="malformed event", message=_shorten(payload))
    error = event["error"]
    kind = error.get("type") if isinstance(error, dict) else None
    return Failure(kind=f"error event {kind or ''}".strip(), message=_shorten(payload))


def _generated(choice: dict[str, Any]) -> tuple[bool, str]:
    """Whether a choice carries generated text of any sort, and the visible text."""
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
        return bool(text), text
    content = delta.get("content") or ""
    hidden = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls")
    return bool(content or hidden), content


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _shorten(text: bytes) -> str:
    shown = " ".join(text.decode(errors="replace").split())
    return shown if len(shown) <= _MESSAGE_CHARS else shown[:_MESSAGE_CHARS] + "..."


def server_root(url: str) -> str:
    """The address in front of ``/v1``.

    Raises:
        InvalidArgumentError: Not an http(s) address.
    """
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")) or root.endswith("://"):
        raise InvalidArgumentError(
            f"--url is {url!r}; give the address of a server, such as http://127.0.0.1:8000"
        )
    return root


class Client:
    """Connections to one server; an async context manager."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._root = server_root(url)
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._aiohttp = require_aiohttp()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._session = self._aiohttp.ClientSession(
            # A connection per request: some servers end a kept one after a few without a word.
            connector=self._aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=self._aiohttp.ClientTimeout(total=self._timeout_s),
            headers=headers,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open session."""
        if self._session is None:
            raise RuntimeError("the client is used outside its context")
        return self._session

    async def stream(self, path: str, body: bytes, *, late_s: float = 0.0) -> Exchange:
        """Posts a request and notes when each event of its answer came.

        A failure is part of the exchange, never raised.
        """
        splitter = SseSplitter()
        exchange = Exchange(start=clock(), late_s=late_s)
        times, payloads = exchange.times, exchange.payloads
        try:
            async with self.session.post(self._root + path, data=body) as response:
                if response.status != 200:
                    exchange.failure = await _refusal(response)
                elif response.content_type != "text/event-stream":
                    exchange.failure = Failure(
                        kind="no stream", message=f"the answer is {response.content_type}"
                    )
                else:
                    async for chunk in response.content.iter_any():
                        now = clock()
                        for payload in splitter.push(chunk):
                            times.append(now)
                            payloads.append(payload)
        except asyncio.TimeoutError:
            message = f"no complete answer within --timeout {self._timeout_s:g} s"
            exchange.failure = Failure(kind="timeout", message=message)
        except self._aiohttp.ClientConnectorError as error:
            exchange.failure = Failure(kind="connect", message=str(error))
        except (self._aiohttp.ClientError, OSError) as error:
            message = str(error) or type(error).__name__
            exchange.failure = Failure(kind="disconnected", message=message)
        exchange.end = clock()
        return exchange

    async def fetch(self, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and content of a GET, or of a POST of ``body`` as JSON.

        Raises:
            UnavailableError: The server cannot be reached.
        """
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if data is None else "POST"
        try:
            async with self.session.request(method, self._root + path, data=data) as response:
                return response.status, await response.read()
        except (self._aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(
                f"no answer from {self._root}{path} ({reason}); is the server running? "
                "--serve MODEL starts one"
            ) from None

    async def fetch_json(self, path: str, body: object = None) -> dict[str, Any]:
        """The JSON object at ``path``.

        Raises:
            UnavailableError: The server cannot be reached, or answers with something else.
        """
        status, content = await self.fetch(path, body)
        found = _load(content) if status == 200 else None
        if found is None:
            raise UnavailableError(
                f"{self._root}{path} answered {status}: {_shorten(content)}"
                + ("; give --api-key" if status == 401 else "")
            )
        return found


async def _refusal(response: aiohttp.ClientResponse) -> Failure:
    message = _shorten(await response.read())
    if response.status in _BUSY and "Retry-After" in response.headers:
        return Failure(kind=f"rejected {response.status}", message=message, rejected=True)
    return Failure(kind=f"http {response.status}", message=message)
