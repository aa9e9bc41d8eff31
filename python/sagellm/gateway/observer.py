"""What metrics and tracing hear of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sagellm.engine.output import SequenceOutput
    from sagellm.gateway.context import RequestContext
    from sagellm.protocol import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request of the engine; an HTTP request may start several.

    Attributes:
        key: Unique within the engine; pairs the calls that belong together.
        context: Of the HTTP request.
        request: As the engine runs it.
        num_prompt_tokens: Length of its prompt.
    """

    key: int
    context: RequestContext
    request: Request
    num_prompt_tokens: int


class RequestObserver(Protocol):
    """Follows engine requests and the HTTP requests around them.

    All methods run on the event loop, some for every token: they must be cheap and must not raise.
    """

    def request_started(self, record: RequestRecord) -> None:
        """The engine took a request."""

    def output(self, record: RequestRecord, output: SequenceOutput) -> None:
        """New output of one sequence. ``output.finished`` tells how it ended, with its metrics."""

    def request_finished(self, record: RequestRecord, *, cancelled: bool) -> None:
        """A request is over, once for each that started: answered (or failed), or given up."""

    def request_rejected(self, context: RequestContext, status: int) -> None:
        """The engine did not take a request; ``status`` is the HTTP answer."""

    def http_finished(self, context: RequestContext) -> None:
        """An HTTP request is over; ``context`` tells its status, start and tokens."""

    def close(self) -> None:
        """Nothing follows; may block for a moment, off the event loop."""


class ObserverGroup:
    """Passes everything on to several observers."""

    def __init__(self, observers: Sequence[RequestObserver]) -> None:
        self._observers = tuple(observers)

    def request_started(self, record: RequestRecord) -> None:
        """Passes it on."""
        for observer in self._observers:
            observer.request_started(record)

    def output(self, record: RequestRecord, output: SequenceOutput) -> None:
        """Passes it on."""
        for observer in self._observers:
            observer.output(record, output)

    def request_finished(self, record: RequestRecord, *, cancelled: bool) -> None:
        """Passes it on."""
        for observer in self._observers:
            observer.request_finished(record, cancelled=cancelled)

    def request_rejected(self, context: RequestContext, status: int) -> None:
        """Passes it on."""
        for observer in self._observers:
            observer.request_rejected(context, status)

    def http_finished(self, context: RequestContext) -> None:
        """Passes it on."""
        for observer in self._observers:
            observer.http_finished(context)

    def close(self) -> None:
        """Passes it on."""
        for observer in self._observers:
            observer.close()
