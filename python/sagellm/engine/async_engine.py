"""The engine for asyncio: many streams on event loops, one engine thread behind them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from sagellm.engine.daemon import run_in_daemon
from sagellm.engine.output import delta_of, end_of
from sagellm.engine.thread import EngineProgress, EngineThread
from sagellm.protocol import StreamEventDelta, StreamEventEnd, StreamEventStart

if TYPE_CHECKING:
    from sagellm.engine.engine import Engine, EngineStats
    from sagellm.engine.output import SequenceOutput
    from sagellm.engine.request import RequestState
    from sagellm.protocol import Request

T = TypeVar("T")

SHORT_TEXT_CHARS = 1024
"""A text of this length is encoded in less time than another thread takes to hand it back."""
_SHORT_PROMPT_TOKENS = 8192  # checked in well under a millisecond


class OutputStream:
    """The outputs of one request, for ``async for``, on the event loop that started it.

    It ends after the output with ``request_finished``, or when the request is cancelled. Whoever
    leaves it before its end must ``cancel`` it: the engine would go on, and keep every output.

    Attributes:
        key: The request's id in the engine.
        num_prompt_tokens: Length of the encoded prompt.
    """

    __slots__ = (
        "_engine",
        "_is_closed",
        "_mailbox",
        "_outputs",
        "_waiter",
        "key",
        "num_prompt_tokens",
    )

    def __init__(self, state: RequestState, mailbox: _LoopMailbox, engine: EngineThread) -> None:
        """Made by ``AsyncEngine.start``."""
        self.key = state.key
        self.num_prompt_tokens = state.sequences[0].num_prompt_tokens
        self._mailbox = mailbox
        self._engine = engine
        self._outputs: deque[SequenceOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False

    def __aiter__(self) -> OutputStream:
        return self

    @property
    def num_ready(self) -> int:
        """Outputs that are here already: so many come without waiting."""
        return len(self._outputs)

    async def __anext__(self) -> SequenceOutput:
        while not self._outputs:
            if self._is_closed:
                raise StopAsyncIteration
            self._waiter = self._mailbox.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._outputs.popleft()

    def put(self, output: SequenceOutput) -> None:
        """Takes the next output; on the event loop, by the mailbox."""
        self._outputs.append(output)
        if output.request_finished:
            self._close()
        self._wake()

    def cancel(self) -> None:
        """Drops the request, unless it is complete; its blocks are free before the next step."""
        if not self._is_closed:
            self._close()
            self._engine.cancel(self.key)
        self._outputs.clear()
        self._wake()

    async def aclose(self) -> None:
        """``cancel``, under the name that ``contextlib.aclosing`` calls."""
        self.cancel()

    def _close(self) -> None:
        self._is_closed = True
        self._mailbox.streams.pop(self.key, None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _LoopMailbox:
    """Outputs for the streams of one event loop; one wake-up of the loop per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.streams: dict[int, OutputStream] = {}

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        self.loop.call_soon_threadsafe(self._sort, outputs)

    def _sort(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            stream = self.streams.get(output.key)
            if stream is not None:
                stream.put(output)


class AsyncEngine:
    """Serves protocol requests to any number of asyncio tasks."""

    def __init__(self, engine: Engine) -> None:
        """Starts the engine's thread; ``engine`` belongs to it from now on."""
        self._engine = engine
        self._thread = EngineThread(engine)
        self._mailboxes: dict[asyncio.AbstractEventLoop, _LoopMailbox] = {}
        # Grammars may take long to compile. One thread of their own: they hold up neither the
        # encoding of other prompts nor more than one CPU.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="sagellm-grammar")

    @property
    def engine(self) -> Engine:
        """For reading what is fixed at start: config, capacity, tokenizer."""
        return self._engine

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs; while it drains too."""
        return self._thread.is_alive

    @property
    def num_steps(self) -> int:
        """Grows while there is work."""
        return self._engine.num_steps

    def progress(self) -> EngineProgress:
        """Whether the engine moves, for a liveness check. On any thread, at no cost."""
        return self._thread.progress()

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function on the engine's thread between two steps.

        Args:
            function: May use the engine; no step runs until it returns.

        Raises:
            UnavailableError: The engine has ended.
            Exception: Whatever ``function`` raises.
        """
        return await asyncio.wrap_future(self._thread.call(function))

    async def stats(self) -> EngineStats:
        """Gauges and counters, taken between two steps."""
        return await self.call(self._engine.stats)

    async def start(
        self, request: Request, prompt_token_ids: Iterable[int] | None = None
    ) -> OutputStream:
        """Queues a request and returns its outputs. When this raises, nothing was queued.

        Args:
            request: What to run. ``request.stream`` decides whether there is an output per step or
                one per completion.
            prompt_token_ids: Taken instead of ``request.prompt``.

        Raises:
            InvalidArgumentError, UnsupportedError: The request cannot be served.
            ResourceExhaustedError: It can never fit, or the queue is full.
            UnavailableError: The engine is closing or has failed.
        """
        self._thread.require_open()
        loop = asyncio.get_running_loop()
        if _is_quick(request, prompt_token_ids):
            state = self._engine.prepare(request, prompt_token_ids)
        else:
            executor = None if request.sampling.response_format is None else self._compiler
            state = await loop.run_in_executor(
                executor, self._engine.prepare, request, prompt_token_ids
            )
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            self._mailboxes = {
                known: box for known, box in self._mailboxes.items() if not known.is_closed()
            }
            mailbox = self._mailboxes[loop] = _LoopMailbox(loop)
        stream = OutputStream(state, mailbox, self._thread)
        mailbox.streams[state.key] = stream
        try:
            self._thread.submit(state, mailbox)
        except BaseException:
            del mailbox.streams[state.key]
            raise
        return stream

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
            SagellmError: As ``start``.
        """
        stream = await self.start(request, prompt_token_ids)
        try:
            yield StreamEventStart(
                request_id=request.request_id,
                trace_id=request.trace_id,
                prompt_tokens=stream.num_prompt_tokens,
            )
            async for output in stream:
                delta = delta_of(output)
                if delta is not None:
                    yield delta
                if output.finished is not None:
                    yield end_of(output)
        finally:
            stream.cancel()

    def begin_drain(self) -> None:
        """Takes no more requests (``UnavailableError``); those at hand go on."""
        self._thread.begin_drain()

    async def close(self, drain_timeout: float = 30.0) -> int:
        """Stops taking requests, waits for those at hand, and frees the model.

        Args:
            drain_timeout: Seconds; what is unfinished then is answered ``unavailable``.

        Returns:
            How many requests were cut short.
        """
        cut = await run_in_daemon(lambda: self._thread.close(drain_timeout), "sagellm-close")
        self._compiler.shutdown(wait=False)
        self._engine.close()
        return cut


def _is_quick(request: Request, prompt_token_ids: Iterable[int] | None) -> bool:
    """Whether preparing a request may hold up the event loop: its time has a small bound.

    Templates and grammars run code of their authors, so they never are.
    """
    if request.sampling.response_format is not None:
        return False
    if prompt_token_ids is not None:
        return isinstance(prompt_token_ids, Sized) and len(prompt_token_ids) <= _SHORT_PROMPT_TOKENS
    return request.messages is None and len(request.prompt) <= SHORT_TEXT_CHARS
