"""The engine for asyncio: many streams on event loops, one engine thread behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

from sagellm.engine.output import delta_of, end_of
from sagellm.engine.thread import EngineThread
from sagellm.protocol import StreamEventDelta, StreamEventEnd, StreamEventStart

if TYPE_CHECKING:
    from sagellm.engine.engine import Engine, EngineStats
    from sagellm.engine.output import SequenceOutput
    from sagellm.protocol import Request


class _LoopMailbox:
    """Outputs for the streams of one event loop; one wake-up of the loop per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.streams: dict[int, asyncio.Queue[SequenceOutput]] = {}

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        self._loop.call_soon_threadsafe(self._sort, outputs)

    def _sort(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            stream = self.streams.get(output.key)
            if stream is not None:
                stream.put_nowait(output)


class AsyncEngine:
    """Serves protocol requests to any number of asyncio tasks."""

    def __init__(self, engine: Engine) -> None:
        """Starts the engine's thread; ``engine`` belongs to it from now on."""
        self._engine = engine
        self._thread = EngineThread(engine)
        self._mailboxes: dict[asyncio.AbstractEventLoop, _LoopMailbox] = {}

    @property
    def engine(self) -> Engine:
        """For reading what is fixed at start: config, capacity, tokenizer."""
        return self._engine

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive

    @property
    def num_steps(self) -> int:
        """Grows while there is work; a health check watches it."""
        return self._engine.num_steps

    async def stats(self) -> EngineStats:
        """Gauges and counters, taken between two steps."""
        return await asyncio.wrap_future(self._thread.call(self._engine.stats))

    async def generate(
        self, request: Request, prompt_token_ids: Iterable[int] | None = None
    ) -> AsyncGenerator[StreamEventStart | StreamEventDelta | StreamEventEnd, None]:
        """Runs a request: a start event, deltas, and one end event per completion.

        A request with ``stream`` false gets one delta with everything before its end event. Whoever
        stops listening (``aclose``, a cancelled task) cancels the request: its blocks are free
        before the next step.

        Args:
            request: What to run.
            prompt_token_ids: Taken instead of ``request.prompt``.

        Raises:
            InvalidArgumentError, UnsupportedError: The request cannot be served.
            ResourceExhaustedError: It can never fit, or the queue is full.
            UnavailableError: The engine is closing or has failed.
        """
        state = await asyncio.to_thread(self._engine.prepare, request, prompt_token_ids)
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            self._mailboxes = {
                known: box for known, box in self._mailboxes.items() if not known.is_closed()
            }
            mailbox = self._mailboxes[loop] = _LoopMailbox(loop)
        stream: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        mailbox.streams[state.key] = stream
        try:
            self._thread.submit(state, mailbox)
            yield StreamEventStart(
                request_id=request.request_id,
                trace_id=request.trace_id,
                prompt_tokens=state.sequences[0].num_prompt_tokens,
            )
            while True:
                output = await stream.get()
                delta = delta_of(output)
                if delta is not None:
                    yield delta
                if output.finished is not None:
                    yield end_of(output)
                if output.request_finished:
                    return
        finally:
            del mailbox.streams[state.key]
            self._thread.cancel(state.key)  # without effect once answered

    async def close(self, drain_timeout: float = 30.0) -> int:
        """Stops taking requests, waits for those at hand, and frees the model.

        Args:
            drain_timeout: Seconds; what is unfinished then is answered ``unavailable``.

        Returns:
            How many requests were cut short.
        """
        cut = await asyncio.to_thread(self._thread.close, drain_timeout)
        self._engine.close()
        return cut
