"""The one thread that drives an engine, and the mailboxes through which others hear of it."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sagellm.engine.engine import queue_full
from sagellm.engine.request import Failure
from sagellm.errors import UnavailableError
from sagellm.protocol import ErrorCode

if TYPE_CHECKING:
    from sagellm.engine.engine import Engine
    from sagellm.engine.output import SequenceOutput
    from sagellm.engine.request import RequestState

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProgress:
    """Whether an engine moves.

    Attributes:
        num_steps: Since the start.
        has_work: Something is to be done: sequences, or commands of other threads.
        seconds_since_progress: Since the engine's thread last completed a step or command, or since
            work came to an idle engine. Grows while a step hangs; 0 without work.
    """

    num_steps: int
    has_work: bool
    seconds_since_progress: float


class Mailbox(Protocol):
    """Where the outputs of some requests go."""

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        """Takes new outputs, on the engine's thread; must not block.

        When it raises, nobody listens any more: the requests are cancelled.
        """


class EngineThread:
    """Runs ``Engine.step`` as long as there is work, and commands of other threads in between.

    Every request that ``submit`` accepted is answered once through its mailbox, unless it is
    cancelled: by the engine, or with ``unavailable`` when the thread ends before.
    """

    def __init__(self, engine: Engine) -> None:
        """Starts the thread; from now on only it may touch ``engine`` (but for ``prepare``)."""
        self._engine = engine
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._calls: set[Future[Any]] = set()
        self._requests: dict[int, tuple[RequestState, Mailbox]] = {}
        self._drain_until: float | None = None  # monotonic seconds; set when closing
        self._is_draining = False
        self._is_busy = False  # in a turn: commands and a step
        self._progress_at = time.monotonic()
        self._num_cut = 0
        self._end: Failure | None = None  # why the thread no longer takes requests
        self._thread = threading.Thread(target=self._run, name="sagellm-engine", daemon=True)
        self._thread.start()
        # A daemon thread inside native code must not meet the end of the interpreter.
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._end is None and self._thread.is_alive()

    def progress(self) -> EngineProgress:
        """Whether the engine moves. Takes no lock, so that it answers while a step hangs."""
        has_work = self._end is None and bool(
            self._is_busy or self._commands or self._engine.has_work
        )
        # Read after the work, whose arrival renews it: an idle time is never taken for a stall.
        since = time.monotonic() - self._progress_at
        return EngineProgress(
            num_steps=self._engine.num_steps,
            has_work=has_work,
            seconds_since_progress=max(0.0, since) if has_work else 0.0,
        )

    def begin_drain(self) -> None:
        """Takes no more requests from now on; those at hand go on."""
        with self._wake:
            self._is_draining = True

    def submit(self, state: RequestState, mailbox: Mailbox) -> None:
        """Hands a prepared request to the engine.

        Raises:
            ResourceExhaustedError: The queue is full.
            UnavailableError: The engine is closing or has failed.
        """
        limit = self._engine.config.max_queue
        with self._wake:
            self.require_open()
            # The only count that decides: the engine's own still has what was cancelled since its
            # last step.
            if sum(s.scheduled_at is None for s, _ in self._requests.values()) >= limit:
                raise queue_full(limit)
            self._requests[state.key] = (state, mailbox)
            self._post(lambda: self._add(state))

    def cancel(self, key: int) -> None:
        """Drops a request before the next step. Unknown and finished ones are ignored."""
        with self._wake:
            if self._requests.pop(key, None) is not None and self._end is None:
                self._post(lambda: _ignore(self._engine.cancel(key)))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function between two steps, where it may use the engine. Draining permits it.

        Raises:
            UnavailableError: The engine has ended.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            self._calls.discard(future)

        with self._wake:
            if self._end is not None:
                raise UnavailableError(self._end.message)
            self._calls.add(future)
            self._post(run)
        return future

    def close(self, drain_timeout: float = 0.0) -> int:
        """Stops taking requests, lets those at hand finish, and ends the thread.

        Args:
            drain_timeout: Seconds; what is unfinished then is answered ``unavailable``.

        Returns:
            How many requests were cut short (0 if the thread had ended before).
        """
        with self._wake:
            if self._drain_until is None:
                self._drain_until = time.monotonic() + drain_timeout
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        return self._num_cut

    def _post(self, command: Callable[[], None]) -> None:
        """Leaves a command for the thread, which may be idle. The lock is held."""
        if not (self._is_busy or self._commands):
            self._progress_at = time.monotonic()  # until now there was nothing to do
        self._commands.append(command)
        self._wake.notify()

    # ------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        end = Failure(
            code=ErrorCode.UNAVAILABLE,
            message="the engine shut down before this request was complete; send it again",
            retryable=True,
        )
        try:
            while self._take_turn():
                pass
        except BaseException as error:
            logger.critical("the engine thread ends: %r", error, exc_info=True)
            end = Failure(
                code=ErrorCode.UNAVAILABLE,
                message=f"the engine has failed ({type(error).__name__}); restart it",
                retryable=True,
            )
        finally:
            self._end_with(end)

    def _take_turn(self) -> bool:
        """Runs waiting commands and one step; returns False when closing is complete."""
        engine = self._engine
        with self._wake:
            while not (self._commands or engine.has_work or self._drain_until is not None):
                self._is_busy = False
                self._wake.wait()
            if not self._is_busy:
                self._progress_at = time.monotonic()
                self._is_busy = True
            commands, self._commands = self._commands, []
        for command in commands:
            command()
            self._progress_at = time.monotonic()
        if engine.has_work:
            outputs = engine.step()
            if outputs:
                self._dispatch(outputs)
            self._progress_at = time.monotonic()
        if self._drain_until is None:
            return True
        with self._wake:
            working = bool(self._commands) or engine.has_work
        return working and time.monotonic() < self._drain_until

    def _add(self, state: RequestState) -> None:
        with self._wake:
            wanted = state.key in self._requests
        if not wanted:
            return  # cancelled before it got here
        try:
            self._engine.add(state, has_place=True)
        except Exception as error:
            self._dispatch(self._engine.answer(state, Failure.from_exception(error)))

    def _dispatch(self, outputs: list[SequenceOutput]) -> None:
        """Sorts outputs by mailbox: one delivery per mailbox and step."""
        bundles: dict[int, tuple[Mailbox, list[SequenceOutput]]] = {}
        with self._wake:
            for output in outputs:
                entry = self._requests.get(output.key)
                if entry is None:
                    continue  # cancelled meanwhile
                mailbox = entry[1]
                bundles.setdefault(id(mailbox), (mailbox, []))[1].append(output)
                if output.request_finished:
                    del self._requests[output.key]
        for mailbox, bundle in bundles.values():
            try:
                mailbox.deliver(bundle)
            except Exception:
                logger.exception("nobody takes the outputs of %d sequences", len(bundle))
                for output in bundle:
                    self.cancel(output.key)

    def _end_with(self, end: Failure) -> None:
        """Answers everyone who still waits."""
        with self._wake:
            self._end = end
            rest = [state for state, _ in self._requests.values()]
            calls, self._calls = list(self._calls), set()
            self._commands = []
            self._num_cut = len(rest)
        for state in rest:
            self._dispatch(self._engine.answer(state, end))
        for future in calls:
            if not future.done():
                future.set_exception(UnavailableError(end.message))

    def require_open(self) -> None:
        """Raises ``UnavailableError`` unless requests are taken."""
        if self._end is not None:
            raise UnavailableError(self._end.message)
        if self._is_draining or self._drain_until is not None:
            raise UnavailableError("the engine is shutting down; send the request elsewhere")


def _ignore(_: object) -> None:
    """Makes a command of a call whose result nobody needs."""


def _close_at_exit(reference: weakref.ref[EngineThread]) -> None:
    thread = reference()
    if thread is not None:
        thread.close()
