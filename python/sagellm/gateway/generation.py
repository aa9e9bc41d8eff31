"""The outputs of a request on their way from the engine to a route."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagellm.engine.async_engine import OutputStream
    from sagellm.engine.output import SequenceOutput
    from sagellm.gateway.observer import RequestObserver, RequestRecord
    from sagellm.protocol import Request


class GatewayStream:
    """The outputs of one request, watched by the metrics. Iterate to the end or ``cancel``."""

    __slots__ = ("_is_over", "_metrics", "_outputs", "_record", "_stream")

    def __init__(
        self, stream: OutputStream, record: RequestRecord, metrics: RequestObserver
    ) -> None:
        self._stream = stream
        self._outputs = aiter(stream)
        self._record = record
        self._metrics = metrics
        self._is_over = False

    @property
    def key(self) -> int:
        """The request's id in the engine."""
        return self._record.key

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self._record.num_prompt_tokens

    @property
    def request(self) -> Request:
        """As the engine runs it."""
        return self._record.request

    @property
    def num_ready(self) -> int:
        """Outputs that are here already: so many come without waiting."""
        return 0 if self._is_over else self._stream.num_ready

    def __aiter__(self) -> GatewayStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            output = await anext(self._outputs)
        except (asyncio.CancelledError, Exception):
            self.cancel()
            raise
        self._metrics.output(self._record, output)
        if output.finished is not None:
            context = self._record.context
            context.num_output_tokens += len(output.finished.token_ids)
            context.finish_reasons.append(output.finished.reason)
            if output.index == 0:
                context.num_cached_tokens += output.num_cached_tokens
        if output.request_finished:
            self._end(cancelled=False)
        return output

    def cancel(self) -> None:
        """Gives the request up; its blocks are free before the next step. Harmless at the end."""
        self._stream.cancel()
        self._end(cancelled=True)

    async def aclose(self) -> None:
        """As ``cancel``."""
        self.cancel()

    def _end(self, *, cancelled: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._metrics.request_finished(self._record, cancelled=cancelled)
